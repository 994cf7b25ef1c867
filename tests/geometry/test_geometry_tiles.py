from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.tiles import TileRule

RULES = [TileRule((s,) * 2, (h,) * 2, (t,) * 2) for s, h, t in ((2, 8, 0), (4, 20, 0), (8, 46, 2), (16, 94, 2))]


@st.composite
def cuts(draw):
    """Return a rule, the shape of a region and the largest core, over 1 to 3 axes."""
    per_axis = [
        (
            stride := draw(st.integers(1, 5)),
            draw(st.integers(0, 9)),
            draw(st.integers(0, 2)),
            draw(st.integers(1, 20)),
            stride * draw(st.integers(1, 5)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    stride, halo, trim, shape, core = map(tuple, zip(*per_axis, strict=True))
    return TileRule(stride, halo, trim), shape, core


@given(cuts())
def test_cores_cover_a_region_exactly_once(cut):
    rule, shape, largest = cut
    times = np.zeros(shape, dtype=int)
    for core in rule.cores(shape, largest):
        times[core.slices] += 1
    assert (times == 1).all()


@given(cuts())
def test_cores_are_aligned_and_no_larger_than_asked(cut):
    rule, shape, largest = cut
    for core in rule.cores(shape, largest):
        for a, b, s, c, n in zip(core.start, core.stop, rule.stride, largest, shape, strict=True):
            assert a % s == 0
            assert b % s == 0 or b == n
            assert 0 < b - a <= c


@given(cuts())
def test_no_fewer_cores_would_do_and_none_is_much_smaller(cut):
    rule, shape, largest = cut
    starts = [sorted({core.start[axis] for core in rule.cores(shape, largest)}) for axis in range(len(shape))]
    for at, n, c, s in zip(starts, shape, largest, rule.stride, strict=True):
        assert len(at) <= -(-n // c)
        assert len(set(np.diff([*at, at[-1] + (at[1] - at[0] if len(at) > 1 else s)]))) == 1


def test_sizes_are_balanced():
    assert [core.shape for core in TileRule((16,), (94,), (2,)).cores((128,), (96,))] == [(64,), (64,)]


@given(cuts(), st.data())
def test_the_core_of_the_tile_of_a_core_is_that_core(cut, data):
    rule, _, _ = cut
    core = tuple(s * data.draw(st.integers(1, 9)) for s in rule.stride)
    tile = rule.tile_shape(core)
    assert rule.core_shape(tile) == core
    assert rule.tile_shape(rule.core_shape(tile)) == tile


@given(cuts())
def test_a_core_that_is_no_multiple_of_the_stride_gets_the_tile_of_the_next_one(cut):
    rule, shape, _ = cut
    core = rule.core_shape(rule.tile_shape(shape))
    for c, n, s in zip(core, shape, rule.stride, strict=True):
        assert n <= c < n + s


@pytest.mark.parametrize("rule", RULES)
@given(tile=st.integers(1, 700))
def test_a_tile_is_accepted_or_the_sizes_next_to_it_are_named(rule, tile):
    try:
        core = rule.core_shape((tile, tile))
    except ArgumentError as error:
        named = [int(n) for n in str(error).partition("; use ")[2].split(" or ")]
        accepted = [rule.core_shape((n, n)) for n in named]
        assert accepted
        assert all(abs(n - tile) < rule.stride[0] or n == 2 * rule.halo[0] + rule.stride[0] for n in named)
    else:
        assert core[0] % rule.stride[0] == 0
        assert core[0] == tile - 2 * rule.halo[0] > 0


def test_the_famous_tile_of_572_is_refused_with_its_neighbours():
    with pytest.raises(ArgumentError, match=r"the halo 94 and a multiple of the stride 16, got 580; use 572 or 588"):
        TileRule((16, 16), (94, 94), (2, 2)).core_shape((572, 580))


def test_a_rule_over_slices_takes_them_one_by_one():
    rule = TileRule((8, 8), (46, 46), (2, 2)).over_slices()
    assert rule == TileRule((1, 8, 8), (0, 46, 46), (0, 2, 2))
    assert rule.ndim == 3
    assert rule.tile_shape((1, 64, 64)) == (1, 156, 156)
    seen_with_two_more_on_each_side = TileRule((8, 8), (46, 46), (2, 2)).over_slices(2)
    assert seen_with_two_more_on_each_side == TileRule((1, 8, 8), (2, 46, 46), (0, 2, 2))
    assert seen_with_two_more_on_each_side.tile_shape((3, 64, 64)) == (7, 156, 156)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2,), (1, 1), (0,)), r"^stride, halo and trim need one number per axis, got "),
        (((0,), (1,), (0,)), r"^strides must be at least 1, halos and trims at least 0, got "),
        (((2,), (-1,), (0,)), r"^strides must be at least 1, halos and trims at least 0, got "),
        (((2,), (1,), (-1,)), r"^strides must be at least 1, halos and trims at least 0, got "),
    ],
)
def test_what_is_no_rule_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        TileRule(*arguments)
