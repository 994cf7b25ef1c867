from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import checkerboard, snake, whole

from pipeline.compute.watch import UNWATCHED
from pipeline.geometry.grid import BlockGrid
from pipeline.joining import join
from pipeline.labels.components import components
from pipeline.store.location import Location
from pipeline.works.components import Records

SHAPES = st.lists(st.integers(1, 8), min_size=2, max_size=3).map(tuple)
VOLUMES = SHAPES.flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.tuples(*(st.integers(1, n) for n in shape)), st.sampled_from((0.2, 0.45, 0.7)),
        st.integers(0, 2**32 - 1), st.integers(1, 4),
    )
)  # fmt: skip


def blockwise(voxels, block, *, min_voxels=1):
    """Return the instances of a volume whose blocks were looked at one by one, and how many there are."""
    grid, found, records = BlockGrid(voxels.shape, tuple(block)), {}, Records(Location(f"memory://{uuid4().hex}"))
    for each in reversed(list(grid)):  # in any order
        found[each.index] = components(voxels[each.core.slices])
        records.put(each, found[each.index], grid)
    n = join(records, grid, min_voxels=min_voxels, watch=UNWATCHED)
    instances = np.zeros(voxels.shape, np.uint64)
    for each in grid:
        instances[each.core.slices] = records.table(each.index)[found[each.index].ids]
    records.folder.delete()
    return instances, n


@settings(deadline=None, max_examples=100)
@given(VOLUMES)
def test_instances_are_those_of_the_whole_volume_at_once_whatever_the_blocks(volume):
    shape, block, density, seed, min_voxels = volume
    voxels = np.random.default_rng(seed).choice(3, shape, p=(1 - density, density * 0.8, density * 0.2))
    voxels = voxels.astype(np.uint8)
    expected = whole(voxels, (1, 2), min_voxels=min_voxels)
    instances, n = blockwise(voxels, block, min_voxels=min_voxels)
    np.testing.assert_array_equal(instances, expected)
    assert n == expected.max(initial=0)


WINDING = {"2-D": ((13, 11), (3, 4)), "3-D": ((9, 7, 11), (2, 3, 4)), "rows": ((9, 9, 9), (1, 9, 9))}


@pytest.mark.parametrize(("shape", "block"), WINDING.values(), ids=WINDING)
def test_a_snake_through_all_blocks_is_one_and_a_checkerboard_none_but_single_voxels(shape, block):
    winding = snake(shape)
    assert len({each.index for each in BlockGrid(shape, block) if winding[each.core.slices].any()}) == len(
        BlockGrid(shape, block)
    )
    instances, n = blockwise(winding, block)
    assert (n, instances.sum()) == (1, winding.sum())
    board = checkerboard(shape)
    instances, n = blockwise(board, block)
    assert n == board.sum()
    np.testing.assert_array_equal(instances[board == 1], 1 + np.arange(n))
    assert blockwise(board, block, min_voxels=2)[1] == 0
    ones, zeros = np.ones(shape, np.uint8), np.zeros(shape, np.uint8)
    np.testing.assert_array_equal(blockwise(ones, block, min_voxels=ones.size)[0], ones)
    assert blockwise(ones, block, min_voxels=ones.size + 1)[1] == 0
    assert blockwise(zeros, block)[1] == 0
