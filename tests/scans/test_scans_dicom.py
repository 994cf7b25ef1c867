"""DICOM against pydicom and known bodies: voxels, places and intensities, and what is refused."""


import numpy as np
import pydicom
import pytest
from bodies import SIZE_MM, VOXELS, enhanced, refused, same, series, stored, write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan

RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLosslessSV1])
def test_a_file_of_many_frames_is_the_series(tmp_path, syntax):
    file = enhanced(tmp_path / "enhanced.dcm", intercept=-100, syntax=syntax)
    same(open_scan(file), VOXELS.astype(np.int32) - 100)
    same(open_scan(tmp_path), VOXELS.astype(np.int32) - 100)


def test_each_file_of_many_frames_is_a_volume_of_its_own(tmp_path):
    upper = enhanced(tmp_path / "a.dcm", VOXELS, first=len(VOXELS))  # right behind the other: no gap tells them apart
    lower = enhanced(tmp_path / "b.dcm", VOXELS[::-1])
    same(open_scan(upper))
    same(open_scan(lower), VOXELS[::-1])
    told = r"one series, got .* where there are .*number 4, [ab]\.dcm of 7 frames\); .*or a file of many frames itself$"
    for path in (tmp_path, f"{tmp_path}::4", f"{tmp_path}::1.2.3", f"{tmp_path}/*.dcm"):
        refused(path, told)
    for file, voxels in ((upper, VOXELS), (lower, VOXELS[::-1])):
        same(open_scan(f"{tmp_path}::{pydicom.dcmread(file).SOPInstanceUID}"), voxels)
    write_dicom(tmp_path, *stored((0, 1, 2), (1, 1, 1)), series="1.2.7", number=5)
    same(open_scan(f"{tmp_path}::5"))
    refused(f"{tmp_path}::4", told)


def test_files_of_a_concatenation_are_parts_of_one_volume(tmp_path):
    for name, part, first in (("b", VOXELS[:3], 0), ("a", VOXELS[3:], 3)):
        enhanced(tmp_path / f"{name}.dcm", part, first=first, ConcatenationUID="1.2.3.4")
    same(open_scan(tmp_path))
    same(open_scan(f"{tmp_path}::4"))
    same(open_scan(f"{tmp_path}::1.2.3.4"))


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


def remove(*names):
    def change(_index, data):
        for name in names:
            del data[name]

    return change


@pytest.mark.parametrize("change", ["none", "empty", "detector"])
def test_pixels_of_a_size_that_is_not_told_get_none(tmp_path, change):
    def each(_index, data):
        data.PixelSpacing = None
        if change != "empty":
            del data.PixelSpacing
        if change == "detector":
            data.ImagerPixelSpacing = [0.2, 0.2]

    turned, steps = stored((1, 2, 0), (1, -1, 1))
    folder = write_dicom(tmp_path / "ct", turned, steps)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        each(0, data)
        data.save_as(file)
    scan = open_scan(folder)
    assert "voxel_size_um" not in scan.attrs
    np.testing.assert_array_equal(scan, VOXELS)  # the directions are told


@pytest.mark.parametrize("how", ["implicit", "explicit", "big", "with meta"])
def test_files_without_a_preamble_are_slices_too(tmp_path, how):
    folder = series(tmp_path / "ct")
    (folder / "notes.txt").write_text("no picture")
    for file in sorted(folder.glob("slice*"))[-2:]:
        data, content = pydicom.dcmread(file), file.read_bytes()
        if how == "with meta":
            file.write_bytes(content[132:])
            continue
        if how == "big":
            data.PixelData = data.pixel_array.astype(">i2").tobytes()
        del data.file_meta
        with file.open("wb") as bare:
            pydicom.dcmwrite(bare, data, implicit_vr=how == "implicit", little_endian=how != "big")
    same(open_scan(folder))
    file.rename(tmp_path / "alone.dcm")
    assert open_scan(tmp_path / "alone.dcm").dims == ("y", "x")


def test_numbers_that_slope_and_intercept_do_not_tell_are_refused(tmp_path):
    def lut(_index, data):
        table = Dataset()
        table.LUTDescriptor, table.LUTData = [2, 0, 16], b"\5\0\x09\0"
        data.ModalityLUTSequence = [table]

    def white_is_low(index, data):
        data.PhotometricInterpretation = f"MONOCHROME{1 if index == 3 else 2}"

    def set_to(name, value):
        return lambda _index, data: setattr(data, name, value)

    refused(series(tmp_path / "lut", each=lut), r"slope and intercept, got a Modality LUT in .*; apply it")
    palette = series(tmp_path / "palette", each=set_to("PhotometricInterpretation", "PALETTE COLOR"))
    refused(palette, r"grey values or RGB, got PALETTE COLOR in .*; convert it to RGB")
    refused(series(tmp_path / "dose", each=set_to("DoseGridScaling", 0.01)), r"doses cannot be read, .*; convert it")
    refused(series(tmp_path / "mixed", each=white_is_low), r"agree with the first in .*PhotometricInterpretation, ")
    same(open_scan(series(tmp_path / "low", each=set_to("PhotometricInterpretation", "MONOCHROME1"))))


@pytest.mark.parametrize("index", [0, 3, 6])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_that_are_displaced_are_refused_and_a_tilt_is_not(tmp_path, index, axis):
    def displaced(at, data):
        data.ImagePositionPatient[axis] += 40 * (at == index)

    def tilted(at, data):
        data.ImagePositionPatient[axis] += 0.3 * at

    def written(at, data):
        data.ImagePositionPatient[axis] += 0.02 * (at == index)

    refused(series(tmp_path / "off", each=displaced), r"behind another on a line, got some .* mm beside it in .*off")
    np.testing.assert_array_equal(open_scan(series(tmp_path / "tilt", each=tilted)), VOXELS)
    np.testing.assert_array_equal(open_scan(series(tmp_path / "near", each=written)), VOXELS)


def test_a_list_of_files_and_hidden_ones_make_no_folder_one_of_dicom(tmp_path):
    for name in "ab":
        Image.fromarray(VOXELS[0].astype(np.uint8)).save(tmp_path / f"{name}.png")
    (slice_,) = write_dicom(tmp_path / "ct", VOXELS[:1], np.eye(3)).iterdir()
    for name in ("DICOMDIR", ".hidden", ".hidden.dcm"):
        (tmp_path / name).write_bytes(slice_.read_bytes())
        assert open_scan(tmp_path).dims == ("z", "y", "x")
    for name in "ab":
        (tmp_path / f"{name}.png").unlink()
    refused(tmp_path, r"must be slices, got .*, a list of files; give the folder that they lie in")
    refused(tmp_path / "DICOMDIR", r"must be slices, got .*DICOMDIR, a list of files; give the folder")


def test_series_of_one_file_or_a_pattern_are_named_as_of_a_folder(tmp_path):
    folder = series(tmp_path / "ct", number=4)
    for file in list(folder.iterdir()):
        file.rename(folder / f"{file.name}.dcm")
    write_dicom(folder, VOXELS[::-1], stored((0, 1, 2), (1, 1, 1))[1], series="1.2.7", number=5)
    same(open_scan(f"{folder}/*.dcm"))
    same(open_scan(f"{folder}/*.dcm::4"))
    same(open_scan(f"{folder}/*::5"), VOXELS[::-1])
    refused(f"{folder}/*", r"must be one series")
    file = next(folder.glob("*.dcm"))
    np.testing.assert_array_equal(open_scan(f"{file}::4"), open_scan(file))
    refused(f"{file}::7", r"one series, got .*\.dcm::7 where there are .*number 4, 1 files")


def test_slices_that_tell_no_place_or_are_cut_off_are_named_so(tmp_path):
    for name in ("ImagePositionPatient", "ImageOrientationPatient"):
        refused(series(tmp_path / name, each=remove(name)), r"slices must tell where it lies .*ImagePositionPatient")
    folder = series(tmp_path / "ct")
    file = next(folder.iterdir())
    content = file.read_bytes()
    rows = content.index(b"\x28\0\x10\0US")
    for n_bytes in (140, rows // 2, rows, rows + 8, rows + 16):
        file.write_bytes(content[:n_bytes])
        refused(file, r"whole and decodable, got .*; copy or export it again")
        refused(folder, r"whole and decodable, got .*; copy or export it again|one series")
    file.unlink()
    (folder / "empty.dcm").touch()
    refused(folder, r"whole and decodable, got .*empty.dcm: it does not begin as DICOM does")
