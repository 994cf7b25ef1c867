import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.errors import ScanError
from pipeline.store.statistics import ChannelStatistics, Histogram, merge

SMALL_INTEGERS = st.sampled_from([np.uint8, np.int8, np.uint16, np.int16])


@given(hnp.arrays(SMALL_INTEGERS, hnp.array_shapes(max_side=20)), st.randoms())
@settings(deadline=None)
def test_small_integers_are_exact_however_they_are_cut(voxels, random):
    parts = [p for p in np.array_split(voxels.ravel(), random.randint(1, 5)) if p.size]
    random.shuffle(parts)
    (got,) = merge((Histogram.of(part),) for part in parts)
    assert (got.count, got.minimum, got.maximum) == (voxels.size, voxels.min(), voxels.max())
    assert got.mean == pytest.approx(voxels.mean(dtype=np.float64), rel=1e-12, abs=1e-12)
    assert got.std == pytest.approx(voxels.std(dtype=np.float64), rel=1e-9, abs=1e-9)
    for p, value in got.percentiles:
        assert value == np.percentile(voxels, p, method="inverted_cdf")


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e3])
def test_floats_are_within_their_bins_and_do_not_cancel(offset):
    voxels = np.random.default_rng(1).normal(offset, 5.0, 100_000).astype(np.float32)
    (got,) = merge((Histogram.of(part),) for part in np.array_split(voxels, 7))
    assert got.mean == pytest.approx(voxels.mean(dtype=np.float64), rel=1e-12)
    assert got.std == pytest.approx(voxels.std(dtype=np.float64), rel=1e-9)
    for p, value in got.percentiles:
        assert value == pytest.approx(np.percentile(voxels, p), rel=6e-4, abs=0.02)


def test_statistics_survive_json():
    voxels = np.arange(1000, dtype=np.uint16)
    (got,) = merge([(Histogram.of(voxels),)])
    assert ChannelStatistics.from_json(got.to_json()) == got


@pytest.mark.parametrize("strange", [np.nan, np.inf, -1e300])
def test_what_float32_cannot_hold_is_refused(strange):
    with pytest.raises(ScanError, match="finite"):
        Histogram.of(np.array([1.0, strange]))
    Histogram.of(np.array([0.0, np.finfo(np.float32).max]))
