"""Columns: their cost is counted right, they fit the budget, and wider ones waste less."""

import itertools
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import each_measured
from test_unet_predict import trained
from test_unet_streaming import noise, streamed
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Precision
from pipeline.errors import ArgumentError, BudgetError
from pipeline.geometry.grid import BlockGrid
from pipeline.unet.columns import Columns, Streaming
from pipeline.unet.cost import bare_multiply_adds, stream_bytes
from pipeline.unet.engine import Engine
from pipeline.unet.families import chain_of
from pipeline.unet.schedule import schedule_of
from pipeline.unet.settings import Block, Down, Family, Padding, UNetSettings


def streaming(shape, shard, network, *, chunk=None, voxel_bytes=2):
    return Streaming(network, BlockGrid(shape, shard), chunk or shard, voxel_bytes, 1, 4, "cpu")


NET_2D = UNetSettings(dims=2, width=8, depth=3, padding=Padding.SAME)
NET_3D = UNetSettings(dims=3, width=4, depth=2, padding=Padding.SAME)
THICK = UNetSettings(dims=3, width=4, depth=2, padding=Padding.SAME, poolings=((1, 2, 2), (2, 2, 2)))


@pytest.mark.parametrize(
    ("network", "shape", "slab", "axis"),
    [(NET_2D, (50, 41), 16, 0), (NET_3D, (24, 15, 18), 4, 0), (THICK, (9, 31, 26), 8, 0), (THICK, (9, 31, 26), 8, 1)],
)  # fmt: skip
def test_the_multiplications_of_a_column_are_those_that_run(network, shape, slab, axis):
    what = streaming(shape, tuple(-(-n // 16) * 16 for n in shape), network)
    columns = Columns(axis, slab, (1,) * len(shape), shape)
    engine = Engine(trained(network, seed=0), device="cpu", first=axis)
    flops = FlopCounterMode(display=False)
    with flops:
        streamed(engine, noise(shape, 1).float(), (0,) * len(shape), shape, slab=slab)
    assert 2 * what.cost(columns, n_workers=1).multiply_adds == flops.get_total_flops()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_choice_fits_and_nothing_that_was_tried_is_better(data):
    network = data.draw(st.sampled_from((NET_2D, NET_3D)))
    shape = tuple(data.draw(st.integers(1, 200)) for _ in range(network.dims))
    shard = tuple(data.draw(st.sampled_from((16, 32, 64))) for _ in shape)
    what, n_workers = streaming(shape, shard, network), data.draw(st.integers(1, 5))
    budget = data.draw(st.integers(2**20, 2**26))
    try:
        columns, cost = what.choose(budget_bytes=budget, n_workers=n_workers)
    except BudgetError:
        return
    assert cost.peak_bytes == what.peak_bytes(columns) <= budget
    assert cost.multiply_adds >= bare_multiply_adds(network, shape) * 0.99
    counts = what.shards.grid_shape
    for blocks in itertools.islice(itertools.product(*({1, n} for n in counts)), 8):
        try:
            _, other = what.choose(budget_bytes=budget, n_workers=n_workers, blocks=blocks)
        except BudgetError:
            continue
        if all(n <= 16 for n in blocks):
            assert cost.slowest <= other.slowest


def test_columns_cover_every_block_once():
    what = streaming((300, 90, 70), (32, 16, 32), NET_3D)
    columns, _ = what.choose(budget_bytes=2**26, n_workers=3)
    seen = [block.index for column in columns.grid(what.shards) for block in what.shards.within(column.core)]
    assert sorted(seen) == list(range(len(what.shards)))


def test_more_workers_make_more_columns_and_a_larger_budget_less_tax():
    what = streaming((256, 256, 256), (64, 64, 64), NET_3D)
    few, many = (what.choose(budget_bytes=2**28, n_workers=n)[1] for n in (1, 8))
    assert few.n_columns < many.n_columns
    assert many.n_columns >= 8
    small, large = (what.choose(budget_bytes=b, n_workers=1)[1].multiply_adds for b in (2**23, 2**28))
    assert large < 0.8 * small


def test_slices_of_a_volume_are_streamed_one_by_one():
    what = streaming((30, 200, 200), (32, 64, 64), NET_2D)
    columns, _ = what.choose(budget_bytes=2**26, n_workers=1)
    assert columns.axis > 0
    assert columns.part_shape[0] == 1


def test_what_is_read_counts_whole_chunks_and_halos_inside_the_scan():
    what = streaming((64, 64), (32, 32), UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME), chunk=(16, 32))
    assert what.voxels_read(Columns(0, 2, (2, 2), (64, 64))) == 64 * 64
    halo = 8  # two 3x3 convolutions on the first level, two on the second, whose voxels are twice as wide, two more
    assert what.voxels_read(Columns(0, 2, (2, 1), (64, 32))) == 64 * 2 * (32 + halo)


MEASURE = """
import json, sys
import torch
from peaks import grown
from pipeline.config import Precision
from pipeline.unet.engines import keep_freed_memory, make_engine
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.settings import UNetSettings
from pipeline.unet.streaming import Stream

def measure(document, precision, slab, small, large, n_streams=1, n_networks=1):
    keep_freed_memory()
    networks = [UNet(UNetSettings.from_json(document)).eval().requires_grad_(False) for _ in range(n_networks)]
    engines = [make_engine(network, device="cpu", precision=Precision(precision)) for network in networks]
    network, engine = networks[0], engines[0]
    def run(shape):
        stream = Stream(*engines * (n_streams // n_networks), cross=tuple((0, n) for n in shape[1:]), slab=slab)
        across = [b - a for a, b in stream.cross]
        with torch.inference_mode():
            for _, logits in stream.run(0, shape[0], lambda a, b: engine.empty((1, 1, b - a, *across)).zero_()):
                classes_of(logits, network.settings.head)
    run(small)
    return grown(lambda: run(large))
"""
MEASURED = {
    "2-D same": (UNetSettings(dims=2, width=16, depth=4, padding=Padding.SAME, batch_norm=True), "float32", 64,
                 (64, 16), (256, 4096)),
    "2-D valid": (UNetSettings(dims=2, width=32, depth=3), "float32", 32, (64, 8), (128, 4096)),
    "3-D": (UNetSettings(dims=3, width=16, depth=3, padding=Padding.SAME), "float32", 16, (16, 8, 8), (48, 160, 160)),
    "3-D bf16": (UNetSettings(dims=3, width=8, depth=3, padding=Padding.SAME), "bf16", 8, (16, 8, 8), (32, 300, 300)),
    "3-D thick slices": (replace(THICK, width=16, batch_norm=True), "float32", 8, (8, 8, 8), (24, 200, 200)),
    "residual, strided": (UNetSettings(dims=3, width=8, depth=3, padding=Padding.SAME, batch_norm=True,
                                       block=Block.RESIDUAL, down=Down.STRIDED), "float32", 8, (8, 8, 8),
                          (32, 192, 192)),
    "attention": (UNetSettings(dims=2, width=16, depth=4, padding=Padding.SAME, batch_norm=True, attention=True),
                  "float32", 64, (64, 16), (256, 4096)),
    "U-Net++": (UNetSettings(dims=2, width=16, depth=3, padding=Padding.SAME, family=Family.NESTED,
                             deep_supervision=True), "float32", 32, (64, 16), (256, 4096)),
    "4 streams": (UNetSettings(dims=2, width=16, depth=4, padding=Padding.SAME, batch_norm=True), "float32", 64,
                  (64, 16), (192, 4096), 4),
    "3 networks": (UNetSettings(dims=3, width=16, depth=3, padding=Padding.SAME), "float32", 16, (16, 8, 8),
                   (48, 128, 128), 3, 3),
}  # fmt: skip


def measured(names, **heap):
    """Return by how many bytes memory grows in each case."""
    cases = [MEASURED[name] for name in names]
    return each_measured(MEASURE, [[network.to_json(), *others] for network, *others in cases], **heap)


@pytest.fixture(scope="module")
def all_grown():
    return dict(zip(MEASURED, measured(MEASURED), strict=True))


@pytest.mark.parametrize("name", MEASURED)
def test_the_memory_of_a_stream_is_predicted_within_15_percent(name, all_grown):
    network, precision, slab, _, large, *several = MEASURED[name]
    cross = tuple((0, n) for n in large[1:])
    schedule = schedule_of(chain_of(network), cross, in_channels=1, order=tuple(range(network.dims)), slab=slab)
    predicted = stream_bytes(schedule, itemsize=Precision(precision).itemsize, n_streams=[*several, 1][0])
    ratios = [all_grown[name] / predicted]
    if not 0.85 < ratios[0] < 1.15:  # where the heap puts a tensor differs by a tenth: it is the median that is told
        ratios += [measured([name], n_small=n_small)[0] / predicted for n_small in (1, 2)]
    print(f"measured / predicted = {ratios}")
    assert 0.85 < median(ratios) < 1.15


def test_settings_that_break_a_rule_are_refused():
    what = streaming((64, 64), (32, 32), NET_2D)
    with pytest.raises(ArgumentError, match="slab must be a multiple of the stride 8, got 12; use 16"):
        what.choose(budget_bytes=2**30, n_workers=1, slab=12)
    with pytest.raises(ArgumentError, match="a column needs 2 numbers of shards"):
        what.choose(budget_bytes=2**30, n_workers=1, blocks=(1, 1, 1))
    with pytest.raises(BudgetError, match=r"the narrowest columns need .* raise --budget"):
        what.choose(budget_bytes=1000, n_workers=1)
