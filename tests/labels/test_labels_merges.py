import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.labels.merges import sets_of, touching

N = 40
PAIRS = st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)), max_size=60)


def smallest_of_sets(pairs, n):
    """Return the smallest member of each one's set, by SciPy's graphs."""
    a, b = np.array(pairs, int).reshape(-1, 2).T
    _, sets = connected_components(coo_array((np.ones(len(a)), (a, b)), (n, n)), directed=False)
    return np.array([np.flatnonzero(sets == each)[0] for each in sets])


@given(PAIRS)
def test_sets_are_those_of_scipy(pairs):
    found = sets_of(np.array(pairs, np.int64).reshape(-1, 2), N)
    np.testing.assert_array_equal(found, smallest_of_sets(pairs, N))


def test_a_chain_a_star_and_a_comb_are_each_one_set_in_few_rounds(monkeypatch):
    n, rounds, unhooked = 2**12, [], np.minimum
    order = np.random.default_rng(0).permutation(n)
    chain = np.stack([order[1:], order[:-1]], axis=1)
    star = np.stack([np.arange(n - 1), np.full(n - 1, n - 1)], axis=1)
    comb = np.stack([np.arange(1, n), np.maximum(0, np.arange(1, n) - 1 - np.arange(1, n) % 3)], axis=1)

    class Counted:
        """numpy's minimum, which counts the rounds."""

        def __call__(self, *args):
            return unhooked(*args)

        def at(self, *args):
            rounds.append(1)
            unhooked.at(*args)

    monkeypatch.setattr(np, "minimum", Counted())
    for pairs in (chain, chain[::-1], np.sort(chain, axis=1), star, comb):
        rounds.clear()
        assert (sets_of(pairs, n) == 0).all()
        assert len(rounds) <= 2 * 12


@given(st.integers(0, 2**32 - 1))
def test_components_touch_where_both_planes_have_one_and_both_are_of_one_class(seed):
    rng = np.random.default_rng(seed)
    before, behind = rng.integers(0, 5, (5, 6)).astype(np.uint16), rng.integers(0, 5, (5, 6)).astype(np.uint32)
    classes_before, classes_behind = rng.integers(1, 3, (2, 4)).astype(np.uint8)
    expected = {
        (int(a), int(b)) for a, b in zip(before.ravel(), behind.ravel(), strict=True)
        if a and b and classes_before[a - 1] == classes_behind[b - 1]
    }  # fmt: skip
    found = touching(before, behind, classes_before=classes_before, classes_behind=classes_behind)
    assert [tuple(pair) for pair in found.tolist()] == sorted(expected)


def test_nothing_touches_where_a_side_has_no_component():
    none, some = np.zeros((3, 3), np.uint16), np.ones((3, 3), np.uint16)
    of_none, of_some = np.zeros(0, np.uint8), np.ones(1, np.uint8)
    assert touching(none, some, classes_before=of_none, classes_behind=of_some).shape == (0, 2)
    assert touching(some, none, classes_before=of_some, classes_behind=of_none).shape == (0, 2)
    assert sets_of(np.zeros((0, 2), np.int64), 0).shape == (0,)
