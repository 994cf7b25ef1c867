"""The law of streaming: what comes out of a column, slab by slab, is what one pass over the whole scan gives there."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet_predict import trained
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Precision
from pipeline.errors import ArgumentError
from pipeline.geometry.mirror import mirror_index
from pipeline.unet.cost import bare_multiply_adds, tile_multiply_adds
from pipeline.unet.cuda import CudaEngine
from pipeline.unet.engine import Engine
from pipeline.unet.engines import make_engine
from pipeline.unet.families import chain_of
from pipeline.unet.layers import Conv, Up, multiply_adds, spans
from pipeline.unet.network import UNet
from pipeline.unet.numbers import exactly
from pipeline.unet.onednn import OneDnnEngine
from pipeline.unet.schedule import lags
from pipeline.unet.settings import Block, Down, Padding, UNetSettings, Upsampling, closed_form_rule
from pipeline.unet.streaming import Stream

ROUNDING = 1e-12


@st.composite
def networks(draw, dims):
    depth = draw(st.integers(1, 3 if dims == 2 else 2))
    pooling = st.tuples(*(st.integers(1, 2),) * dims).filter(lambda each: 2 in each)
    poolings = draw(st.one_of(st.just(()), st.tuples(*(pooling,) * depth)))
    wide = depth == 1  # deeper ones reach far, and the whole pass over their halo takes long
    return UNetSettings(
        dims=dims, in_channels=draw(st.integers(1, 2)), width=draw(st.integers(1, 4)), depth=depth,
        padding=draw(st.sampled_from(Padding)), kernel=draw(st.sampled_from((1, 3, 5) if wide else (1, 3))),
        n_convs=draw(st.integers(1, 3 if wide else 2)), batch_norm=draw(st.booleans()),
        up=draw(st.sampled_from(Upsampling)), up_bias=draw(st.booleans()), double_before_pooling=draw(st.booleans()),
        poolings=poolings,
    )  # fmt: skip


def noise(shape, channels, seed=0):
    return torch.randn((1, channels, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mirrored(x, box):
    for axis, (low, high) in enumerate(box, start=2):
        x = x.index_select(axis, torch.from_numpy(mirror_index(low, high, x.shape[axis])).to(x.device))
    return x


def whole(net, x):
    """Apply the network once to the scan mirrored by the halo: the definition."""
    rule, shape = closed_form_rule(net.settings), x.shape[2:]
    y = net(mirrored(x, [(-h, -(-n // s) * s + h) for n, s, h in zip(shape, rule.stride, rule.halo, strict=True)]))
    return y[(slice(None), slice(None), *(slice(t, t + n) for t, n in zip(rule.trim, shape, strict=True)))]


def streamed(engine, x, start, stop, *, slab):
    """Stream a box of a scan; also checks that slabs are read in the order told, and rows come without gaps."""
    axis, *across = engine.order
    stream = Stream(engine, cross=tuple((start[a], stop[a]) for a in across), slab=slab)
    read, rows, at = [], [], start[axis]

    def voxels(low, high):
        read.append((low, high))
        box = dict(zip(engine.order, ((low, high), *stream.cross), strict=True))
        part = mirrored(x, [box[a] for a in range(engine.dims)]).permute(0, 1, *(2 + a for a in engine.order))
        return part.to(engine.dtype).contiguous(memory_format=engine.memory_format)

    with torch.inference_mode():
        for row, logits in stream.run(start[axis], stop[axis], voxels):
            assert row == at
            at += logits.shape[2]
            rows.append(logits)
    assert at == stop[axis]
    assert read == list(stream.slabs(start[axis], stop[axis]))
    back = np.argsort(engine.order)
    return torch.cat(rows, dim=2).permute(0, 1, *(2 + int(a) for a in back))


def check_a_stream_of_any_part(data, networks, *, longest):
    """Draw a network, a scan of at most the longest extent in 2-D and in 3-D, a part and a slab, and check the law."""
    dims = data.draw(st.sampled_from((2, 2, 3)))
    network = data.draw(networks(dims))
    net = trained(network, data.draw(st.integers(0, 9))).double()
    shape = [data.draw(st.integers(1, longest[dims])) for _ in range(dims)]
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
    axis, slab = data.draw(st.integers(0, dims - 1)), network.stride * data.draw(st.integers(1, 4))
    x = noise(shape, network.in_channels)
    expected = whole(net, x)[(..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))]
    got = streamed(Engine(net, device="cpu", dtype=torch.float64, first=axis), x, start, stop, slab=slab)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= ROUNDING * (1 + expected.abs().max())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_of_any_part_of_a_scan_is_the_whole_pass_there(data):
    check_a_stream_of_any_part(data, networks, longest={2: 41, 3: 13})


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_fused_layers_are_the_network_up_to_rounding(data):
    dims = data.draw(st.sampled_from((2, 3)))
    network = data.draw(networks(dims))
    net = trained(network, data.draw(st.integers(0, 9)))
    shape = [data.draw(st.integers(1, 31 if dims == 2 else 11)) for _ in range(dims)]
    x = noise(shape, network.in_channels).float()
    expected = whole(net, x)
    engine = OneDnnEngine(net, device="cpu", first=data.draw(st.integers(0, dims - 1)))
    got = streamed(engine, x, [0] * dims, shape, slab=network.stride)
    assert (got - expected).abs().max() <= 2e-5 * (1 + expected.abs().max())


@pytest.mark.parametrize("padding", Padding)
@pytest.mark.parametrize(("dims", "width"), [(2, 4), (2, 8), (2, 16), (3, 4), (3, 8)])
def test_neighbouring_voxels_as_channels_give_the_plain_convolution(dims, width, padding):
    network = UNetSettings(dims=dims, width=width, depth=1, padding=padding)
    net = trained(network, seed=1)
    packed, plain = OneDnnEngine(net, device="cpu"), OneDnnEngine(net, device="cpu")
    plain._packed.clear()
    narrow = {at for at, layer in enumerate(packed.chain) if isinstance(layer, Conv) and layer.name != "head"}
    assert set(packed._packed) == {at for at in narrow if at == 0 or packed.chain[at].out < 16}
    shape = [24, 17, 18][-dims:]
    x = noise(shape, 1).float()
    for stop in (shape, [n - 1 for n in shape]):
        one, other = (streamed(engine, x, [0] * dims, stop, slab=4) for engine in (packed, plain))
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_an_engine_gives_a_tile_what_the_network_gives_it(dims):
    for padding in Padding:
        network = UNetSettings(dims=dims, width=4, depth=2, padding=padding, batch_norm=True)
        net = trained(network, seed=2)
        x = noise(closed_form_rule(network).tile_shape((8,) * dims), 1).float()
        engine = make_engine(net, device="cpu")
        with torch.inference_mode():
            got = engine(x.contiguous(memory_format=engine.memory_format))
        assert (got.softmax(1) - net(x).softmax(1)).abs().max() <= 1e-5


def test_a_column_taken_up_in_its_middle_has_the_same_bits():
    network = UNetSettings(dims=2, width=16, depth=3, padding=Padding.SAME, batch_norm=True)
    engine, x = make_engine(trained(network, seed=3), device="cpu"), noise((300, 70), 1).float()
    first = streamed(engine, x, (0, 0), (300, 70), slab=16)
    for row in (16, 100, 128, 299):
        assert torch.equal(streamed(engine, x, (row, 0), (300, 70), slab=16), first[:, :, row:])


def test_lower_precision_differs_by_its_rounding_and_no_more():
    network = UNetSettings(dims=2, width=8, depth=2, padding=Padding.SAME, batch_norm=True)
    net, x = trained(network, seed=4), noise((64, 48), 1).float()
    expected = whole(net, x).softmax(1)
    engine = make_engine(net, device="cpu", precision=Precision.BF16)
    got = streamed(engine, x, (0, 0), (64, 48), slab=8).float().softmax(1)
    assert 1e-4 < (got - expected).abs().max() < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_up_convolutions_are_products_of_matrices(dims):
    for network in (
        UNetSettings(dims=dims, width=2, depth=2),
        UNetSettings(dims=dims, width=2, depth=2, up_bias=False, poolings=((2,) * dims, (1, *(2,) * (dims - 1)))),
    ):
        net = trained(network, seed=8).double()
        for first in range(dims):
            ours, plain = (
                kind(net, device="cpu", dtype=torch.float64, first=first) for kind in (CudaEngine, Engine)
            )
            for at in (at for at, layer in enumerate(ours.chain) if isinstance(layer, Up)):
                x = noise((3, 4, 5)[:dims], ours.chain[at].into).contiguous(memory_format=ours.memory_format)
                got, expected = ours.up(at, x), plain.up(at, x)
                assert (got - expected).abs().max() <= 1e-12
                assert got.is_contiguous(memory_format=ours.memory_format)


GPU_NETWORKS = {
    "plain": {}, "valid": {"padding": Padding.VALID}, "resize": {"up": Upsampling.RESIZE},
    "residual, strided": {"block": Block.RESIDUAL, "down": Down.STRIDED}, "thick": {"poolings": True},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch built for it")
@pytest.mark.parametrize("name", GPU_NETWORKS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_stream_on_a_gpu_is_the_whole_pass_on_a_cpu(dims, name):
    about = {"padding": Padding.SAME, "batch_norm": True} | GPU_NETWORKS[name]
    about |= {"poolings": ((1, *(2,) * (dims - 1)), (2,) * dims)} if about.get("poolings") else {}
    net = trained(UNetSettings(dims=dims, width=8, depth=2, **about), seed=5)
    shape, bounds = (40, 33, 27)[:dims], {Precision.FLOAT32: 1e-5, Precision.TF32: 0.02, Precision.BF16: 0.1}
    x = noise(shape, 1).float()
    expected = whole(net, x).softmax(1)
    for precision, bound in bounds.items():
        engine = make_engine(net, device="cuda", precision=precision)
        with exactly(tf32=engine.tf32):
            got, again = (streamed(engine, x.cuda(), (0,) * dims, shape, slab=8) for _ in range(2))
        assert type(engine) is CudaEngine
        assert torch.equal(got, again)
        assert (got.float().softmax(1).cpu() - expected).abs().max() <= bound


def test_what_a_stream_cannot_run_is_refused():
    engine = Engine(trained(UNetSettings(dims=2, width=2, depth=2), seed=6), device="cpu")
    with pytest.raises(ArgumentError, match="a stream needs 1 axes across it, got 2"):
        Stream(engine, cross=((0, 4), (0, 4)), slab=4)
    for slab, use in ((6, 8), (0, 4)):
        with pytest.raises(ArgumentError, match=f"slab must be a multiple of the stride 4, got {slab}; use {use}"):
            Stream(engine, cross=((0, 4),), slab=slab)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_chain_names_the_layers_of_the_network_with_their_channels(data):
    network = data.draw(networks(data.draw(st.sampled_from((2, 3)))))
    with torch.device("meta"):
        net = UNet(network)
    for layer in chain_of(network):
        if isinstance(layer, Conv | Up):
            module = net.get_submodule(layer.name)
            conv = module[0] if isinstance(module, torch.nn.Sequential) else module
            assert (conv.in_channels, conv.out_channels) == (layer.into, layer.out)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spans_are_exactly_what_a_core_depends_on(data):
    network = data.draw(networks(2).filter(lambda each: each.kernel > 1))
    chain, rule = chain_of(network), closed_form_rule(network)
    start = data.draw(st.integers(-20, 20))
    low, high = spans(chain, (start, start + data.draw(st.integers(1, 9))), 0)[0]
    assert low >= start - rule.halo[0] - network.stride
    assert high <= start + 9 + rule.halo[0] + network.stride
    assert all(lag <= 0 for axis in range(2) for lag in lags(chain, axis))


@pytest.mark.parametrize("padding", Padding)
def test_spans_match_the_influence_of_single_voxels(padding):
    network = UNetSettings(dims=2, width=2, depth=2, padding=padding, n_convs=1)
    net = trained(network, seed=7).double()
    shape, core = (40, 8), (13, 17)
    x, needed = noise(shape, 1), spans(chain_of(network), core, 0)[0]
    expected = whole(net, x)[:, :, slice(*core)]
    for row in range(40):
        y = x.clone()
        y[:, :, row] += 1e3
        changed = not torch.equal(whole(net, y)[:, :, slice(*core)], expected)
        assert not changed or needed[0] <= row < needed[1]


def test_multiply_adds_are_those_that_torch_counts():
    flops = FlopCounterMode(display=False)
    for dims, padding, up in ((2, Padding.SAME, Upsampling.TRANSPOSED), (3, Padding.VALID, Upsampling.RESIZE)):
        network = UNetSettings(dims=dims, width=2, depth=2, padding=padding, up=up)
        tile = closed_form_rule(network).tile_shape((8,) * dims)
        with torch.device("meta"):
            net, x = UNet(network), torch.empty((1, 1, *tile))
        with flops:
            net(x)
        assert 2 * tile_multiply_adds(network, tile) == flops.get_total_flops()
        if padding is Padding.SAME:
            assert bare_multiply_adds(network, tile) == tile_multiply_adds(network, tile)
    assert multiply_adds(chain_of(network)[0], network) == 2 * math.prod((3,) * dims)
