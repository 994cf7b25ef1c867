"""Gaps between instances and the weights around them, against brute force and SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree

from pipeline.geometry.box import Box
from pipeline.unet.training.borders import REACH, Borders, Separated, in_memory, separated, sum_of_two


def blobs(shape, *, seed, n=5):
    """Return instances that touch here and there: the nearest of some random seeds, as far as its radius reaches."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    far = np.stack([np.sqrt(((grid - rng.uniform(0, shape)) ** 2).sum(-1)) for _ in range(n)])
    ids = rng.choice(np.arange(1, 100), n, replace=False)[far.argmin(axis=0)]
    return np.where(far.min(axis=0) < rng.uniform(2, 4), ids, 0)


def gaps_by_brute_force(ids, axes):
    out = np.zeros(ids.shape, int)
    for at in np.ndindex(*ids.shape):
        around = tuple(slice(max(0, a - 1), a + 2) if axis in axes else a for axis, a in enumerate(at))
        out[at] = ids[at] != 0 and not (set(np.unique(ids[around])) - {0, ids[at]})
    return out


def weights_by_brute_force(ids, axes, spacing, highest, sigma):
    inside = gaps_by_brute_force(ids, axes) == 1
    out = np.zeros(ids.shape)
    places = {i: np.argwhere(inside & (ids == i)) for i in np.unique(ids[inside])}
    across = [axis for axis in range(ids.ndim) if axis not in axes]
    for at in np.argwhere(~inside):
        nearest = []
        for where in places.values():
            same = where[(where[:, across] == at[across]).all(axis=1)]
            if len(same):
                nearest.append(np.sqrt((((same - at) * spacing) ** 2).sum(axis=1)).min())
        if len(nearest) > 1 and (total := sum(sorted(nearest)[:2])) <= REACH * sigma:
            out[tuple(at)] = highest * np.exp(-(total**2) / (2 * sigma**2))
    return out


CASES = [
    ((14, 15), (0, 1), (1.0, 1.0), 5.0), ((14, 15), (0, 1), (2.5, 1.0), 2.0),
    ((7, 9, 8), (0, 1, 2), (1.0, 1.0, 1.0), 2.0), ((6, 9, 8), (0, 1, 2), (4.0, 1.0, 1.0), 2.0),
    ((3, 11, 12), (1, 2), (9.0, 1.0, 1.0), 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "axes", "spacing", "sigma"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_papers_formula(shape, axes, spacing, sigma, seed):
    ids = blobs(shape, seed=seed)
    got = in_memory(Borders(ids, axes, spacing, 10.0, sigma))
    assert got.dtype == np.float32
    expected = weights_by_brute_force(ids, axes, spacing, 10.0, sigma)
    assert expected.max() > 0.1
    assert np.allclose(got, expected, atol=1e-4)


def test_distances_are_scipys():
    ids = blobs((40, 50), seed=1, n=9)
    each = np.stack([ndimage.distance_transform_edt(ids != i, sampling=(2.0, 1.0)) for i in np.unique(ids[ids > 0])])
    two = np.sort(each, axis=0)[:2].sum(axis=0)
    assert np.allclose(sum_of_two(ids, reach=(40, 50), spacing=(2.0, 1.0)), two, atol=1e-4)


@pytest.mark.parametrize(("shape", "axes"), [((12, 13), (0, 1)), ((5, 8, 9), (0, 1, 2)), ((4, 9, 9), (1, 2))])
def test_gaps_are_where_another_instance_is_a_neighbour(shape, axes):
    ids = blobs(shape, seed=3, n=7)
    got = separated(ids, axes=axes)
    assert np.array_equal(got, gaps_by_brute_force(ids, axes))
    assert (got != (ids != 0)).any()
    lonely = np.where(ids == np.unique(ids)[1], ids, 0)
    assert np.array_equal(separated(lonely, axes=axes), lonely != 0)  # one alone keeps its border


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_is_that_part_of_the_whole(data):
    shape = data.draw(st.sampled_from([(30, 33), (9, 14, 15)]))
    n = len(shape)
    ids = blobs(shape, seed=data.draw(st.integers(0, 9)), n=8)
    start = tuple(data.draw(st.integers(0, k - 1)) for k in shape)
    box = Box(start, tuple(data.draw(st.integers(a + 1, k)) for a, k in zip(start, shape, strict=True)))
    axes, spacing = tuple(range(n)), (2.6, *(1.0,) * (n - 1))  # a reach of one slice: the gap needs one more
    for computed in (Separated(ids, axes, ignore=99), Borders(ids, axes, spacing, 10.0, 1.2, ignore=99)):
        whole = computed[tuple(slice(0, k) for k in shape)]
        assert np.array_equal(computed[box.slices], whole[box.slices])


def test_unlabelled_voxels_are_neither_instances_nor_background():
    ids = np.array([[1, 1, 9, 2, 2, 0, 9]])
    assert separated(ids, axes=(0, 1), ignore=9).tolist() == [[1, 1, -1, 1, 1, 0, -1]]
    weights = Borders(ids, (0, 1), (1.0, 1.0), 10.0, 5.0, ignore=9)[:, :]
    assert weights[0, 2] == pytest.approx(10 * np.exp(-4 / 50))
    assert weights[0, 0] == 0


@pytest.mark.parametrize(("shape", "axes"), [((9, 10, 11), (0, 1, 2)), ((6, 12, 13), (1, 2)), ((14, 15), (0, 1))])
def test_beside_a_gap_and_what_nobody_has_labelled_nobody_knows(shape, axes):
    whole = blobs(shape, seed=6, n=12)
    lines = np.random.default_rng(1).random(shape[:2]) < 0.3
    labels = np.where(lines[(..., *(None,) * (len(shape) - 2))], whole, 999)
    seen, expected = gaps_by_brute_force(np.where(labels == 999, 0, labels), axes), np.full(shape, -1)
    gaps = (labels != 0) & (labels != 999) & (seen == 0)
    for at in np.argwhere(labels != 999):
        around = tuple(slice(max(0, a - 1), a + 2) if axis in axes else a for axis, a in enumerate(at))
        known = not (seen[tuple(at)] and gaps[around].any() and (labels[around] == 999).any())
        expected[tuple(at)] = seen[tuple(at)] if known else -1
    got = in_memory(Separated(labels, axes, ignore=999))
    assert np.array_equal(got, expected)
    assert ((got < 0) & (labels != 999)).any()
    assert np.array_equal(in_memory(Separated(whole, axes, ignore=999)), in_memory(Separated(whole, axes)))


def test_single_slices_of_a_volume_of_cells_show_hardly_a_gap_as_inside():
    rng, shape = np.random.default_rng(0), (40, 60, 60)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    cells = cKDTree(rng.uniform(0, shape[1], (120, 3))).query(grid)[1] + 1
    labels = np.where(np.arange(40)[:, None, None] % 10, 0x7FFF, cells)
    full = separated(cells, axes=(0, 1, 2))
    plain, careful = separated(labels, axes=(0, 1, 2), ignore=0x7FFF), Separated(labels, (0, 1, 2), 0x7FFF)[:, :, :]
    wrong = [float((full[known == 1] == 0).mean()) for known in (plain, careful)]
    assert (full[careful == 0] == 0).all()
    assert wrong[0] > 0.08
    assert wrong[1] < 0.03


def test_one_instance_or_none_has_no_border():
    for ids in (np.zeros((5, 6), int), np.ones((5, 6), int), np.eye(6, dtype=int)):
        assert (in_memory(Borders(ids, (0, 1), (1.0, 1.0), 10.0, 5.0)) == 0).all()


def test_blocks_make_the_whole(monkeypatch):
    ids = blobs((30, 31), seed=2, n=9)
    borders = Borders(ids, (0, 1), (1.0, 1.0), 10.0, 2.0)
    whole = in_memory(borders)
    monkeypatch.setattr("pipeline.unet.training.borders._BLOCK_VOXELS", 49)
    assert np.array_equal(in_memory(borders), whole)
