from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.unet.training.course import Validation, best_of, is_best, is_over, n_cuts, rate, stalled
from pipeline.unet.training.recipe import Recipe, Schedule


def curve_of(losses):
    return [Validation(10 * n, 1.0, loss, (None,)) for n, loss in enumerate(losses, start=1)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_a_stall_is_counted_from_the_best_validation(losses, patience):
    curve = curve_of(losses)
    best = losses.index(min(losses))
    assert best_of(curve) is curve[best]
    assert stalled(curve) == len(losses) - 1 - best
    assert is_best(curve) == (stalled(curve) == 0)
    assert is_over(curve, Recipe(patience=patience)) == (stalled(curve) >= patience)
    assert not is_over(curve, Recipe())


def test_nothing_is_over_before_the_first_validation():
    assert not is_over([], Recipe(patience=1))
    assert not is_best([])
    assert n_cuts([], patience=1) == 0


@pytest.mark.parametrize(
    ("losses", "patience", "cuts"),
    [
        ([3, 2, 1], 1, [0, 0, 0]), ([1, 2, 3, 4], 1, [0, 1, 2, 3]), ([1, 2, 3, 4, 5, 6], 2, [0, 0, 1, 1, 2, 2]),
        ([2, 3, 1, 3, 3, 0, 1], 2, [0, 0, 0, 0, 1, 1, 1]), ([1, 1, 1], 2, [0, 0, 1]),
    ],
)  # fmt: skip
def test_a_plateau_is_counted_anew_after_each_cut(losses, patience, cuts):
    curve = curve_of(losses)
    assert [n_cuts(curve[:n], patience=patience) for n in range(1, len(curve) + 1)] == cuts
    plateau = Recipe(schedule=Schedule.PLATEAU, plateau_patience=patience, learning_rate=0.4)
    assert rate(plateau, 0.9, step=9, curve=curve) == 0.4 * 0.5 ** cuts[-1]


def test_the_rate_falls_from_all_to_nothing():
    constant, cosine, poly = (
        Recipe(learning_rate=0.4, schedule=each) for each in (Schedule.CONSTANT, Schedule.COSINE, Schedule.POLY)
    )
    assert [rate(cosine, done, step=9) for done in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.4, 0.2, 0, 0])
    assert rate(constant, 0.7, step=9) == 0.4
    assert [rate(poly, done, step=9) for done in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.4, 0.4 * 0.5**0.9, 0, 0])
    slow = replace(constant, warm_up_steps=3)
    assert [rate(slow, 0, step=step) for step in (1, 2, 3, 4, 5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
