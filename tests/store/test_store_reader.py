import json
import pickle

import numpy as np
import pytest
import xarray as xr
import zarr

from pipeline.cli import main
from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan
from pipeline.scans.registry import open_lazy

VOXELS = np.random.default_rng(0).integers(0, 60000, (2, 12, 20, 30)).astype(np.uint16)


def ome(version, *, unit="nanometer", units=None):
    units = dict.fromkeys("zyx", unit) if units is None else units
    axes = [{"name": "c", "type": "channel"}] + [
        {"name": axis, "type": "space"} | ({"unit": units[axis]} if axis in units else {}) for axis in "zyx"
    ]
    scale = [{"type": "scale", "scale": [1.0, 40.0, 4.0, 4.0]}]
    about = {"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": scale}], "version": version}
    return {"multiscales": [about]} if version == "0.4" else {"ome": {"version": version, "multiscales": [about]}}


def write(folder, version, *, voxels=VOXELS, **about):
    form = 2 if version == "0.4" else 3
    group = zarr.create_group(folder, zarr_format=form, attributes=ome(version, **about))
    group.create_array("s0", shape=voxels.shape, chunks=(1, 8, 8, 8), dtype=np.uint16)[:] = voxels
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


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_sizes_that_are_told_of_some_axes_are_not_lost_in_silence(tmp_path, capsys, version):
    scan = write(tmp_path / "x.zarr", version, units={"y": "nanometer", "x": "micrometer"})
    assert (opened := open_scan(scan)).attrs["voxel_size_um_of"] == pytest.approx({"y": 0.004, "x": 4.0})
    assert "voxel_size_um" not in opened.attrs
    assert main(["info", scan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["voxel_size_um"] == [None, 0.004, 4.0]
    assert main(["ingest", scan, str(tmp_path / "y.zarr"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["voxel_size_um"] is None
    line = f"no voxel size, since {scan} tells 0.004 um along y, 4 um along x alone; --voxel-size-um gives all"
    assert "".join(err.split()).count("".join(line.split())) == 1
    assert main(["ingest", scan, str(tmp_path / "z.zarr"), "--voxel-size-um", "0.04,0.004,4", "--json"]) == 0
    assert "alone" not in capsys.readouterr().err


def test_an_axis_that_is_no_axis_of_the_scan_needs_no_unit(tmp_path):
    flat = write(tmp_path / "flat.zarr", "0.4", units={"y": "micrometer", "x": "micrometer"}, voxels=VOXELS[:, :1])
    assert open_scan(flat).attrs["voxel_size_um"] == (4.0, 4.0)


def test_axes_that_are_names_alone_have_no_size(tmp_path):
    group = zarr.open_group(write(tmp_path / "old.zarr", "0.4"), mode="a", zarr_format=2)
    (about,) = group.attrs["multiscales"]
    group.attrs["multiscales"] = [about | {"version": "0.3", "axes": ["c", "z", "y", "x"]}]
    scan = open_scan(tmp_path / "old.zarr")
    assert (scan.dims, "voxel_size_um" in scan.attrs) == (("c", "z", "y", "x"), False)
    np.testing.assert_array_equal(scan[0, 3], VOXELS[0, 3])
