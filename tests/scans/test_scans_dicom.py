"""DICOM against pydicom and known bodies: voxels, places and intensities, and what is refused."""

import itertools

import numpy as np
import pydicom
import pytest
from bodies import SIZE_MM, VOXELS, same, stored, write_dicom, write_pixels
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

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
