import pickle

import numpy as np
import pytest
import xarray as xr
import zarr

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan
from pipeline.scans.registry import open_lazy

VOXELS = np.random.default_rng(0).integers(0, 60000, (2, 12, 20, 30)).astype(np.uint16)


def ome(version, *, unit="nanometer"):
    axes = [{"name": "c", "type": "channel"}] + [{"name": a, "type": "space", "unit": unit} for a in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 40.0, 4.0, 4.0]}]
    about = {"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": scale}], "version": version}
    return {"multiscales": [about]} if version == "0.4" else {"ome": {"version": version, "multiscales": [about]}}


def write(folder, version, **about):
    form = 2 if version == "0.4" else 3
    group = zarr.create_group(folder, zarr_format=form, attributes=ome(version, **about))
    group.create_array("s0", shape=VOXELS.shape, chunks=(1, 8, 8, 8), dtype=np.uint16)[:] = VOXELS
    return str(folder)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_is_read_in_micrometres_and_by_slices(tmp_path, version):
    scan = xr.open_dataarray(write(tmp_path / "x.zarr", version), engine="haloseg")
    assert scan.dims == ("c", "z", "y", "x")
    assert scan.attrs["voxel_size_um"] == pytest.approx((0.04, 0.004, 0.004))
    np.testing.assert_allclose(scan.z, np.arange(12) * 0.04)
    np.testing.assert_array_equal(scan[1, 3:7, :, 5], VOXELS[1, 3:7, :, 5])


def test_units_that_are_missing_or_no_lengths_are_not_guessed(tmp_path):
    without = open_scan(write(tmp_path / "without.zarr", "0.5", unit=None))
    assert "voxel_size_um" not in without.attrs
    with pytest.raises(ScanError, match="units of space"):
        open_scan(write(tmp_path / "strange.zarr", "0.5", unit="furlong"))


@pytest.mark.parametrize("form", [2, 3])
def test_plain_arrays_and_groups_with_one_array(tmp_path, form):
    for path in (tmp_path / "a.zarr", tmp_path / "g.zarr" / "only"):
        zarr.create_array(path, shape=(20, 30), chunks=(8, 8), dtype=np.uint16, zarr_format=form)[:] = VOXELS[0, 0]
    zarr.open_group(tmp_path / "g.zarr", mode="a", zarr_format=form)
    for path in (tmp_path / "a.zarr", tmp_path / "g.zarr"):
        scan = open_scan(path)
        assert scan.dims == ("y", "x")
        np.testing.assert_array_equal(scan, VOXELS[0, 0])


def test_a_scan_travels_to_workers(tmp_path):
    scan = pickle.loads(pickle.dumps(open_lazy(write(tmp_path / "x.zarr", "0.5"))))
    region = (slice(0, 1), slice(2, 3), slice(0, 20), slice(4, 9))
    np.testing.assert_array_equal(scan.read(region), VOXELS[region])


def test_what_is_no_scan_is_one_line(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ScanError, match="no readable Zarr"):
        open_scan(tmp_path / "empty.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ScanError, match="must hold one array, got none"):
        open_scan(tmp_path / "group.zarr")
    for series in ("0", "1", "OME"):  # as bioformats2raw lays them out
        zarr.create_group(tmp_path / "group.zarr" / series)
    with pytest.raises(ScanError, match=r"got none but groups in .*; give \S+zarr/0, \S+zarr/1, \S+zarr/OME$"):
        open_scan(tmp_path / "group.zarr")
    for name in ("raw", "more"):
        zarr.create_array(tmp_path / "group.zarr" / name, shape=(3, 4), dtype="u1")
    with pytest.raises(ScanError, match=r"got 2 in .*; give \S+zarr/more, \S+zarr/raw$"):
        open_scan(tmp_path / "group.zarr")


def test_a_real_ome_zarr(data):
    scan = open_scan(data / "ome_zarr" / "6001240_labels_v0.5.zarr")
    assert (scan.dims, scan.shape, scan.dtype) == (("c", "z", "y", "x"), (2, 236, 68, 67), np.uint16)
