"""The family around the U-Net: each network has a finite tile rule, its tiles are one pass, and its cost is counted."""

from dataclasses import replace

import pytest
import torch
from test_unet_predict import assert_equal, scan_of, tiled, trained, whole
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pipeline.geometry.tiles import TileRule
from pipeline.unet.cost import bare_multiply_adds, tile_multiply_adds
from pipeline.unet.engines import make_engine
from pipeline.unet.families import chain_of, name_of
from pipeline.unet.layers import spans
from pipeline.unet.network import UNet
from pipeline.unet.receptive import measure_tile_rule, measured_rule
from pipeline.unet.settings import Block, Down, Family, Padding, UNetSettings, Upsampling, closed_form_rule

SAME = UNetSettings(dims=2, width=2, depth=2, n_convs=1, padding=Padding.SAME, batch_norm=True)
THICK = ((1, 2, 2), (2, 2, 2))
NETWORKS = {
    "thick slices": replace(SAME, dims=3, poolings=THICK),
    "thick slices, valid": UNetSettings(dims=3, width=2, depth=2, poolings=THICK, up=Upsampling.RESIZE, n_convs=1),
    "never pooled across": replace(SAME, dims=3, poolings=((1, 2, 2), (1, 2, 2))),
    "residual": replace(SAME, block=Block.RESIDUAL, n_convs=2),
    "residual, valid": UNetSettings(dims=2, width=2, depth=2, block=Block.RESIDUAL, n_convs=2),
    "preactivated": replace(SAME, block=Block.PREACTIVATED, up=Upsampling.RESIZE),
    "preactivated, not normalised": replace(SAME, block=Block.PREACTIVATED, batch_norm=False),
    "V-Net": UNetSettings(dims=3, width=2, depth=1, kernel=5, n_convs=1, padding=Padding.SAME, block=Block.RESIDUAL,
                          down=Down.STRIDED, batch_norm=True),
    "strided, valid": UNetSettings(dims=2, width=2, depth=2, n_convs=1, down=Down.STRIDED, batch_norm=True),
    "attention": replace(SAME, attention=True),
    "attention, valid": UNetSettings(dims=2, width=2, depth=2, n_convs=1, attention=True, batch_norm=True),
    "attention in thick slices": replace(SAME, dims=3, poolings=THICK, attention=True),
    "U-Net++": replace(SAME, family=Family.NESTED),
    "U-Net++, three deep": replace(SAME, family=Family.NESTED, depth=3, deep_supervision=True),
    "U-Net++ of thick slices": replace(SAME, dims=3, poolings=THICK, family=Family.NESTED, deep_supervision=True,
                                       up=Upsampling.RESIZE),
    "FCN": replace(SAME, family=Family.FCN, depth=3),
    "FCN, interpolated": replace(SAME, family=Family.FCN, depth=4, up=Upsampling.RESIZE),
    "FCN of thick slices": replace(SAME, dims=3, family=Family.FCN, depth=3, poolings=((1, 2, 2), *THICK)),
    "all at once": replace(SAME, block=Block.RESIDUAL, down=Down.STRIDED, attention=True, double_before_pooling=True),
}  # fmt: skip
EVERY = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def size_of(network):
    return 4 * network.stride if network.dims == 2 else 2 * network.stride


@EVERY
def test_the_measured_rule_is_the_closed_form(network):
    assert measured_rule(network) == closed_form_rule(network)


@pytest.mark.parametrize("name", ["thick slices, valid", "never pooled across", "V-Net"])
def test_the_twins_have_the_reach_of_the_network_along_every_axis(name):
    network = replace(NETWORKS[name], width=1)
    assert measure_tile_rule(UNet(network), dims=3, in_channels=1) == closed_form_rule(network)


def test_the_rule_of_thick_slices_is_known():
    # along z: no reach on the first level, then the U-Net of depth 1 and radius 2, whose voxels are as long
    network = UNetSettings(dims=3, depth=2, poolings=THICK)
    flat, square = (closed_form_rule(UNetSettings(dims=2, depth=depth)) for depth in (1, 2))
    assert closed_form_rule(network) == TileRule((2, 4, 4), (flat.halo[0], *square.halo), (flat.trim[0], *square.trim))


@EVERY
def test_spans_lie_within_the_halo_and_reach_past_one_stride_less(network):
    chain, rule = chain_of(network), closed_form_rule(network)
    for axis, (stride, halo) in enumerate(zip(rule.stride, rule.halo, strict=True)):
        low, high = spans(chain, (0, stride), axis)[0]
        assert -halo <= low
        assert high <= stride + halo
        if network.padding is Padding.SAME:
            assert min(low, stride - high) < stride - halo or halo == 0


@EVERY
def test_tiles_are_one_pass(network):
    net, rule = trained(network, seed=3), closed_form_rule(network)
    shape = {2: (size_of(network) + 5, 1), 3: (7, 2 * network.stride + 3, network.stride - 1)}[network.dims]
    scan = scan_of(shape)
    got = tiled(net, scan, block_core=tuple(2 * s for s in rule.stride), tile_core=rule.stride)
    assert_equal(net, got, whole(net, scan, rule))


@EVERY
def test_fused_layers_give_a_tile_what_the_network_gives_it(network):
    net = trained(network, seed=2)
    x = torch.randn((1, 1, *closed_form_rule(network).tile_shape(network.in_proportion(2 * network.stride))))
    engine = make_engine(net, device="cpu")
    with torch.inference_mode():
        got = engine(x.contiguous(memory_format=engine.memory_format))
        assert (got.softmax(1) - net(x).softmax(1)).abs().max() <= 1e-5


@EVERY
def test_multiply_adds_are_those_that_torch_counts(network):
    flops = FlopCounterMode(display=False)
    tile = closed_form_rule(network).tile_shape((2 * network.stride,) * network.dims)
    with torch.device("meta"):
        net, x = UNet(network), torch.empty((1, 1, *tile))
    with flops:
        net(x)
    assert 2 * tile_multiply_adds(network, tile) == flops.get_total_flops()
    if network.padding is Padding.SAME:
        assert bare_multiply_adds(network, tile) == tile_multiply_adds(network, tile)


def test_kernels_do_not_reach_across_slices_before_these_are_pooled():
    net = UNet(UNetSettings(dims=3, width=2, depth=3, poolings=((1, 2, 2), *THICK)))
    shapes = [tuple(each[0].weight.shape[2:]) for each in (*net.contract, net.bottom, *net.expand)]
    assert shapes == [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (1, 3, 3), (1, 3, 3)]
    assert [tuple(each.weight.shape[2:]) for each in net.up] == [(2, 2, 2), (1, 2, 2), (1, 2, 2)]


def test_what_interpolates_is_linear_before_it_learns():
    torch.manual_seed(0)
    net = UNet(replace(SAME, family=Family.FCN, depth=3))
    x = torch.randn(1, 2, 5, 6)
    linear = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(net.up[0](x)[..., 1:-1, 1:-1], linear[..., 1:-1, 1:-1], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("thick slices", "3-D U-Net with anisotropic poolings"),
        ("V-Net", "3-D residual U-Net with strided convolutions (V-Net)"),
        ("attention, valid", "2-D U-Net with attention gates"), ("FCN", "2-D FCN-2s"), ("U-Net++", "2-D U-Net++"),
        ("preactivated", "2-D preactivated residual U-Net"),
    ],
)  # fmt: skip
def test_networks_are_called_by_name(name, called):
    assert name_of(NETWORKS[name]) == called


def test_the_baseline_of_five_poolings_is_fcn_8s():
    assert name_of(replace(SAME, family=Family.FCN, depth=5)) == "2-D FCN-8s"
