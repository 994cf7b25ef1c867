"""The promise of the project: tiled inference is whole-scan inference."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import ArgumentError, BudgetError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.geometry.tiles import TileRule
from pipeline.unet.network import UNet
from pipeline.unet.predict import Predictor
from pipeline.unet.settings import Head, Padding, UNetSettings, Upsampling, closed_form_rule

WINDOWS = ((100.0, 1 / 64), (31.5, 1 / 256))  # exact in float32, so that the oracle sees the same intensities
TOLERANCE = 1e-5


def trained(network: UNetSettings, seed: int) -> UNet:
    """Return a network with the statistics of training made up, classes about equally frequent, and moderate logits.

    Rounding in float32 grows with the logits: with a deviation of 7, as He's weights give at depth 4, it is 1.3e-5. So
    it does where most of a network is dead, and its logits, nearly all alike, have a few of 12 deviations.
    """
    torch.manual_seed(seed)
    net = UNet(network).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.2, 0.4)
    tile = closed_form_rule(network).tile_shape((4 * network.stride,) * network.dims)
    logits = net(torch.randn(1, network.in_channels, *tile))
    by_channel = logits.transpose(0, 1).flatten(1)
    middle = by_channel.median(1).values
    farthest = (by_channel - middle[:, None]).abs().max()
    scale = min(2 / by_channel.std().clamp(min=1e-3), 10 / farthest.clamp(min=1e-3))
    net.head.weight *= scale
    net.head.bias.copy_(-(middle * scale))
    return net


def scan_of(shape, *, channels=1, dtype=np.uint16, seed=0):
    rng = np.random.default_rng(seed)
    return (100 + 60 * rng.standard_normal((channels, *shape))).clip(0, 250).astype(dtype)


def in_double(net: UNet) -> UNet:
    net.double().register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return net


def whole(net: UNet, scan, rule: TileRule):
    """Apply the network once to the scan mirrored by the halo, and at the end up to the stride: the definition."""
    n = net.settings.neighbours
    if scan.ndim - 1 == rule.ndim + 1:
        beside = np.pad(scan, [(0, 0), (n, n), (0, 0), (0, 0)], mode="reflect")
        every = (beside[:, z : z + 2 * n + 1].reshape(-1, *scan.shape[2:]) for z in range(scan.shape[1]))
        return np.stack([whole(net, each, rule) for each in every], axis=1)
    windows = np.array(WINDOWS).repeat(2 * n + 1, axis=0)[: scan.shape[0]]
    offset, scale = windows.T.reshape(2, -1, *(1,) * rule.ndim)
    x = ((scan.astype(np.float64) - offset) * scale).astype(np.float32)
    pads = [(h, h + -n % s) for n, s, h in zip(x.shape[1:], rule.stride, rule.halo, strict=True)]
    padded = np.pad(x, [(0, 0), *pads], mode="reflect")
    out = net.probabilities(net(torch.from_numpy(padded)[None]))[0].numpy()
    return out[(slice(None), *(slice(t, t + n) for t, n in zip(rule.trim, x.shape[1:], strict=True)))]


def tiled(net: UNet, scan, *, block_core, tile_core, n_slices=1):
    """Segment block by block, tile by tile."""
    rule = closed_form_rule(net.settings)
    predictor = Predictor(
        net, rule, windows=WINDOWS[: scan.shape[0]], tile_shape=rule.tile_shape(tile_core), device="cpu",
        n_slices=n_slices,
    )
    over = rule.over_slices(net.settings.neighbours) if scan.ndim - 1 > rule.ndim else rule
    classes = np.full(scan.shape[1:], 255, np.uint8)
    likely = np.full((net.settings.n_classes, *scan.shape[1:]), np.nan, np.float32)
    for block in BlockGrid(scan.shape[1:], block_core, over.halo, over.stride):
        raw = read_mirrored(scan, block.tile)
        classes[block.core.slices], part = predictor.segment_with_probabilities(raw, block.core)
        likely[(slice(None), *block.core.slices)] = part
        assert np.array_equal(predictor.segment(raw, block.core), classes[block.core.slices])
    return classes, likely


def classes_of_whole(net: UNet, likely):
    if net.settings.head is Head.SIGMOID:
        return np.where(likely.max(0) > 0.5, likely.argmax(0) + 1, 0)
    return likely.argmax(0)


def undecided(net: UNet, likely):
    """Return where the probabilities decide by less than their own tolerance: either class is right there."""
    ordered = np.sort(likely, axis=0)
    close = ordered[-1] - ordered[-2] <= 2 * TOLERANCE if len(likely) > 1 else np.zeros(likely.shape[1:], bool)
    return close | (abs(ordered[-1] - 0.5) <= TOLERANCE) if net.settings.head is Head.SIGMOID else close


def assert_equal(net: UNet, got, expected):
    classes, likely = got
    assert np.abs(likely - expected).max() <= TOLERANCE
    flips = classes != classes_of_whole(net, expected)
    assert not (flips & ~undecided(net, expected)).any()
    assert flips.sum() <= max(1, flips.size // 10_000)


@st.composite
def networks(draw, *, dims, largest_depth):
    head = draw(st.sampled_from((Head.SOFTMAX, Head.SIGMOID)))
    return UNetSettings(
        dims=dims, head=head, n_classes=draw(st.integers(1 if head is Head.SIGMOID else 2, 3)),
        in_channels=draw(st.integers(1, 2)), width=draw(st.integers(2, 4)), depth=draw(st.integers(1, largest_depth)),
        padding=draw(st.sampled_from(Padding)), batch_norm=draw(st.booleans()), n_convs=draw(st.integers(1, 2)),
        up=draw(st.sampled_from(Upsampling)),
    )  # fmt: skip


def cores(draw, stride, *, most):
    return tuple(s * draw(st.integers(1, most)) for s in stride)


def shapes(draw, block_core, *, most):
    """Draw a shape of any size up to ``most``, and of few blocks: what lies in the middle of many is all alike."""
    return tuple(draw(st.integers(1, min(most, 4 * n + n // 2))) for n in block_core)


DTYPES = st.sampled_from([np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, ">u2"])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_tiled_is_whole_for_slides(data):
    network = data.draw(networks(dims=2, largest_depth=3))
    net, rule = trained(network, data.draw(st.integers(0, 9))), closed_form_rule(network)
    block_core, tile_core = (cores(data.draw, rule.stride, most=8 >> network.depth >> 1 or 2) for _ in range(2))
    shape = shapes(data.draw, block_core, most=61)
    scan = scan_of(shape, channels=network.in_channels, dtype=data.draw(DTYPES))
    got = tiled(net, scan, block_core=block_core, tile_core=tile_core)
    expected = whole(net, scan, rule)
    assume(undecided(net, expected).mean() < 0.5)  # a dead network has classes by rounding alone
    assert_equal(net, got, expected)


@settings(max_examples=14, deadline=None)
@given(st.data())
def test_tiled_is_whole_for_volumes(data):
    network = data.draw(networks(dims=3, largest_depth=2))
    net, rule = trained(network, data.draw(st.integers(0, 9))), closed_form_rule(network)
    largest = 17 if network.depth == 1 else 9
    shape = tuple(data.draw(st.integers(1, largest)) for _ in range(3))
    scan = scan_of(shape, channels=network.in_channels, dtype=data.draw(DTYPES))
    block_core, tile_core = (cores(data.draw, rule.stride, most=4 // network.depth) for _ in range(2))
    got = tiled(net, scan, block_core=block_core, tile_core=tile_core)
    expected = whole(net, scan, rule)
    assume(undecided(net, expected).mean() < 0.5)  # a dead network has classes by rounding alone
    assert_equal(net, got, expected)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_tiled_is_whole_for_slices_of_volumes(data):
    network = data.draw(networks(dims=2, largest_depth=2))
    net, rule = trained(network, data.draw(st.integers(0, 9))), closed_form_rule(network)
    shape = (data.draw(st.integers(1, 5)), *(data.draw(st.integers(1, 33)) for _ in range(2)))
    scan = scan_of(shape, channels=network.in_channels, dtype=data.draw(DTYPES))
    block_core = (data.draw(st.integers(1, 4)), *cores(data.draw, rule.stride, most=5))
    tile_core = cores(data.draw, rule.stride, most=5)
    got = tiled(net, scan, block_core=block_core, tile_core=tile_core, n_slices=data.draw(st.integers(1, 3)))
    expected = whole(net, scan, rule)
    assume(undecided(net, expected).mean() < 0.5)  # a dead network has classes by rounding alone
    assert_equal(net, got, expected)


@pytest.mark.parametrize("padding", Padding)
def test_no_class_differs_over_a_larger_slide(padding):
    net = trained(UNetSettings(dims=2, width=4, depth=4, padding=padding), seed=1)
    scan = scan_of((301, 413))
    expected = whole(net, scan, closed_form_rule(net.settings))
    classes, likely = tiled(net, scan, block_core=(160, 160), tile_core=(64, 96))
    assert np.abs(likely - expected).max() <= TOLERANCE
    assert (classes != expected.argmax(0)).sum() == 0
    assert 0.3 < classes.mean() < 0.7


@pytest.mark.parametrize(("dims", "padding"), list(product((2, 3), Padding)))
def test_in_double_precision_only_the_rounding_of_the_result_is_left(dims, padding):
    net = in_double(trained(UNetSettings(dims=dims, width=3, depth=4 - dims, padding=padding), seed=8))
    scan = scan_of((41, 30) if dims == 2 else (17, 10, 9))
    stride = net.settings.stride
    _, likely = tiled(net, scan, block_core=(3 * stride,) * dims, tile_core=(2 * stride,) * dims)
    assert np.abs(likely - whole(net, scan, closed_form_rule(net.settings))).max() <= 2**-24


@pytest.mark.parametrize(("dims", "padding"), list(product((2, 3), Padding)))
def test_tiles_off_the_stride_by_one_voxel_give_other_results(dims, padding):
    net = trained(UNetSettings(dims=dims, width=4, depth=2, padding=padding), seed=2)
    rule = closed_form_rule(net.settings)
    scan = scan_of((40,) * dims)
    expected = whole(net, scan, rule)
    predictor = Predictor(
        net, rule, windows=WINDOWS[:1], tile_shape=rule.tile_shape(rule.tile_shape((8,) * dims)), device="cpu"
    )
    for offset, same in ((12, True), (13, False)):
        core = Box((offset,) * dims, (offset + 16,) * dims)
        classes, likely = predictor.segment_with_probabilities(read_mirrored(scan, core.grow(rule.halo)), core)
        difference = np.abs(likely - expected[(slice(None), *core.slices)]).max()
        flips = (classes != expected.argmax(0)[core.slices]).mean()
        assert (difference <= TOLERANCE and flips == 0) if same else (difference > 1e-3 and flips > 0.001)


def test_a_halo_that_is_smaller_by_one_stride_gives_other_results():
    net = trained(UNetSettings(dims=2, width=8, depth=2, padding=Padding.SAME), seed=3)
    rule, short = closed_form_rule(net.settings), TileRule((4, 4), (20, 20), (20, 20))
    scan, core = scan_of((64, 64)), Box((24, 24), (40, 40))
    expected = whole(net, scan, rule)[(slice(None), *core.slices)]
    for used, same in ((rule, True), (short, False)):
        predictor = Predictor(net, used, windows=WINDOWS[:1], tile_shape=used.tile_shape((16, 16)), device="cpu")
        _, likely = predictor.segment_with_probabilities(read_mirrored(scan, core.grow(used.halo)), core)
        difference = np.abs(likely - expected).max()
        assert difference <= TOLERANCE if same else difference > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch built for it")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float64])
def test_tiles_on_a_gpu_give_what_the_whole_gives_on_a_cpu(dtype):
    net = trained(UNetSettings(dims=2, width=8, depth=3, batch_norm=True), seed=7)
    scan = scan_of((201, 150), dtype=dtype)
    rule, core = closed_form_rule(net.settings), Box((0, 0), (201, 150))
    expected = whole(net, scan, rule)
    raw = read_mirrored(scan, core.round_up(rule.stride).grow(rule.halo))
    predictor = Predictor(net.cuda(), rule, windows=WINDOWS[:1], tile_shape=rule.tile_shape((64, 48)), device="cuda")
    _, likely = predictor.segment_with_probabilities(raw, core)
    assert np.abs(likely - expected).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.float64])
def test_large_intensities_keep_their_small_differences(dtype):
    net = trained(UNetSettings(dims=2, width=2, depth=1), seed=4)
    rule = closed_form_rule(net.settings)
    low = read_mirrored(scan_of((16, 16)), Box((-8, -8), (24, 24))).astype(dtype)
    results = [
        Predictor(net, rule, windows=((100.0 + base, 0.02),), tile_shape=(32, 32), device="cpu")
        .segment_with_probabilities(low + dtype(base), Box.whole((16, 16)))[1]
        for base in (0, 2**31)
    ]
    assert np.array_equal(*results)


class Hungry:
    """A hook that lets a network run out of memory on tiles above a size, as a device would."""

    def __init__(self, largest):
        self.largest, self.seen = largest, []

    def __call__(self, module, args):
        self.seen.append(args[0].numel())
        if args[0].numel() > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("slices", [False, True])
def test_out_of_memory_halves_the_tiles_and_changes_nothing(slices):
    net = trained(UNetSettings(dims=2, width=2, depth=2), seed=5)
    rule = closed_form_rule(net.settings)
    shape = (4, 30, 41) if slices else (30, 41)
    scan = scan_of(shape)
    core = Box((0,) * len(shape), shape)
    over = rule.over_slices() if slices else rule
    raw = read_mirrored(scan, core.round_up(over.stride).grow(over.halo))
    predictor = Predictor(net, rule, windows=WINDOWS[:1], tile_shape=(72, 88), device="cpu", n_slices=4)
    expected = whole(net, scan, rule)
    hungry = Hungry(2500)
    with net.register_forward_pre_hook(hungry):
        classes, likely = predictor.segment_with_probabilities(raw, core)
        assert predictor.rule.tile_shape(predictor.core_shape) == (48, 52)
        hungry.seen.clear()
        assert np.array_equal(predictor.segment(raw, core), classes)
        assert max(hungry.seen) <= 2500  # what was learnt about the device is kept
    assert np.abs(likely - expected).max() <= TOLERANCE
    with net.register_forward_pre_hook(Hungry(1)), pytest.raises(BudgetError, match=r"smallest tile \(44, 44\)"):
        predictor.segment(raw, core)


def test_what_does_not_fit_is_refused():
    net = trained(UNetSettings(dims=2, width=2, depth=1), seed=6)
    rule = closed_form_rule(net.settings)
    good = {"windows": WINDOWS[:1], "tile_shape": (32, 32), "device": "cpu"}
    with pytest.raises(ArgumentError, match="needs 1 windows and 2 axes"):
        Predictor(net, rule, **{**good, "windows": WINDOWS})
    with pytest.raises(ArgumentError, match="got 33; use 32 or 34"):
        Predictor(net, rule, **{**good, "tile_shape": (32, 33)})
    with pytest.raises(ArgumentError, match="needs a network in eval mode"):
        Predictor(UNet(net.settings), rule, **good)
    predictor = Predictor(net, rule, **good)
    with pytest.raises(ArgumentError, match=r"got \(1, 16, 16\); read Block.tile"):
        predictor.segment(np.zeros((1, 16, 16)), Box.whole((16, 16)))
    with pytest.raises(ArgumentError, match=r"needs voxels of shape"):
        predictor.segment(np.zeros((1, 1, 1, 32, 32)), Box.whole((1, 1, 16, 16)))
    with pytest.raises(ArgumentError, match="must be integers or floats, got complex64"):
        predictor.segment(np.zeros((1, 32, 32), np.complex64), Box.whole((16, 16)))
