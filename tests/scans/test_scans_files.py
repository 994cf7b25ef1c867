"""NumPy, HDF5, pictures and slices against direct reads."""

import subprocess
import sys
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan
from pipeline.scans.pictures import header
from pipeline.scans.registry import open_lazy
from pipeline.scans.slices import natural_key

RANDOM = np.random.default_rng(3)
AXES = [
    ((20, 30), "yx", None), ((6, 20, 30), "zyx", None), ((2, 6, 20, 30), "czyx", None), ((9, 6, 20, 30), "czyx", None),
    ((20, 30, 3), "cyx", (2, 0, 1)), ((6, 20, 30, 4), "czyx", (3, 0, 1, 2)), ((3, 20, 3), "zyx", None),
    ((1, 20, 30), "yx", (0, 1, 2)), ((20, 30, 1), "yx", (2, 0, 1)), ((1, 1), "yx", None),
]


def noise(*shape, dtype="u1"):
    return RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def arranged(voxels, dims, order):
    voxels = voxels if order is None else voxels.transpose(order)
    return voxels.reshape(voxels.shape[-len(dims) :])


@pytest.mark.parametrize(("shape", "dims", "order"), AXES)
@pytest.mark.parametrize("how", ["npy", "npy-fortran", "npy-big", "h5"])
def test_an_array_without_names_gets_its_axes_by_shape(tmp_path, shape, dims, order, how):
    voxels, path = noise(*shape, dtype="u2"), tmp_path / f"scan.{how.partition('-')[0]}"
    if how == "h5":
        with h5py.File(path, "w") as file:
            file["group/raw"] = voxels
    else:
        stored = np.asfortranarray(voxels) if how == "npy-fortran" else voxels
        np.save(path, stored.astype(">u2") if how == "npy-big" else stored)
    scan = open_scan(path)
    assert "".join(scan.dims) == dims
    assert scan.dtype == np.dtype("u2")
    assert scan.values.dtype.isnative
    np.testing.assert_array_equal(scan.values, arranged(voxels, dims, order))


@given(st.data())
def test_any_part_of_a_fortran_array_is_what_was_written(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "part.npy"
    voxels = np.asfortranarray(np.arange(7 * 8 * 9, dtype=">f8").reshape(7, 8, 9))
    if not path.exists():
        np.save(path, voxels)
    starts = [data.draw(st.integers(0, n)) for n in voxels.shape]
    part = tuple(slice(a, data.draw(st.integers(a, n))) for a, n in zip(starts, voxels.shape, strict=True))
    np.testing.assert_array_equal(open_lazy(str(path)).read(part), voxels[part])


def test_a_corner_of_a_20_gib_array_is_cheap(tmp_path):
    path, shape = tmp_path / "huge.npy", (20, 32768, 32768)
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 20 * 2**30)
    code = (
        "import resource, sys; from pipeline.scans.backend import open_scan; "
        "scan = open_scan(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "assert scan.shape == (20, 32768, 32768) and not scan[-2:, -50:, -60:].values.any(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024


@pytest.mark.parametrize("voxels", [np.zeros((4, 5), "c8"), np.array([[None, 1]]), np.array([["a", "b"]])])
def test_voxels_that_are_no_real_numbers_are_refused(tmp_path, voxels):
    np.save(tmp_path / "bad.npy", voxels, allow_pickle=True)
    with pytest.raises(ScanError, match=r"(hold numbers|booleans, integers or floats).*bad\.npy"):
        open_scan(tmp_path / "bad.npy")


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 5, 6), (0, 5)])
def test_arrays_that_are_no_volume_are_refused(tmp_path, shape):
    np.save(tmp_path / "bad.npy", np.zeros(shape, "u1"))
    with pytest.raises(ScanError, match=r"must have (2 to 4 axes|voxels), got shape .*bad\.npy"):
        open_scan(tmp_path / "bad.npy")


@pytest.mark.parametrize("suffix", ["npy", "h5", "png", "jpg"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_cut_file_is_refused_in_one_line(tmp_path, suffix, kept):
    path, voxels = tmp_path / f"cut.{suffix}", noise(60, 70)
    if suffix == "npy":
        np.save(path, voxels)
    elif suffix == "h5":
        with h5py.File(path, "w") as file:
            file["raw"] = voxels
    else:
        encode = imagecodecs.png_encode if suffix == "png" else imagecodecs.jpeg_encode
        path.write_bytes(encode(voxels))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ScanError, match=rf"cut\.{suffix}") as caught:
        open_scan(path)
    assert "\n" not in str(caught.value)


def test_a_dataset_is_named_where_there_are_several(tmp_path):
    path, a, b = tmp_path / "two.h5", noise(4, 20, 30), noise(20, 30)
    with h5py.File(path, "w") as file:
        file.create_dataset("raw/a", data=a, chunks=(2, 10, 10), compression="gzip")
        file["b"], file["note"] = b, "text"
        file["raw/a"].attrs["element_size_um"] = (0.3, 0.2, 0.1)
        file["b"].attrs["element_size_um"] = (0.2, 0.1)
    scan = open_scan(f"{path}::/raw/a")
    assert scan.attrs["voxel_size_um"] == (0.3, 0.2, 0.1)
    assert scan.encoding["preferred_chunks"] == {"z": 2, "y": 10, "x": 10}
    np.testing.assert_array_equal(scan[1:3, 5:15, ::3], a[1:3, 5:15, ::3])
    assert open_scan(f"{path}::b").attrs["voxel_size_um"] == (0.2, 0.1)
    for name in (str(path), f"{path}::c", f"{path}::note"):
        with pytest.raises(ScanError, match=r"FILE::DATASET, .*holds: b \(20, 30\), raw/a \(4, 20, 30\)"):
            open_scan(name)


def test_named_axes_of_hdf5_count(tmp_path):
    path, voxels = tmp_path / "named.h5", noise(5, 6, 7, 2)
    with h5py.File(path, "w") as file:
        file["labels"], file["tags"], file["time"] = voxels, voxels, voxels
        for axis, letter in enumerate("xyzc"):
            file["labels"].dims[axis].label = letter
            file["time"].dims[axis].label = "tyzc"[axis]
        keys = ", ".join(f'{{"key": "{letter}"}}' for letter in "xyzc")
        file["tags"].attrs["axistags"] = f'{{"axes": [{keys}]}}'
    for name in ("labels", "tags"):
        np.testing.assert_array_equal(open_scan(f"{path}::{name}"), voxels.transpose(3, 2, 1, 0))
    with pytest.raises(ScanError, match="got T=5, Y=6, Z=7, C=2"):
        open_scan(f"{path}::time")


def test_hdf5_without_h5py_says_what_to_install(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = noise(5, 6)
    code = (
        "import sys; sys.modules['h5py'] = None; from pipeline.scans.backend import open_scan\n"
        "try: open_scan(sys.argv[1])\nexcept Exception as error: print(type(error).__name__, error)"
    )
    path = str(tmp_path / "a.h5")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ScanError HDF5 scans need the package h5py")
    assert 'pip install "haloseg[hdf5]"' in done.stdout


PICTURES = {
    "grey.png": noise(20, 30), "deep.png": noise(20, 30, dtype="u2"), "rgb.png": noise(20, 30, 3),
    "rgba.png": noise(20, 30, 4), "deep-rgba.png": noise(20, 30, 4, dtype="u2"), "grey.jpg": noise(20, 30),
    "rgb.jpeg": noise(20, 30, 3),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_keeps_all_its_channels(tmp_path, name):
    path, voxels = tmp_path / name, PICTURES[name]
    png = name.endswith("png")
    path.write_bytes(imagecodecs.png_encode(voxels) if png else imagecodecs.jpeg_encode(voxels))
    expected = voxels if png else imagecodecs.imread(path)
    scan = open_scan(path)
    assert scan.dims == ("c", "y", "x")[-voxels.ndim :]
    assert scan.attrs == {"format": "PNG" if png else "JPEG"}
    np.testing.assert_array_equal(scan, np.moveaxis(expected, -1, 0) if voxels.ndim == 3 else expected)
    assert header(str(path))[:3] == (20, 30, 8 * voxels.itemsize)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=8, unique=True))
def test_natural_order_is_the_order_of_the_numbers(numbers):
    names = [f"slice_{n}.png" for n in sorted(numbers)]
    assert sorted(sorted(names), key=natural_key) == names


@given(st.lists(st.text(max_size=6), max_size=8), st.randoms(use_true_random=False))
def test_natural_order_does_not_depend_on_the_order_of_the_listing(names, random):
    expected = sorted(names, key=natural_key)
    random.shuffle(names)
    assert sorted(names, key=natural_key) == expected


@pytest.fixture
def folder(tmp_path):
    """Fourteen slices whose names sort wrongly as text, a table and a hidden file."""
    voxels = noise(14, 20, 30)
    (tmp_path / "stack").mkdir()
    for z, picture in enumerate(voxels):
        (tmp_path / "stack" / f"s{z}.png").write_bytes(imagecodecs.png_encode(picture))
    (tmp_path / "stack" / "positions.csv").write_text("z,um\n")
    (tmp_path / "stack" / ".s3.png").write_bytes(b"left by a copy")
    return tmp_path / "stack", voxels


def test_a_folder_is_a_volume_in_natural_order(folder):
    path, voxels = folder
    for name in (path, path / "*.png"):
        scan = open_scan(name)
        assert scan.dims == ("z", "y", "x")
        assert scan.attrs["format"] == "PNG slices"
        np.testing.assert_array_equal(scan, voxels)
        np.testing.assert_array_equal(scan[8:12, 3:9, -7:], voxels[8:12, 3:9, -7:])
    np.testing.assert_array_equal(open_scan(path / "s1*.png"), voxels[[1, 10, 11, 12, 13]])


def test_a_slice_that_was_written_anew_is_read_anew(folder):
    path, voxels = folder
    assert open_scan(path)[4].values.tolist() == voxels[4].tolist()
    other = noise(20, 30, dtype="u1") // 2
    (path / "s4.png").write_bytes(imagecodecs.png_encode(other, level=1))
    np.testing.assert_array_equal(open_scan(path)[4], other)


def test_tiff_slices_keep_colour_and_pixel_size_is_of_y_and_x_only(tmp_path):
    voxels = noise(3, 20, 30, 3)
    for z, picture in enumerate(voxels):
        tifffile.imwrite(
            tmp_path / f"{z}.tif", picture, photometric="rgb", compression="zlib", resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    scan = open_scan(tmp_path)
    assert scan.dims == ("c", "z", "y", "x")
    assert "voxel_size_um" not in scan.attrs
    np.testing.assert_array_equal(scan, voxels.transpose(3, 0, 1, 2))


@pytest.mark.parametrize("odd", [noise(20, 31), noise(20, 30, 3), noise(20, 30, dtype="u2")])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_odd_slice_is_named(tmp_path, odd, suffix):
    for z, picture in enumerate([noise(20, 30), noise(20, 30), odd]):
        path = tmp_path / f"z{z}.{suffix}"
        if suffix == "tif":
            tifffile.imwrite(path, picture, photometric="rgb" if picture.ndim == 3 else "minisblack")
        else:
            path.write_bytes(imagecodecs.png_encode(picture))
    with pytest.raises(ScanError, match=rf"must agree in shape and dtype .*z2\.{suffix}; remove"):
        open_scan(tmp_path)


def test_pictures_of_two_kinds_are_refused(folder):
    path, _ = folder
    (path / "preview.jpg").write_bytes(imagecodecs.jpeg_encode(noise(20, 30)))
    with pytest.raises(ScanError, match=r"one kind .* got JPEG and PNG"):
        open_scan(path)


def test_volumes_are_no_slices(tmp_path):
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", noise(5, 20, 30))
    with pytest.raises(ScanError, match=r"must be 2-D pictures, got shape \(5, 20, 30\)"):
        open_scan(tmp_path)


def test_an_empty_slice_file_is_named(folder):
    path, _ = folder
    Path(path / "s5.png").write_bytes(b"")
    with pytest.raises(ScanError, match=r"s5\.png"):
        open_scan(path)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.JPEG", "x.tif", "x.npy", "x.h5"])
def test_an_empty_file_is_damaged_and_not_of_another_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ScanError, match=r"a scan must be whole and decodable, got .*; copy or export it again"):
        open_scan(tmp_path / name)
