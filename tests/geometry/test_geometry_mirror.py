from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import mirror_index, read_mirrored


class Spy:
    """An array that remembers what was read of it."""

    def __init__(self, array):
        self.array, self.shape, self.reads = array, array.shape, []

    def __getitem__(self, index):
        self.reads.append(index)
        return self.array[index]


@st.composite
def reads(draw):
    """Return an array with 0 or 1 axes in front of its 1 to 3 spatial ones, and a box anywhere around it."""
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3))))
    front = draw(st.sampled_from([(), (1,), (3,)]))
    bounds = [sorted((draw(st.integers(-20, n + 20)), draw(st.integers(-20, n + 20)))) for n in shape]
    box = Box(tuple(a for a, _ in bounds), tuple(b + (a == b) for a, b in bounds))
    array = np.arange(np.prod(front + shape), dtype=draw(st.sampled_from(["u2", "f4", "i8"]))).reshape(front + shape)
    return array, box


def padded(array, box):
    """Return the voxels of the box from numpy's own reflection of the whole array; an axis of one voxel repeats it."""
    for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True), start=array.ndim - box.ndim):
        n = array.shape[axis]
        before, after = max(0, -a), max(0, b - n)
        width = [(0, 0)] * array.ndim
        width[axis] = (before, after)
        array = np.pad(array, width, mode="reflect" if n > 1 else "edge")
        array = array.take(range(a + before, b + before), axis=axis)
    return array


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_a_mirrored_index_is_numpys_reflection(size, before, after):
    mode = "reflect" if size > 1 else "edge"
    expected = np.pad(np.arange(size), (before, after), mode=mode)
    np.testing.assert_array_equal(mirror_index(-before, size + after, size), expected)


@given(st.integers(1, 9), st.integers(-60, 60), st.integers(0, 30))
def test_a_part_of_a_mirrored_index_is_the_same_part_of_all_of_it(size, start, length):
    everything = mirror_index(-60, 90, size)
    np.testing.assert_array_equal(mirror_index(start, start + length, size), everything[start + 60 :][:length])


def test_the_edge_voxel_is_not_repeated():
    np.testing.assert_array_equal(mirror_index(-2, 7, 4), [2, 1, 0, 1, 2, 3, 2, 1, 0])


@given(reads())
def test_a_mirrored_read_is_a_box_of_numpys_reflection(read):
    array, box = read
    voxels = read_mirrored(array, box)
    np.testing.assert_array_equal(voxels, padded(array, box))
    assert voxels.dtype == array.dtype
    assert voxels.shape == array.shape[: array.ndim - box.ndim] + box.shape


@given(reads())
def test_only_what_is_shown_is_read_in_one_read(read):
    array, box = read
    spy = Spy(array)
    voxels = read_mirrored(spy, box)
    (index,) = spy.reads
    n_front = array.ndim - box.ndim
    assert index[:n_front] == (slice(None),) * n_front
    numbers = np.arange(array.size).reshape(array.shape)
    shown = np.unravel_index(np.unique(padded(numbers, box)), array.shape)
    for axis in range(n_front, array.ndim):
        assert (index[axis].start, index[axis].stop) == (shown[axis].min(), shown[axis].max() + 1)
    assert voxels.size == box.n_voxels * np.prod(array.shape[:n_front], dtype=int)


@pytest.mark.parametrize("start", [-30, -7, 6, 31])
def test_a_box_wholly_outside_the_volume_shows_its_mirror_image(start):
    array = np.arange(6 * 5).reshape(6, 5)
    box = Box((start, start), (start + 4, start + 4))
    everything = np.pad(array, 60, mode="reflect")
    np.testing.assert_array_equal(read_mirrored(array, box), everything[box.shift((60, 60)).slices])


def test_a_single_voxel_is_everywhere():
    np.testing.assert_array_equal(read_mirrored(np.array([[7]]), Box((-5, -5), (5, 6))), np.full((10, 11), 7))


def test_a_read_inside_the_volume_is_that_of_the_array():
    array = np.arange(24).reshape(2, 3, 4)
    spy = Spy(array)
    np.testing.assert_array_equal(read_mirrored(spy, Box((1, 0), (3, 2))), array[:, 1:3, 0:2])
    assert spy.reads == [(slice(None), slice(1, 3), slice(0, 2))]
