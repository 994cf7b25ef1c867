import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.settings import Block, Down, Family, Head, Padding, UNetSettings, Upsampling, closed_form_rule


def on_meta(network: UNetSettings) -> UNet:
    with torch.device("meta"):
        return UNet(network).eval()


def n_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def output_shape(network: UNet, *spatial: int) -> tuple[int, ...]:
    x = torch.empty((1, network.settings.in_channels, *spatial), device="meta")
    return tuple(network(x).shape[2:])


def test_network_of_2015_has_its_parameters_and_sizes():
    network = on_meta(UNetSettings(dims=2, in_channels=3, n_classes=2, width=64, depth=4))
    assert n_parameters(network) == 31_031_810
    assert output_shape(network, 572, 572) == (388, 388)
    assert output_shape(on_meta(UNetSettings(dims=2)), 572, 572) == (388, 388)


def test_network_of_2016_has_its_parameters_and_sizes():
    network = on_meta(
        UNetSettings(
            dims=3, in_channels=3, n_classes=3, width=32, depth=3, double_before_pooling=True, up_bias=False
        )
    )
    assert n_parameters(network) == 19_069_955
    assert output_shape(network, 116, 132, 132) == (28, 44, 44)


def any_settings(*, dims=(2, 3), largest_depth=4) -> st.SearchStrategy[UNetSettings]:
    return st.builds(
        UNetSettings,
        dims=st.sampled_from(dims), in_channels=st.integers(1, 3), n_classes=st.integers(2, 4), width=st.integers(1, 3),
        depth=st.integers(1, largest_depth), padding=st.sampled_from(Padding), kernel=st.sampled_from((1, 3, 5)),
        n_convs=st.integers(1, 3), batch_norm=st.booleans(), dropout=st.sampled_from((0.0, 0.5)),
        up=st.sampled_from(Upsampling), up_bias=st.booleans(), double_before_pooling=st.booleans(),
        head=st.sampled_from(Head),
        block=st.sampled_from(Block), down=st.sampled_from(Down), attention=st.booleans(),
    )


@given(any_settings())
def test_settings_survive_json(network):
    for each in (network, replace(network, poolings=((1,) * (network.dims - 1) + (2,),) * network.depth)):
        assert UNetSettings.from_json(json.loads(json.dumps(each.to_json()))) == each


@settings(max_examples=60, deadline=None)
@given(any_settings(), st.integers(1, 3))
def test_tiles_of_the_closed_form_leave_core_and_trim(settings, n_strides):
    rule, network = closed_form_rule(settings), on_meta(settings)
    core = tuple(n_strides * s for s in rule.stride)
    out = tuple(c + 2 * t for c, t in zip(core, rule.trim, strict=True))
    assert output_shape(network, *rule.tile_shape(core)) == out


@settings(max_examples=40, deadline=None)
@given(any_settings(dims=(2,)), st.integers(1, 900))
def test_legal_sizes_are_those_that_poolings_halve(settings, size):
    def halves(n):
        for _ in range(settings.depth):
            if settings.padding is Padding.VALID:
                n -= 2 * settings.radius
            if n <= 0 or n % 2:
                return False
            n //= 2
        return settings.padding is Padding.SAME or n - 2 * settings.radius > 0

    def leaves_output(n):
        return halves(n) and n - 2 * settings.loss > 0

    expected = next(n for n in range(size, 10_000) if leaves_output(n))
    assert settings.legal_size(size) == expected


@pytest.mark.parametrize(
    ("depth", "stride", "halo", "trim"), [(1, 2, 8, 0), (2, 4, 20, 0), (3, 8, 46, 2), (4, 16, 94, 2), (5, 32, 190, 2)]
)
def test_closed_form_of_the_network_of_2015(depth, stride, halo, trim):
    rule = closed_form_rule(UNetSettings(dims=2, depth=depth))
    assert rule == TileRule((stride,) * 2, (halo,) * 2, (trim,) * 2)


def test_illegal_sizes_are_refused_with_the_legal_ones_beside_them():
    network = on_meta(UNetSettings(dims=2))
    with pytest.raises(ArgumentError, match="got 570; use 556 or 572"):
        output_shape(network, 572, 570)
    with pytest.raises(ArgumentError, match="got 10; use 188"):
        output_shape(network, 10, 188)
    assert output_shape(network, 188, 188) == (4, 4)
    with pytest.raises(ArgumentError, match="1 channels and 2 spatial axes"):
        network(torch.empty((1, 3, 188, 188), device="meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 4}, "dims must be 2 or 3"), ({"kernel": 4}, "kernel must be odd, got 4; use 5"),
        ({"depth": 0}, "depth must be at least 1"), ({"dropout": 1.0}, "dropout must be"),
        ({"n_classes": 1}, "softmax head needs 2"), ({"n_classes": 257}, "softmax head needs 2 to 256"),
        ({"n_classes": 256, "head": Head.SIGMOID}, "sigmoid head needs 1 to 255"),
        ({"poolings": ((1, 2),)}, r"poolings must be 4 lists, .* use such as \(\(2, 2\), "),
        ({"depth": 1, "poolings": ((1, 1),)}, "numbers 1 or 2, one of them 2"),
        ({"depth": 1, "poolings": ((2, 4),)}, "numbers 1 or 2"), ({"depth": 1, "poolings": ((2,),)}, "of 2 numbers"),
        ({"family": Family.NESTED}, r"family unet\+\+ have no padding valid; leave it out"),
        ({"family": Family.FCN, "padding": Padding.SAME, "attention": True}, "family fcn have no attention"),
        ({"family": Family.FCN, "padding": Padding.SAME, "depth": 2}, "have no depth 2, below 3,"),
        ({"deep_supervision": True}, "family unet have no deep_supervision"),
    ],
)
def test_settings_outside_their_rules_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        UNetSettings(**{"dims": 2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2.0}, "width must be a number"), ({"batch_norm": 1}, "batch_norm must be"),
        ({"padding": "mirror"}, "this version can build"), ({"depth": -1}, "depth must be at least 1"),
        ({"gates": 3}, "and fields of"),
        ({"poolings": [[2, 2.0]]}, "list of lists"), ({"attention": 1}, "attention must"),
        ({"dropout": "0.5"}, "dropout must be"),
    ],
)
def test_settings_in_a_file_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        UNetSettings.from_json({**UNetSettings(dims=2).to_json(), **change})


def test_settings_of_a_file_that_older_versions_wrote_have_defaults():
    new = ("family", "block", "down", "attention", "deep_supervision", "poolings")
    old = {name: value for name, value in UNetSettings(dims=3, width=8).to_json().items() if name not in new}
    assert UNetSettings.from_json(old) == UNetSettings(dims=3, width=8)
    with pytest.raises(ModelError, match="must have dims, and fields of"):
        UNetSettings.from_json({"width": 2})


def test_weights_have_the_deviation_of_he():
    torch.manual_seed(1)
    network = UNet(UNetSettings(dims=2, width=32, depth=2, batch_norm=True))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 2000:
            n = module.in_channels * (1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size))
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / n), rel=0.07)
            assert not module.bias.any()


def test_resize_repeats_each_voxel_so_it_keeps_the_size_of_transposed():
    torch.manual_seed(0)
    network = UNet(UNetSettings(dims=3, width=2, depth=1, up=Upsampling.RESIZE))
    x = torch.randn(1, 4, 3, 3, 3)
    up = network.up[0](x)
    for corner in torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]]):
        assert torch.equal(up[0, :, corner[0]::2, corner[1]::2, corner[2]::2], network.up[0][0](x)[0])


def test_classes_of_softmax_take_the_first_of_equals():
    logits = torch.tensor([[0.4, -0.2, 0.5], [0.4, 0.3, 0.0], [0.2, 0.5, 0.5]]).reshape(1, 3, 1, 3)
    assert classes_of(logits, Head.SOFTMAX).tolist() == [[[0, 2, 0]]]


def test_classes_of_sigmoid_are_zero_where_none_exceeds_half():
    logits = torch.tensor([[0.0, 0.9, -0.1, -3], [-0.4, 0.95, 0.1, -2]]).reshape(1, 2, 1, 4)
    assert classes_of(logits, Head.SIGMOID).tolist() == [[[0, 2, 2, 0]]]


def test_probabilities_follow_the_head():
    logits = torch.tensor([[[[0.0]], [[math.log(3.0)]]]])
    softmax = on_meta(UNetSettings(dims=2, width=1, depth=1)).probabilities(logits)
    sigmoid = on_meta(UNetSettings(dims=2, width=1, depth=1, head=Head.SIGMOID)).probabilities(logits)
    assert softmax.flatten().tolist() == pytest.approx([0.25, 0.75])
    assert sigmoid.flatten().tolist() == pytest.approx([0.5, 0.75])
