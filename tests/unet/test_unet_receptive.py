import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.network import UNet
from pipeline.unet.receptive import measure_tile_rule, measured_rule
from pipeline.unet.settings import Padding, UNetSettings, Upsampling, closed_form_rule


@pytest.mark.parametrize(
    "network",
    [
        UNetSettings(dims=dims, depth=depth, padding=padding)
        for dims, depths in ((2, (1, 2, 3, 4)), (3, (1, 2)))
        for depth, padding in itertools.product(depths, Padding)
    ],
    ids=lambda s: f"{s.dims}d-depth{s.depth}-{s.padding}",
)
def test_measured_is_closed_form(network):
    twin = UNet(replace(network, width=1))
    assert measure_tile_rule(twin, dims=network.dims, in_channels=1) == closed_form_rule(network)


@settings(max_examples=10, deadline=None)
@given(
    st.builds(
        UNetSettings,
        dims=st.just(2), depth=st.integers(1, 2), padding=st.sampled_from(Padding), kernel=st.sampled_from((3, 5)),
        n_convs=st.integers(1, 3), batch_norm=st.booleans(), up=st.sampled_from(Upsampling), up_bias=st.booleans(),
        double_before_pooling=st.booleans(), dropout=st.sampled_from((0.0, 0.5)), in_channels=st.integers(1, 2),
    )
)
def test_measured_is_closed_form_for_every_kind_of_network(network):
    assert measured_rule(network) == closed_form_rule(network)


@pytest.mark.parametrize("padding", Padding)
@pytest.mark.parametrize("up", Upsampling)
def test_measured_is_closed_form_in_3d_with_other_kernels(padding, up):
    network = UNetSettings(dims=3, depth=1, width=1, padding=padding, up=up, kernel=5, n_convs=1, batch_norm=True)
    assert measure_tile_rule(UNet(network), dims=3, in_channels=1) == closed_form_rule(network)


@pytest.mark.parametrize("padding", Padding)
def test_the_twin_has_the_reach_of_the_network(padding):
    network = UNetSettings(dims=3, depth=3, width=64, in_channels=5, padding=padding)
    assert measured_rule(network) == closed_form_rule(network)


def test_width_does_not_change_the_reach():
    network = UNetSettings(dims=2, depth=2, width=3, in_channels=2)
    assert measure_tile_rule(UNet(network), dims=2, in_channels=2) == closed_form_rule(network)


def test_measuring_leaves_the_network_in_its_mode():
    network = UNet(UNetSettings(dims=2, width=1, depth=1, batch_norm=True, dropout=0.5)).train()
    network.contract[0].eval()
    modes = [m.training for m in network.modules()]
    before = {name: t.clone() for name, t in network.state_dict().items()}
    measure_tile_rule(network, dims=2, in_channels=1)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_a_stack_of_convolutions_needs_no_alignment():
    valid = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, (5, 3)), nn.ReLU())
    assert measure_tile_rule(valid, dims=2, in_channels=1) == TileRule((1, 1), (3, 2), (0, 0))
    same = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, (5, 3), padding=(2, 1)))
    assert measure_tile_rule(same, dims=2, in_channels=1) == TileRule((1, 1), (3, 2), (3, 2))


def test_dilated_convolutions_reach_by_their_dilation():
    network = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=7), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=16, dilation=16))
    assert measure_tile_rule(network, dims=2, in_channels=1) == TileRule((1, 1), (23, 23), (16, 16))


def test_pointwise_networks_need_no_halo():
    assert measure_tile_rule(nn.Conv3d(2, 2, 1), dims=3, in_channels=2) == TileRule((1,) * 3, (0,) * 3, (0,) * 3)


def test_strided_convolution_and_back():
    network = nn.Sequential(nn.Conv2d(1, 2, 4, stride=4), nn.ReLU(), nn.ConvTranspose2d(2, 1, 4, stride=4))
    assert measure_tile_rule(network, dims=2, in_channels=1) == TileRule((4, 4), (0, 0), (0, 0))


def test_odd_sizes_that_a_strided_convolution_rounds_are_no_tiles():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(2, 1, 2, stride=2)
    )
    assert measure_tile_rule(network, dims=2, in_channels=1) == TileRule((2, 2), (2, 2), (2, 2))


def test_pooling_by_three():
    network = nn.Sequential(nn.MaxPool2d(3), nn.Conv2d(1, 1, 3, padding=1), nn.Upsample(scale_factor=3))
    assert measure_tile_rule(network, dims=2, in_channels=1) == TileRule((3, 3), (3, 3), (3, 3))


class Anisotropic(nn.Module):
    """Pools y and x only, convolves z once: strides (1, 2, 2)."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv3d(1, 2, (3, 3, 3), padding="same")
        self.deep = nn.Conv3d(2, 2, (1, 3, 3), padding="same")
        self.up = nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=(1, 2, 2))
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, x):
        fine = functional.relu(self.fine(x))
        deep = functional.relu(self.deep(functional.max_pool3d(fine, (1, 2, 2))))
        return self.head(torch.cat((fine, self.up(deep)), dim=1))


def test_each_axis_has_its_own_stride():
    assert measure_tile_rule(Anisotropic(), dims=3, in_channels=1) == TileRule((1, 2, 2), (1, 4, 4), (1, 4, 4))


class HiddenStride(nn.Module):
    """A wide convolution whose reach hides that of a branch that pools: only the numbers tell the stride."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(1, 1, 17, padding=8)

    def forward(self, x):
        return self.wide(x) + functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2.0)


def test_a_stride_that_the_reach_hides_is_found_by_the_numbers():
    torch.manual_seed(0)
    assert measure_tile_rule(HiddenStride(), dims=2, in_channels=1) == TileRule((2, 2), (8, 8), (8, 8))


class Attention(nn.Module):
    def forward(self, x):
        return x * functional.adaptive_avg_pool2d(x, 1).sigmoid()


@pytest.mark.parametrize(
    "layer", [nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), Attention()], ids=["instance", "group", "squeeze-excite"]
)
def test_networks_that_see_everything_are_refused(layer):
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), layer, nn.ReLU(), nn.Conv2d(2, 2, 1))
    with pytest.raises(ModelError, match=r"finite receptive field .*frozen statistics"):
        measure_tile_rule(network, dims=2, in_channels=1)


class WithPosition(nn.Module):
    def forward(self, x):
        return x + torch.linspace(0, 1, x.shape[-1], device=x.device)


def test_networks_that_know_the_position_are_refused():
    with pytest.raises(ModelError, match="depends on the position"):
        measure_tile_rule(WithPosition(), dims=2, in_channels=1)


def test_networks_that_resample_are_refused():
    with pytest.raises(ModelError, match="same border on both sides"):
        measure_tile_rule(nn.Upsample(scale_factor=2), dims=2, in_channels=1)


def test_networks_that_accept_nothing_are_refused():
    with pytest.raises(ModelError, match="must accept some input of shape \\(1, 2,"):
        measure_tile_rule(nn.Conv2d(1, 1, 3), dims=2, in_channels=2)
