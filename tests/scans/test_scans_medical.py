"""Scans of bodies against the libraries of their formats: the same voxels, lying the same way, whatever the format."""

import gzip
import json
from pathlib import Path

import mrcfile
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from bodies import SIZE_MM, TURNS, VOXELS, same, stored, write_dicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from volumes import model_file

from pipeline.cli import main
from pipeline.errors import ScanError
from pipeline.scans.anatomy import scaled, scaled_dtype
from pipeline.scans.backend import open_scan
from pipeline.segment import as_image
from pipeline.store.image import open_image

RNG = np.random.default_rng(1)
RAS = np.diag([-1.0, -1.0, 1.0])


def write_nifti(path, order, signs, *, voxels=VOXELS, scale=None, dtype=None):
    turned, steps = stored(order, signs, voxels=voxels)
    affine = np.eye(4)
    affine[:3, :3] = RAS @ steps[::-1].T
    image = nibabel.Nifti1Image(turned.T, affine, dtype=dtype)
    if scale:
        image.header.set_slope_inter(*scale)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(("order", "signs"), TURNS)
def test_a_body_lies_the_same_way_however_it_is_stored(tmp_path, order, signs):
    turned, steps = stored(order, signs)
    same(open_scan(write_nifti(tmp_path / "scan.nii", order, signs)))
    nrrd.write(str(tmp_path / "scan.nrrd"), turned.T, {"space": "LPS", "space directions": steps[::-1]})
    same(open_scan(tmp_path / "scan.nrrd"))
    same(open_scan(write_dicom(tmp_path / "series", turned, steps)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turn=st.sampled_from(TURNS), angles=st.tuples(*[st.floats(-0.5, 0.5)] * 3), packed=st.booleans())
def test_oblique_axes_count_as_those_that_nibabel_says(tmp_path, turn, angles, packed):
    path = write_nifti(tmp_path / ("scan.nii.gz" if packed else "scan.nii"), *turn)
    image = nibabel.load(path)
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), rotation(*angles) @ image.affine)
    nibabel.save(image, path)
    nearest = nibabel.as_closest_canonical(nibabel.load(path))
    scan = open_scan(path)
    np.testing.assert_array_equal(scan, np.asarray(nearest.dataobj)[::-1, ::-1].T)
    size = np.array(nibabel.affines.voxel_sizes(nearest.affine))[::-1]
    np.testing.assert_allclose(scan.attrs["voxel_size_um"], 1000 * size, rtol=1e-5)


def rotation(*angles):
    """Return the rotation by small angles about three axes, one after another, shape (4, 4)."""
    total = np.eye(4)
    for (i, j), angle in zip(((0, 1), (1, 2), (0, 2)), angles, strict=True):
        turn = np.eye(4)
        turn[[i, j], [i, j]], turn[i, j], turn[j, i] = np.cos(angle), -np.sin(angle), np.sin(angle)
        total = turn @ total
    return total


@pytest.mark.parametrize("kind", ["int8", "uint8", ">i2", "uint16", "int32", "float32", ">f4", "float64"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_of_every_type_is_what_nibabel_reads(tmp_path, kind, ending):
    voxels = VOXELS.clip(0, 127).astype(kind)
    image = nibabel.Nifti2Image(voxels.T, np.diag([-1, -1, 1, 1.0]), dtype=voxels.dtype)
    image = nibabel.Nifti2Image.from_bytes(image.to_bytes())
    nibabel.save(image, tmp_path / f"scan{ending}")
    scan = open_scan(tmp_path / f"scan{ending}")
    assert scan.dtype == np.dtype(kind).newbyteorder("=")
    np.testing.assert_array_equal(scan, np.asarray(nibabel.load(tmp_path / f"scan{ending}").dataobj).T)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [((1, -1024), np.int16), ((1, -40000), np.int32), ((0.5, 3), np.float32), ((1, 0.5), np.float32)],
)
def test_nifti_intensities_are_those_that_are_meant(tmp_path, scale, dtype):
    about = nibabel.Nifti1Header()
    about.set_data_shape(VOXELS.T.shape)
    about.set_data_dtype(np.uint8)
    about.set_slope_inter(*scale)
    about["magic"], about["vox_offset"] = b"n+1", 352
    raw = VOXELS.clip(0, 255).astype(np.uint8)
    (tmp_path / "scan.nii").write_bytes(about.binaryblock + bytes(4) + raw.tobytes())
    scan = open_scan(tmp_path / "scan.nii")
    assert scan.dtype == dtype
    np.testing.assert_allclose(np.sort(np.ravel(scan)), np.sort(raw.ravel() * float(scale[0]) + scale[1]))


def test_colours_and_single_slices_are_pictures(tmp_path):
    colours = RNG.integers(0, 255, (1, 6, 5, 3), dtype=np.uint8)
    rgb = colours.transpose(2, 1, 0, 3).copy().view(np.dtype([(c, np.uint8) for c in "RGB"]))[..., 0]
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    scan = open_scan(tmp_path / "rgb.nii")
    assert scan.dims == ("c", "y", "x")
    np.testing.assert_array_equal(scan, np.moveaxis(colours[0], -1, 0))
    for order, signs in TURNS:  # whatever it is a slice of, rows stay rows
        turned, steps = stored(order, signs)
        scan = open_scan(write_dicom(tmp_path / f"{order}{signs}", turned[3:4], steps))
        assert scan.dims == ("y", "x")
        np.testing.assert_array_equal(scan, turned[3])


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("scale", [(1, 0), (1, -1024), (1, 200), (1, 40000), (1, 2.5), (0.1, -3)])
def test_types_hold_what_is_meant_exactly_or_to_their_precision(kind, scale):
    about = np.iinfo(kind) if kind != "float32" else np.finfo(kind)
    every = np.array([about.min, about.max, 0, 1, 100]).astype(kind)
    dtype = scaled_dtype(np.dtype(kind), *scale)
    meant = scaled(every, *scale, dtype=dtype)
    assert meant.dtype == dtype
    expected = every.astype(np.float64) * scale[0] + scale[1]
    np.testing.assert_allclose(meant, expected, rtol=1e-6 if dtype.kind == "f" else 0)


def test_numbers_beyond_what_a_header_says_are_refused_not_wrapped():
    with pytest.raises(ValueError, match="must be of int16, as its header says, got 3 to 64511"):
        scaled(np.array([1027, 65535], np.uint16), 1, -1024, dtype=np.dtype(np.int16))


def test_each_series_of_a_folder_has_an_image_of_its_own(tmp_path):
    turned, steps = stored((0, 1, 2), (1, 1, 1))
    for number, pixels in ((1, turned), (2, turned[::-1])):
        write_dicom(tmp_path / "two.d", pixels, steps, series=f"1.2.{number}", number=number)
    model = model_file(tmp_path / "m.safetensors")
    for series, name, voxels in (("1", "1", VOXELS), ("2", "2", VOXELS[::-1]), (" 1.2.2", "1.2.2", VOXELS[::-1])):
        image = as_image(f"{tmp_path / 'two.d'}::{series}", model=model, name="x")
        assert image == str(tmp_path / f"two.d.{name}.zarr")
        np.testing.assert_array_equal(open_image(image).level(0)[0, :, :, :], voxels)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_nrrd_is_what_pynrrd_reads(tmp_path, encoding):
    for kind in ("int8", "uint8", "uint16", ">i2", "int32", "float32", "float64"):
        path = tmp_path / f"scan-{kind.strip('>')}.nrrd"
        nrrd.write(str(path), VOXELS.clip(0, 127).T.astype(kind), {"encoding": encoding, "spacings": SIZE_MM[::-1]})
        expected, _ = nrrd.read(str(path))
        scan = open_scan(path)
        assert scan.dtype == expected.dtype.newbyteorder("=")
        same(scan, expected.T)


def test_nrrd_axes_are_those_that_it_names(tmp_path):
    colours = RNG.integers(0, 255, (6, 5, 3), dtype=np.uint8)
    nrrd.write(str(tmp_path / "rgb.nrrd"), colours.transpose(2, 1, 0), {"kinds": ["RGB-color", "domain", "domain"]})
    scan = open_scan(tmp_path / "rgb.nrrd")
    assert scan.dims == ("c", "y", "x")
    np.testing.assert_array_equal(scan, np.moveaxis(colours, -1, 0))
    two = np.stack([VOXELS, -VOXELS])
    _, steps = stored((0, 1, 2), (1, 1, 1))
    about = {"space": "right-anterior-superior", "kinds": ["domain"] * 3 + ["list"],
             "space directions": np.vstack([(steps @ RAS)[::-1], 3 * [np.nan]])}  # fmt: skip
    nrrd.write(str(tmp_path / "two.nrrd"), two.T, about)
    scan = open_scan(tmp_path / "two.nrrd")
    assert scan.dims == ("c", "z", "y", "x")
    np.testing.assert_array_equal(scan, two)
    nrrd.write(str(tmp_path / "movie.nrrd"), two.T, {"kinds": ["domain"] * 3 + ["time"]})
    with pytest.raises(ScanError, match=r"no other axis longer than 1, got T=2"):
        open_scan(tmp_path / "movie.nrrd")
    nrrd.write(str(tmp_path / "text.nrrd"), VOXELS.T, {"encoding": "ascii"})
    with pytest.raises(ScanError, match=r"raw, gzip or bzip2, got ascii"):
        open_scan(tmp_path / "text.nrrd")


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "float16", "float32"])
def test_mrc_is_what_mrcfile_reads(tmp_path, kind):
    with mrcfile.new(tmp_path / "scan.mrc") as file:
        file.set_data(VOXELS.clip(0, 100).astype(kind))
        file.voxel_size = tuple(1e7 * n for n in SIZE_MM[::-1])  # Angstrom
        file.set_extended_header(np.zeros(77, "u1"))
    scan = open_scan(tmp_path / "scan.mrc")
    assert scan.dtype == np.dtype(kind)
    same(scan, VOXELS.clip(0, 100))
    swapped = bytearray((tmp_path / "scan.mrc").read_bytes())
    swapped[64:76] = np.array([3, 1, 2], "<i4").tobytes()  # columns along z, rows along x, sections along y
    (tmp_path / "turned.map").write_bytes(swapped)
    np.testing.assert_array_equal(open_scan(tmp_path / "turned.map"), VOXELS.clip(0, 100).transpose(2, 0, 1))


def test_bytes_of_old_imod_are_not_signed(tmp_path):
    with mrcfile.new(tmp_path / "scan.rec") as file:
        file.set_data(VOXELS.clip(0, 255).astype(np.uint8).view(np.int8))
    content = bytearray((tmp_path / "scan.rec").read_bytes())
    for flags, dtype in ((0, np.uint8), (1, np.int8)):
        content[152:160] = np.array([1146047817, flags], "<i4").tobytes()
        (tmp_path / "scan.rec").write_bytes(content)
        scan = open_scan(tmp_path / "scan.rec")
        assert scan.dtype == dtype
        np.testing.assert_array_equal(scan, VOXELS.clip(0, 255).astype(np.uint8).view(dtype))


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "packed.nrrd", "scan.mrc", "scan.dcm"])
def test_files_that_were_cut_off_are_refused_in_one_line(tmp_path, name, kept):
    voxels = RNG.integers(0, 4000, (3, 64, 64), dtype=np.int16)
    match Path(name).suffix:
        case ".nii" | ".gz":
            nibabel.save(nibabel.Nifti1Image(voxels.T, np.eye(4)), tmp_path / name)
        case ".nrrd":
            nrrd.write(str(tmp_path / name), voxels.T, {"encoding": "gzip" if "packed" in name else "raw"})
        case ".mrc":
            mrcfile.write(tmp_path / name, voxels)
        case ".dcm":
            write_dicom(tmp_path / "series", voxels[:1], np.eye(3))
            (file,) = (tmp_path / "series").iterdir()
            file.rename(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ScanError, match=name) as caught:
        np.asarray(open_scan(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_packed_volume_is_unpacked_once(tmp_path, monkeypatch):
    write_nifti(tmp_path / "scan.nii.gz", (0, 1, 2), (1, 1, 1))
    scan, opened = open_scan(tmp_path / "scan.nii.gz"), []
    whole = gzip.open
    monkeypatch.setattr("pipeline.scans.compressed._OPENERS", {"gzip": lambda f: opened.append(1) or whole(f)})
    for z in range(len(VOXELS)):
        np.testing.assert_array_equal(scan[z], VOXELS[z])
    assert len(opened) == 1


def test_real_scans_lie_as_others_say(data):
    for name in ("t2", "t2_seg-manual"):
        path = data / f"medical/{name}.nii.gz"
        nearest = nibabel.as_closest_canonical(nibabel.load(path))
        np.testing.assert_array_equal(open_scan(path), np.asarray(nearest.dataobj)[::-1, ::-1].T)
    for name in ("image", "label"):
        voxels, _ = nrrd.read(str(data / f"medical/brain1_{name}.nrrd"))
        scan = open_scan(data / f"medical/brain1_{name}.nrrd")
        np.testing.assert_array_equal(scan, voxels.T[:, ::-1])  # its rows go from back to front
        assert scan.attrs["voxel_size_um"] == (6500, 781.25, 781.25)
    scan = open_scan(data / "medical/ct_series")
    slices = map(pydicom.dcmread, (data / "medical/ct_series").iterdir())
    slices = sorted(slices, key=lambda each: each.ImagePositionPatient[2])
    np.testing.assert_array_equal(scan, [each.pixel_array[::-1, ::-1] for each in slices])
    assert scan.attrs["voxel_size_um"] == (2000, 2000, 2000)


def test_a_nifti_scan_with_its_mask_goes_through_the_command_line(tmp_path, capsys):
    write_nifti(tmp_path / "scan.nii.gz", (2, 0, 1), (-1, 1, 1))
    write_nifti(tmp_path / "mask.nii", (1, 2, 0), (1, -1, 1), voxels=(VOXELS > 2000).astype(np.uint8))
    image = str(tmp_path / "scan.zarr")
    assert main(["ingest", str(tmp_path / "scan.nii.gz"), image]) == 0
    assert main(["ingest", "--labels-of", image, "--name", "truth", str(tmp_path / "mask.nii")]) == 0
    capsys.readouterr()
    assert main(["evaluate", f"{image}/labels/truth", str(tmp_path / "mask.nii"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    np.testing.assert_array_equal(open_scan(f"{image}/labels/truth"), VOXELS > 2000)
    np.testing.assert_array_equal(open_scan(image), VOXELS)
