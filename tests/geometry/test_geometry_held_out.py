import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.held_out import split

FIFTH = 0.2


def occurrences(*planes_of_each_class, n):
    return np.stack([np.isin(np.arange(n), planes) * 10 for planes in planes_of_each_class])


@given(st.data())
@settings(max_examples=100)
def test_every_voxel_is_learnt_or_held_out_once(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).filter(lambda each: max(each) > 1)))
    n = next(n for n in shape if n > 1)
    found = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=3))
    learnt, held = split(shape, fraction=data.draw(st.floats(0, 1)), occurrences=np.array(found, np.int64))
    times = np.zeros(shape, int)
    for box in (*learnt, *held):
        times[box.slices] += 1
    assert (times == 1).all()
    assert learnt
    assert held


def test_the_last_planes_are_held_out_where_they_show_every_class():
    learnt, held = split((1, 20, 7), fraction=FIFTH, occurrences=occurrences(range(20), [2, 18], n=20))
    assert [box.start for box in (*learnt, *held)] == [(0, 0, 0), (0, 16, 0)]
    assert split((20, 7), fraction=FIFTH)[1][0].start == (16, 0)


@pytest.mark.parametrize(("organ", "begin"), [
    (range(4, 14), (2, 12)), ([9], range(20)), ([3, 15], range(20)), (range(16, 20), range(13, 19)),
])  # fmt: skip
def test_planes_that_show_a_class_to_both_are_held_out_where_there_are_any(organ, begin):
    learnt, (held,) = split((20, 7), fraction=FIFTH, occurrences=occurrences(range(20), list(organ), n=20))
    assert held.shape == (4, 7)
    assert held.start[0] in begin
    shown = [sum(box.start[0] <= plane < box.stop[0] for plane in organ) for box in (*learnt, held)]
    if len(organ) > 1:
        assert min(shown[-1], sum(shown[:-1])) > 0


def test_no_plane_can_be_held_out_of_one_voxel():
    with pytest.raises(ArgumentError, match="an image must have two voxels at least"):
        split((1, 1), fraction=FIFTH)
