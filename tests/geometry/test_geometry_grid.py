from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.grid import BlockGrid


@st.composite
def grids(draw):
    """Return grids over 1 to 3 axes, with cores, halos and strides of any relation to the volume."""
    axes = draw(st.integers(1, 3))
    per_axis = [
        (
            draw(st.integers(1, 12)),
            draw(st.integers(1, 4)) * (align := draw(st.integers(1, 4))),
            draw(st.integers(0, 20)),
            align,
        )
        for _ in range(axes)
    ]
    return BlockGrid(*map(tuple, zip(*per_axis, strict=True)))


@given(grids())
def test_every_voxel_lies_in_exactly_one_core(grid):
    times = np.zeros(grid.shape, dtype=int)
    for block in grid:
        assert block.core.n_voxels > 0
        times[block.core.slices] += 1
    assert (times == 1).all()


@given(grids())
def test_a_tile_is_its_core_rounded_up_to_the_stride_with_the_halo_around_it(grid):
    for block in grid:
        assert block.core == block.core.clip(grid.shape)
        for axis, (halo, align) in enumerate(zip(grid.halo, grid.align, strict=True)):
            start, stop = block.core.start[axis], block.core.stop[axis]
            assert start % align == 0
            assert block.tile.start[axis] == start - halo
            inner = block.tile.shape[axis] - 2 * halo
            assert inner % align == 0
            assert stop - start <= inner < stop - start + align
            assert inner <= grid.core_shape[axis]


@given(grids())
def test_blocks_are_numbered_in_row_major_order_there_and_back(grid):
    assert len(list(grid)) == len(grid)
    for index, (block, position) in enumerate(zip(grid, np.ndindex(grid.grid_shape), strict=True)):
        assert (block.index, block.position) == (index, position)
        assert grid.index_of(block.position) == index
        assert grid.block(index) == block
        assert block.core.start == tuple(np.multiply(position, grid.core_shape).tolist())


def test_a_grid_of_a_million_blocks_costs_nothing_to_make():
    grid = BlockGrid((10**6, 10**6, 10**6), (64, 64, 64), (46, 46, 46), (8, 8, 8))
    assert len(grid) == 15625**3
    last = grid.block(len(grid) - 1)
    assert last.core.stop == grid.shape
    assert next(iter(grid)).index == 0


def test_halo_and_stride_are_none_by_default():
    grid = BlockGrid((5, 6), (4, 4))
    assert (grid.halo, grid.align) == ((0, 0), (1, 1))
    assert grid.block(3).tile == grid.block(3).core


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockGrid((9, 9), (4,)), r"^shape, core, halo and align need one number per axis, got "),
        (lambda: BlockGrid((9,), (4,), (1, 1)), r"^shape, core, halo and align need one number per axis, got "),
        (lambda: BlockGrid((0,), (4,)), r"^sizes must be at least 1 and halos at least 0, got "),
        (lambda: BlockGrid((9,), (4,), (-1,)), r"^sizes must be at least 1 and halos at least 0, got "),
        (lambda: BlockGrid((9,), (388,), align=(16,)), r"^core must be a multiple of the stride 16, got 388; use 384"),
        (lambda: BlockGrid((9,), (3,), align=(16,)), r"^core must be a multiple of the stride 16, got 3; use 16$"),
        (lambda: BlockGrid((9,), (4,)).block(3), r"^block index must be in 0\.\.2, got 3$"),
        (lambda: BlockGrid((9,), (4,)).block(-1), r"^block index must be in 0\.\.2, got -1$"),
    ],
)
def test_what_is_no_grid_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
