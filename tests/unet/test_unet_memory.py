import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import measured

from pipeline.errors import ArgumentError, BudgetError
from pipeline.store.statistics import Normalisation
from pipeline.unet.memory import choose_tile, peak_bytes
from pipeline.unet.model import Model
from pipeline.unet.network import UNet
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule

NARROW = UNetSettings(dims=2, width=2, depth=2)
VOLUME = UNetSettings(dims=3, width=2, depth=1, padding=Padding.SAME)


def a_model(network: UNetSettings) -> Model:
    return Model(
        network, ("a", "b"), (0, 1), Normalisation.ZSCORE, ("0",) * network.in_channels, None,
        closed_form_rule(network), {}, UNet(network).state_dict(),
    )  # fmt: skip


MEASURE = """
import json, sys
import torch
from peaks import grown
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.settings import UNetSettings

document, small, tile = json.loads(sys.argv[1])
settings = UNetSettings.from_json(document)
network = UNet(settings).eval()
def run(shape):
    with torch.inference_mode():
        classes_of(network.probabilities(network(torch.randn(1, settings.in_channels, *shape))), settings.head)
run(small)
print(grown(lambda: run(tile)))
"""


@pytest.mark.parametrize(
    ("network", "small", "tile"),
    [
        (UNetSettings(dims=2, width=32, depth=3), (92, 92), (668, 668)),
        (UNetSettings(dims=2, width=32, depth=3, padding=Padding.SAME, batch_norm=True), (96, 96), (640, 640)),
        (UNetSettings(dims=3, width=8, depth=2, padding=Padding.SAME, batch_norm=True), (8, 8, 8), (96, 96, 96)),
        (UNetSettings(dims=3, width=8, depth=2), (44, 44, 44), (108, 108, 108)),
    ],
    ids=lambda v: f"{v.dims}d-{v.padding}" if isinstance(v, UNetSettings) else "",
)
def test_predicted_peak_bounds_the_measured_one(network, small, tile):
    weights = sum(t.numel() * t.element_size() for t in UNet(network).state_dict().values())
    ratio = measured(MEASURE, [network.to_json(), small, tile]) / (peak_bytes(network, tile) - weights)
    print(f"measured / predicted = {ratio:.2f}")
    assert 0.4 < ratio < 1.05


def test_peak_counts_what_waits_for_its_level():
    # worst at the convolution of what was joined: the network's input, the convolution's input and output, and a copy
    # of each of the latter; the skip is free by then
    network = UNetSettings(dims=2, width=16, depth=1, kernel=1)
    n = 4 * 64 * 64
    weights = sum(p.numel() for p in UNet(network).parameters()) * 4
    live = n + 2 * (32 * n + 16 * n)
    assert peak_bytes(network, (64, 64)) == weights + int(1.4 * live)


def test_peak_grows_with_slices_and_refuses_illegal_tiles():
    one, four = (peak_bytes(NARROW, (60, 60), n_slices=n) for n in (1, 4))
    weights = sum(p.numel() for p in UNet(NARROW).parameters()) * 4
    assert four - weights == pytest.approx(4 * (one - weights), rel=1e-3)
    with pytest.raises(ArgumentError, match="got 61; use 60 or 64"):
        peak_bytes(NARROW, (60, 61))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((NARROW, VOLUME)), st.data())
def test_chosen_tile_fits_and_none_of_less_overhead_does(network, data):
    rule, model = closed_form_rule(network), a_model(network)
    largest = tuple(data.draw(st.integers(1, 9 * s)) for s in rule.stride)
    least = peak_bytes(network, rule.tile_shape(rule.stride))
    budget = data.draw(st.integers(least, 12 * least))
    tile = choose_tile(model, budget_bytes=budget, largest_core=largest)
    core = rule.core_shape(tile)
    block = tuple(-(-n // s) * s for n, s in zip(largest, rule.stride, strict=True))
    assert all(c <= b for c, b in zip(core, block, strict=True))
    assert peak_bytes(network, tile) <= budget

    def entering(core):
        counts = (-(-b // c) for b, c in zip(block, core, strict=True))
        return prod(counts) * prod(rule.tile_shape(core))

    every = itertools.product(*(range(s, b + 1, s) for b, s in zip(block, rule.stride, strict=True)))
    better = [c for c in every if entering(c) < entering(core)]
    assert all(peak_bytes(network, rule.tile_shape(c)) > budget for c in better)


def test_a_budget_below_the_smallest_tile_is_refused():
    least = peak_bytes(NARROW, (44, 44))
    model = a_model(NARROW)
    assert choose_tile(model, budget_bytes=least, largest_core=(400, 400)) == (44, 44)
    with pytest.raises(BudgetError, match=rf"tile \(44, 44\) needs {least:,} bytes, got a budget of .*--budget"):
        choose_tile(model, budget_bytes=least - 1, largest_core=(400, 400))


def test_a_large_block_is_chosen_for_quickly():
    model = a_model(UNetSettings(dims=3, width=4, depth=1, padding=Padding.SAME))
    torch.manual_seed(0)
    tile = choose_tile(model, budget_bytes=300_000_000, largest_core=(256, 256, 256))
    assert peak_bytes(model.settings, tile) <= 300_000_000
