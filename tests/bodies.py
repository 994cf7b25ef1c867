"""What the tests of medical scans share: a small body, its voxels stored in any direction, and DICOM files of it."""

import itertools

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    generate_uid,
)

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan

VOXELS = np.random.default_rng(0).integers(0, 4000, (7, 6, 5), dtype=np.int16)  # along z, y, x: head, back, left
SIZE_MM = (2.5, 0.75, 0.5)
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


def enhanced(path, voxels=VOXELS, *, first=0, intercept=0, series="1.2.3", number=4, syntax=None, **more):
    """Write one file of many frames, in no order, the first slice being that of an index; return its path."""
    data, order = Dataset(), np.random.default_rng(0).permutation(len(voxels))
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = EnhancedCTImageStorage, generate_uid(), series
    data.SeriesNumber, data.Rows, data.Columns, data.NumberOfFrames = number, *voxels.shape[1:], len(voxels)
    write_pixels(data, voxels[order])
    frames, shared = [], Dataset()
    for index in order:
        place, group = Dataset(), Dataset()
        place.ImagePositionPatient = [0.0, 0.0, float((first + index) * SIZE_MM[0])]
        group.PlanePositionSequence = [place]
        frames.append(group)
    for sequence, name, value in (
        ("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]),
        ("PixelMeasuresSequence", "PixelSpacing", list(SIZE_MM[1:])),
        ("PixelValueTransformationSequence", "RescaleIntercept", intercept),
    ):
        item = Dataset()
        setattr(item, name, value)
        setattr(shared, sequence, [item])
    data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence = frames, [shared]
    for name, value in more.items():
        setattr(data, name, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    if syntax == JPEGLosslessSV1:
        each = [imagecodecs.ljpeg_encode(pixels.view(np.uint16)) for pixels in voxels[order]]
        data.PixelData = pydicom.encaps.encapsulate(each)
        data["PixelData"].is_undefined_length = True
    path.parent.mkdir(exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def write_pixels(data, pixels):
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = np.ascontiguousarray(pixels).tobytes()


def series(folder, *, each=lambda _index, _data: None, voxels=VOXELS, **more):
    """Write the body's slices, each changed by a function of its index and data set, and return the folder."""
    turned, steps = stored((0, 1, 2), (1, 1, 1), voxels=voxels)
    write_dicom(folder, turned, steps, **more)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        each(round((data.ImagePositionPatient[2] - 10) / SIZE_MM[0]), data)
        data.save_as(file)
    return folder


def refused(path, match):
    with pytest.raises(ScanError, match=match) as caught:
        np.asarray(open_scan(path))
    assert "\n" not in str(caught.value)
