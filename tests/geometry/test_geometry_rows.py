"""MirroredRows: what np.pad(reflect) shows, each voxel inside the scan read once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.geometry.rows import MirroredRows


class Counting:
    """An array that counts how often each voxel is read."""

    def __init__(self, voxels):
        self.voxels, self.times = voxels, np.zeros(voxels.shape, int)
        self.shape = voxels.shape

    def __getitem__(self, index):
        self.times[index] += 1
        return self.voxels[index]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_those_of_the_mirrored_volume_and_none_is_read_twice(data):
    shape = tuple(data.draw(st.integers(1, 30)) for _ in range(data.draw(st.integers(1, 3))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    step, slab = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    start = [data.draw(st.integers(-n - 3, n - 1)) for n in shape]
    stop = [data.draw(st.integers(max(a + 1, 1), 2 * n + 3)) for a, n in zip(start, shape, strict=True)]
    array = Counting(np.arange(2 * np.prod(shape)).reshape(2, *shape))
    column = Box(tuple(start), tuple(stop))
    rows = MirroredRows(array, axis=axis, column=column, step=step, keep_all=data.draw(st.booleans()))
    for low in range(start[axis], stop[axis], slab):
        high = min(low + slab, stop[axis])
        box = Box((*start[:axis], low, *start[axis + 1 :]), (*stop[:axis], high, *stop[axis + 1 :]))
        np.testing.assert_array_equal(rows(low, high), read_mirrored(array.voxels, box))
    assert array.times.max() <= 1


def test_rows_that_are_not_shown_again_are_forgotten():
    voxels = np.arange(1000).reshape(1, 100, 10)
    rows = MirroredRows(voxels, axis=0, column=Box((-10, 0), (110, 10)), step=10)
    most = 0
    for low in range(-10, 110, 5):
        rows(low, low + 5)
        most = max(most, len(rows._pieces))
    assert most <= 3
    assert rows.n_voxels_read == 1000
