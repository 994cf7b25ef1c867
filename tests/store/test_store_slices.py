import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.grid import BlockGrid
from pipeline.store.location import Location
from pipeline.store.moments import Moments, PlaneSums
from pipeline.store.scaling import Scaling, SliceWindows, of_slices, spread_out
from pipeline.store.slices import read_slices, write_slices
from pipeline.store.statistics import Normalisation


def merged(voxels, *, shard):
    sums = PlaneSums(n_channels=len(voxels), n_planes=voxels.shape[1])
    for block in BlockGrid(voxels.shape[1:], shard):
        sums.add(Moments.of(voxels[(slice(None), *block.core.slices)], start=block.core.start[0]))
    return sums.statistics()


@given(
    st.tuples(st.integers(1, 2), *(st.integers(1, 9),) * 3), st.tuples(*(st.integers(1, 5),) * 3),
    st.sampled_from([("uint8", 0), ("int16", -900), ("uint16", 60_000), ("float32", 1e6), ("uint32", 4e9)]),
)  # fmt: skip
@settings(deadline=None)
def test_each_plane_has_its_own_mean_and_deviation_however_the_volume_is_cut(shape, shard, kind):
    dtype, base = kind
    voxels = (np.random.default_rng(0).integers(0, 200, shape) + base).astype(dtype)
    got, exact = merged(voxels, shard=shard), voxels.astype(np.longdouble)
    np.testing.assert_allclose(got.mean, exact.mean(axis=(2, 3)).astype(float), rtol=1e-14)
    np.testing.assert_allclose(got.std, exact.std(axis=(2, 3)).astype(float), rtol=1e-9, atol=1e-6)


def test_they_are_read_as_written_and_others_are_refused(tmp_path):
    voxels = np.random.default_rng(1).normal(size=(2, 70, 4, 5))
    slices, at = merged(voxels, shard=(16, 4, 4)), Location(str(tmp_path / "slices"))
    write_slices(at, slices)
    again = read_slices(at, sha256=slices.sha256)
    assert np.array_equal(again.mean, slices.mean)
    assert np.array_equal(again.std, slices.std)
    write_slices(at, merged(voxels + 1, shard=(16, 4, 4)))
    with pytest.raises(StoreError, match="must be those of the image, got others"):
        read_slices(at, sha256=slices.sha256)


def test_a_plane_without_a_block_is_refused():
    sums = PlaneSums(n_channels=1, n_planes=3)
    sums.add(Moments.of(np.ones((1, 2, 3, 3)), start=1))
    with pytest.raises(ArgumentError, match="every plane needs a block, got none in plane 0"):
        sums.statistics()


def test_windows_bring_each_slice_to_mean_0_and_deviation_1_and_a_constant_one_to_0():
    voxels = np.random.default_rng(2).normal(5, 3, (2, 4, 6, 7)) * np.array([1, 9, 0, 2])[:, None, None]
    windows = SliceWindows.of(merged(voxels, shard=(2, 6, 4)))
    offset, scale, low, high = spread_out(windows, n_axes=3)
    seen = np.clip((voxels - offset) * scale, low, high)
    np.testing.assert_allclose(seen.mean(axis=(2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(seen.std(axis=(2, 3)), [[1, 1, 0, 1]] * 2, atol=1e-12)


def test_windows_are_mirrored_as_the_slices_are():
    planes = np.arange(5.0)[None]
    shown = of_slices(SliceWindows(planes, planes + 1), -3, 8)
    assert shown.offset[0].tolist() == np.pad(planes[0], (3, 3), mode="reflect").tolist()
    assert np.array_equal(shown.scale, shown.offset + 1)
    with pytest.raises(ArgumentError, match="windows of slices need voxels of 3 axes, got 2"):
        spread_out(shown, n_axes=2)


def test_networks_that_see_several_slices_at_once_are_refused():
    by_slice = Scaling(Normalisation.ZSCORE_SLICEWISE)
    by_slice.check_dims(2)
    Scaling().check_dims(3)
    with pytest.raises(ArgumentError, match="sees slices one by one, got a 3-D one; use zscore, or a 2-D network"):
        by_slice.check_dims(3)
