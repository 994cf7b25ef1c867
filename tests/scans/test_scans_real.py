"""Real files of instruments against tifffile and h5py; the bad ones end in one line."""

from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan


@pytest.mark.parametrize(
    ("name", "dims", "size_um"),
    [
        ("isbi2012/train-volume.tif", "zyx", None), ("fib25/grayscale.tif", "zyx", None),
        ("usiigaci_phase/train_set1/raw.tif", "yx", None), ("slides/kidney-48-5.tif", "cyx", None),
        ("slides/cmu-1-small-region.svs", "cyx", (0.499, 0.499)), ("slides/small.svs", "cyx", (0.499, 0.499)),
        ("slides/boxes.tiff", "cyx", None),
    ],
)
def test_tiff_files_are_what_tifffile_reads(data, name, dims, size_um):
    scan, expected = open_scan(data / name), tifffile.imread(data / name)
    expected = np.moveaxis(expected, -1, 0) if dims == "cyx" else expected
    assert "".join(scan.dims) == dims
    assert scan.dtype == expected.dtype
    assert scan.attrs.get("voxel_size_um") == size_um
    np.testing.assert_array_equal(scan, expected)
    part = tuple(slice(n // 3, n // 2 + 1) for n in expected.shape)
    np.testing.assert_array_equal(scan[part], expected[part])


def test_hdf5_datasets_are_what_h5py_reads(data):
    with h5py.File(data / "fib25/bodies.h5") as file:
        np.testing.assert_array_equal(open_scan(data / "fib25/bodies.h5::bodies"), file["bodies"][()])
        np.testing.assert_array_equal(open_scan(data / "fib25/bodies.h5")[50:60, 7], file["bodies"][50:60, 7])
    ovule = open_scan(data / "plantseg/sample_ovule.h5::raw")
    assert ovule.attrs["voxel_size_um"] == (0.235, 0.15, 0.15)
    np.testing.assert_allclose(ovule["z"], np.arange(32) * 0.235)
    with pytest.raises(ScanError, match=r"holds: label \(32, 128, 128\), raw \(32, 128, 128\)"):
        open_scan(data / "plantseg/sample_ovule.h5")


def test_pictures_keep_their_four_channels(data):
    pictures = sorted((data / "dsb2018/images").glob("*.png"))[:5]
    for picture in pictures:
        expected = imagecodecs.imread(picture)
        assert expected.shape[-1] == 4
        np.testing.assert_array_equal(open_scan(picture), np.moveaxis(expected, -1, 0))


def test_pictures_of_mixed_sizes_are_no_volume(data):
    with pytest.raises(ScanError, match=r"must agree in shape and dtype .* 256 x 256 pixels of 8 bit .*\.png; remove"):
        open_scan(data / "dsb2018/images")


@pytest.mark.parametrize(
    "name", ["slides/unopenable.tiff", "slides/broken.svs", "slides/unreadable.svs"]
)
def test_bad_files_are_refused_in_one_line(data, name):
    with pytest.raises(ScanError, match=Path(name).name) as caught:
        open_scan(data / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(
    "name", ["isbi2012/train-volume.tif", "usiigaci_phase/train_set1/raw.tif", "slides/cmu-1-small-region.svs",
             "fib25/bodies.h5", "slides/kidney-48-5.tif", "fib25/grayscale.tif"]
)
def test_files_that_were_cut_off_are_refused_in_one_line(data, tmp_path, name, kept):
    cut = tmp_path / Path(name).name
    content = (data / name).read_bytes()
    cut.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ScanError, match=cut.name) as caught:
        open_scan(cut)
    assert "\n" not in str(caught.value)
