from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import block_reduce

from pipeline.store.ngff import pyramid_levels
from pipeline.store.pyramid import Downsampling, downsample


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_means_equal_scikit_image(dtype):
    voxels = np.random.default_rng(0).integers(0, 200, (2, 20, 31, 16)).astype(dtype)
    padded = np.pad(voxels, [(0, 0), (0, 0), (0, 1), (0, 0)], mode="edge")
    exact = block_reduce(padded.astype(np.float64), (1, 1, 2, 2), np.mean)
    got = downsample(voxels, (1, 2, 2), Downsampling.MEAN)
    np.testing.assert_array_equal(got, (np.rint(exact) if np.dtype(dtype).kind == "u" else exact).astype(dtype))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint64])
@pytest.mark.parametrize("factors", [(1, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_means_of_integers_are_rounded_half_to_even_also_at_both_ends(dtype, factors):
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype=np.float64)
    ends = np.clip(ends, -(2.0**40), 2.0**40)
    few = np.array([ends[0], ends[0] + 1, -1 if ends[0] else 1, 0, 1, 2, ends[1] - 1, ends[1]])
    voxels = np.random.default_rng(0).choice(few, (4, 30, 22)).astype(dtype)
    exact = block_reduce(voxels.astype(np.float64), factors, np.mean)
    got = downsample(voxels, factors, Downsampling.MEAN)
    np.testing.assert_array_equal(got, np.rint(exact).astype(dtype))
    assert (exact % 1 == 0.5).any()


@given(
    st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.sampled_from([1, 2])] * 3),
    st.sampled_from([(np.uint64, [0, 3, 2**40]), (np.uint8, [0, 7, 255]), (np.int16, [-5, 0, 9]), (np.bool_, [0, 1])]),
)
@settings(deadline=None)
def test_modes_are_the_most_frequent_label_the_smallest_of_equals(seed, shape, factors, kind):
    dtype, few = kind
    labels = np.random.default_rng(seed).choice(np.array(few, dtype=dtype), shape)
    got = downsample(labels, factors, Downsampling.MODE)
    assert got.dtype == dtype
    for cell in product(*(range(n) for n in got.shape)):
        under = labels[tuple(slice(c * f, c * f + f) for c, f in zip(cell, factors, strict=True))]
        padded = np.pad(under, [(0, f - n) for f, n in zip(factors, under.shape, strict=True)], mode="edge")
        values, counts = np.unique(padded, return_counts=True)
        assert got[cell] == values[counts.argmax()]


@given(st.lists(st.integers(1, 10**5), min_size=2, max_size=3), st.sampled_from([1.0, 2.5, 10.0]))
def test_levels_cover_the_scan_and_halve_until_small(shape, anisotropy):
    size = (anisotropy, *(1.0,) * (len(shape) - 1))
    levels = pyramid_levels(tuple(shape), size)
    assert max(levels[-1].shape) <= 256
    for upper, lower in pairwise(levels):
        for n, m, s, t in zip(upper.shape, lower.shape, upper.scale, lower.scale, strict=True):
            assert t / s in (1, 2)
            assert n <= m * t / s < n + t / s


def test_anisotropic_volumes_become_isotropic_on_the_way_down():
    levels = pyramid_levels((100, 4000, 4000), (8.0, 1.0, 1.0))
    assert [level.shape[0] for level in levels] == [100, 100, 100, 100, 50]
    assert levels[-1].shape == (50, 250, 250)
