from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box

SIDE = 9


@st.composite
def boxes(draw, ndim=2, least=-4):
    bounds = [sorted((draw(st.integers(least, SIDE + 4)), draw(st.integers(least, SIDE + 4)))) for _ in range(ndim)]
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def voxels(box: Box) -> set[tuple[int, ...]]:
    """Return the voxels of a box, the oracle: sets know what an intersection is."""
    grid = np.indices(box.shape).reshape(box.ndim, -1).T + np.array(box.start)
    return set(map(tuple, grid.tolist()))


@given(boxes())
def test_a_box_has_as_many_voxels_as_it_says(box):
    assert len(voxels(box)) == box.n_voxels
    assert box.n_voxels == np.prod(box.shape)


@given(boxes(), boxes())
def test_an_intersection_holds_the_voxels_of_both(one, other):
    assert voxels(one.intersect(other)) == voxels(one) & voxels(other)


@given(boxes())
def test_a_clipped_box_holds_the_voxels_in_the_volume(box):
    assert voxels(box.clip((SIDE, SIDE))) == voxels(box) & voxels(Box.whole((SIDE, SIDE)))


@given(boxes(least=0))
def test_slices_cut_out_the_voxels(box):
    volume = np.zeros((SIDE + 4, SIDE + 4), dtype=bool)
    volume[box.slices] = True
    assert set(map(tuple, np.argwhere(volume).tolist())) == voxels(box)


@given(boxes(), st.tuples(st.integers(-5, 5), st.integers(-5, 5)))
def test_a_shifted_box_holds_the_shifted_voxels(box, offset):
    assert voxels(box.shift(offset)) == {tuple(np.add(at, offset).tolist()) for at in voxels(box)}


@given(boxes(), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_a_grown_box_holds_what_is_within_the_halo(box, halo):
    assume(box.n_voxels)
    reached = {
        (z + dz, y + dy)
        for z, y in voxels(box)
        for dz in range(-halo[0], halo[0] + 1)
        for dy in range(-halo[1], halo[1] + 1)
    }
    assert voxels(box.grow(halo)) == reached


@given(boxes(), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_a_rounded_box_is_the_smallest_of_whole_strides_from_the_same_start(box, stride):
    rounded = box.round_up(stride)
    assert rounded.start == box.start
    for n, of, s in zip(rounded.shape, box.shape, stride, strict=True):
        assert n % s == 0
        assert of <= n < of + s


def test_a_box_starts_before_it_stops():
    with pytest.raises(ArgumentError, match=r"^a box starts before it stops on every axis, got \(0, 3\) to \(1, 2\)$"):
        Box((0, 3), (1, 2))
    with pytest.raises(ArgumentError, match=r"^a box starts before it stops on every axis, got \(0,\) to \(1, 2\)$"):
        Box((0,), (1, 2))


def test_a_box_outside_the_volume_has_no_slices():
    with pytest.raises(ArgumentError, match=r"has no slices, got Box\(start=\(-1,\), stop=\(2,\)\); clip it or"):
        _ = Box((-1,), (2,)).slices
