"""Scans of bodies against the libraries of their formats: the same voxels, lying the same way, whatever the format."""

import gzip
import itertools
import json
from pathlib import Path

import mrcfile
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from volumes import model_file

from pipeline.cli import main
from pipeline.errors import ScanError
from pipeline.scans.anatomy import scaled, scaled_dtype
from pipeline.scans.backend import open_scan
from pipeline.segment import as_image
from pipeline.store.image import open_image

RNG = np.random.default_rng(0)
VOXELS = RNG.integers(0, 4000, (7, 6, 5), dtype=np.int16)  # along z, y, x: head, back, left
SIZE_MM = (2.5, 0.75, 0.5)
RAS = np.diag([-1.0, -1.0, 1.0])
TURNS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def stored(order, signs, *, voxels=VOXELS):
    """Return voxels with their axes in another order and direction, and each one's step: left, back, head, mm."""
    turned = voxels.transpose(order)
    turned = turned[tuple(slice(None, None, sign) for sign in signs)]
    steps = np.zeros((3, 3))
    for at, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        steps[at, 2 - axis] = sign * SIZE_MM[axis]
    return turned, steps


def same(scan, voxels=VOXELS, *, rtol=0.0):
    assert scan.dims == ("z", "y", "x")
    assert scan.attrs["voxel_size_um"] == pytest.approx([1000 * n for n in SIZE_MM], rel=1e-6)
    np.testing.assert_allclose(scan, voxels, rtol=rtol)
    part = tuple(slice(n // 3, n // 2 + 1) for n in voxels.shape)
    np.testing.assert_allclose(scan[part], voxels[part], rtol=rtol)


def write_nifti(path, order, signs, *, voxels=VOXELS, scale=None, dtype=None):
    turned, steps = stored(order, signs, voxels=voxels)
    affine = np.eye(4)
    affine[:3, :3] = RAS @ steps[::-1].T
    image = nibabel.Nifti1Image(turned.T, affine, dtype=dtype)
    if scale:
        image.header.set_slope_inter(*scale)
    nibabel.save(image, path)
    return path


def write_dicom(folder, turned, steps, *, slope=1, intercept=0, series=None, number=1, skip=(), **more):
    """Write a slice for each index of the first axis, in files whose names tell nothing of their order."""
    folder.mkdir(exist_ok=True)
    series = series or generate_uid(entropy_srcs=["series"])
    for index, pixels in enumerate(turned):
        if index in skip:
            continue
        data = Dataset()
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), series
        data.SeriesNumber, data.Rows, data.Columns = number, *pixels.shape
        data.ImagePositionPatient = [float(n) for n in 10 + index * steps[0]]
        rows, columns = (np.linalg.norm(step) for step in steps[1:])
        data.PixelSpacing = [float(rows), float(columns)]
        data.ImageOrientationPatient = [float(n) for n in (*steps[2] / columns, *steps[1] / rows)]
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        write_pixels(data, pixels)
        for name, value in more.items():
            setattr(data, name, value)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.save_as(folder / f"slice{series[-4:]}-{(index * 37) % 101}", enforce_file_format=True)
    return folder


def write_pixels(data, pixels):
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = np.ascontiguousarray(pixels).tobytes()


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


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [((1, -1024), np.int16), ((2, 0), np.float32), ((1, 40000), np.uint16), ((1, 65000), np.int32)],
)
def test_dicom_intensities_are_those_that_are_meant(tmp_path, scale, dtype):
    turned, steps = stored((0, 1, 2), (1, 1, 1))
    more = {"BitsStored": 12, "HighBit": 11}
    folder = write_dicom(tmp_path / "ct", turned.astype(np.uint16), steps, slope=scale[0], intercept=scale[1], **more)
    scan = open_scan(folder)
    assert scan.dtype == dtype
    same(scan, VOXELS * np.float64(scale[0]) + scale[1])


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


def test_slices_that_differ_in_slope_are_floats(tmp_path):
    turned, steps = stored((0, 1, 2), (1, 1, 1))
    folder = write_dicom(tmp_path / "pet", turned, steps)
    expected = VOXELS.astype(np.float32)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        index = round((data.ImagePositionPatient[2] - 10) / SIZE_MM[0])
        data.RescaleSlope = 1 + index / 4
        expected[index] *= 1 + index / 4
        data.save_as(file)
    same(open_scan(folder), expected)


def test_a_file_of_many_frames_is_the_series(tmp_path):
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = EnhancedCTImageStorage, generate_uid()
    order = RNG.permutation(len(VOXELS))
    data.Rows, data.Columns, data.NumberOfFrames = *VOXELS.shape[1:], len(VOXELS)
    write_pixels(data, VOXELS[order])
    frames, shared = [], Dataset()
    for index in order:
        place, group = Dataset(), Dataset()
        place.ImagePositionPatient = [0.0, 0.0, float(index * SIZE_MM[0])]
        group.PlanePositionSequence = [place]
        frames.append(group)
    for sequence, name, value in (
        ("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]),
        ("PixelMeasuresSequence", "PixelSpacing", list(SIZE_MM[1:])),
        ("PixelValueTransformationSequence", "RescaleIntercept", -100),
    ):
        item = Dataset()
        setattr(item, name, value)
        setattr(shared, sequence, [item])
    data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence = frames, [shared]
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    scan = open_scan(tmp_path / "enhanced.dcm")
    same(scan, VOXELS.astype(np.int32) - 100)
    same(open_scan(tmp_path), VOXELS.astype(np.int32) - 100)


def test_compressed_slices_are_what_pydicom_reads(tmp_path):
    turned, steps = stored((0, 1, 2), (1, 1, 1))
    folder = write_dicom(tmp_path / "series", turned.astype(np.uint16), steps)
    for file, syntax in zip(sorted(folder.iterdir()), itertools.cycle(("RLE", "plain")), strict=False):
        data = pydicom.dcmread(file)
        if syntax == "RLE":
            data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
            data.save_as(file)
    same(open_scan(folder))
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.PixelData = pydicom.encaps.encapsulate([b"no picture at all "])
    data["PixelData"].is_undefined_length = True
    data.save_as(file)
    with pytest.raises(ScanError, match=f"must be whole and decodable, got .*{file.name}") as caught:
        np.asarray(open_scan(folder))
    assert "\n" not in str(caught.value)


def test_each_series_of_a_folder_has_an_image_of_its_own(tmp_path):
    turned, steps = stored((0, 1, 2), (1, 1, 1))
    for number, pixels in ((1, turned), (2, turned[::-1])):
        write_dicom(tmp_path / "two.d", pixels, steps, series=f"1.2.{number}", number=number)
    model = model_file(tmp_path / "m.safetensors")
    for series, name, voxels in (("1", "1", VOXELS), ("2", "2", VOXELS[::-1]), (" 1.2.2", "1.2.2", VOXELS[::-1])):
        image = as_image(f"{tmp_path / 'two.d'}::{series}", model=model, name="x")
        assert image == str(tmp_path / f"two.d.{name}.zarr")
        np.testing.assert_array_equal(open_image(image).level(0)[0, :, :, :], voxels)


def test_series_that_are_no_volume_are_refused_in_one_line(tmp_path):
    turned, steps = stored((0, 1, 2), (1, 1, 1))

    def refused(folder, match):
        with pytest.raises(ScanError, match=match) as caught:
            open_scan(folder)
        assert "\n" not in str(caught.value)

    refused(write_dicom(tmp_path / "gap", turned, steps, skip=[3]), r"even distances, got 2.5 to 5 mm")
    write_dicom(tmp_path / "twice", turned, steps)
    for file in list((tmp_path / "twice").iterdir()):
        (tmp_path / "twice" / f"{file.name}b").write_bytes(file.read_bytes())
    refused(tmp_path / "twice", r"a place of their own, got 7 that lie where another does")
    write_dicom(tmp_path / "two", turned, steps, series="1.2.3", number=4)
    write_dicom(tmp_path / "two", turned[::-1], steps, series="1.2.7", number=5, SeriesDescription="thin")
    refused(tmp_path / "two", r"one series, got .* 1\.2\.3 \(number 4, 7 files\); 1\.2\.7 \(number 5, thin, 7 files\)")
    same(open_scan(f"{tmp_path / 'two'}::4"))
    same(open_scan(f"{tmp_path / 'two'}::1.2.7"), VOXELS[::-1])
    refused(f"{tmp_path / 'two'}::6", r"two::6 where there are")
    mixed = write_dicom(tmp_path / "mixed", turned, steps)
    write_dicom(mixed, turned[:1, :4], steps - [[100], [0], [0]])
    refused(mixed, r"slices must agree with the first in Rows")
    turned_by = write_dicom(tmp_path / "turned", turned, steps)
    for file in sorted(turned_by.iterdir())[:1]:
        data = pydicom.dcmread(file)
        data.ImageOrientationPatient = [0, 1, 0, 0, 0, 1]
        data.save_as(file)
    refused(turned_by, r"one direction with one pixel size, got others in (1|6) of 7")


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
@pytest.mark.parametrize("detached", [False, True])
def test_nrrd_is_what_pynrrd_reads(tmp_path, encoding, detached):
    for kind in ("int8", "uint8", "uint16", ">i2", "int32", "float32", "float64"):
        path = tmp_path / f"scan-{kind.strip('>')}.{'nhdr' if detached else 'nrrd'}"
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
