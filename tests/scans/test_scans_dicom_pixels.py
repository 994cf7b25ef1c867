"""The pixels of DICOM files in the transfer syntaxes that they are stored in, against plain ones."""

import itertools
from functools import partial

import imagecodecs
import numpy as np
import pydicom
import pytest
from bodies import VOXELS, refused, same, series, stored, write_dicom
from pydicom.data import get_testdata_file
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan

RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_lossless_jpeg_is_the_plain_file(tmp_path, syntax, dtype):
    encode = imagecodecs.ljpeg_encode if "4.57" in syntax or "4.70" in syntax else imagecodecs.jpegls_encode
    info = np.iinfo(dtype)
    voxels = RNG.integers(info.min, info.max, VOXELS.shape, dtype, endpoint=True)
    bits = 8 * voxels.itemsize

    def compress(_index, data):
        encoded = encode(data.pixel_array.view(f"u{voxels.itemsize}"))
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = pydicom.encaps.encapsulate([encoded])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True

    about = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1}
    scan = open_scan(series(tmp_path / "jpeg", each=compress, voxels=voxels, **about))
    assert scan.dtype == dtype
    same(scan, voxels)


def test_signed_numbers_of_few_bits_in_lossless_jpeg_keep_their_sign(tmp_path):
    voxels = RNG.integers(-2048, 2048, VOXELS.shape, np.int16)

    def compress(_index, data):
        encoded = imagecodecs.ljpeg_encode(data.pixel_array.view(np.uint16) & 0xFFF, bitspersample=12)
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        data.PixelData = pydicom.encaps.encapsulate([encoded])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True

    same(open_scan(series(tmp_path / "ct", each=compress, voxels=voxels, BitsStored=12, HighBit=11)), voxels)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_colours_in_lossless_jpeg_are_the_plain_file(tmp_path, syntax):
    colours = RNG.integers(0, 256, (6, 5, 3), np.uint8)
    as_rgb = partial(imagecodecs.jpeg8_encode, lossless=True, colorspace="rgb", outcolorspace="rgb")
    lossless = as_rgb if syntax == JPEGLosslessSV1 else imagecodecs.jpegls_encode
    folder = write_dicom(tmp_path / "rgb", VOXELS[:1], np.eye(3))
    (file,) = folder.iterdir()
    data = pydicom.dcmread(file)
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = pydicom.encaps.encapsulate([lossless(colours)])
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.save_as(file)
    scan = open_scan(file)
    assert scan.dims == ("c", "y", "x")
    np.testing.assert_array_equal(scan, np.moveaxis(colours, -1, 0))


def test_deflated_slices_are_read_and_other_syntaxes_named(tmp_path):
    def in_syntax(syntax):
        return lambda _index, data: setattr(data.file_meta, "TransferSyntaxUID", syntax)

    same(open_scan(series(tmp_path / "deflated", each=in_syntax(DeflatedExplicitVRLittleEndian))))

    def film(_index, data):
        data.PixelData = pydicom.encaps.encapsulate([b"film"])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        data.file_meta.TransferSyntaxUID = MPEG2MPML

    refused(series(tmp_path / "film", each=film), r"syntax that can be decoded, got MPEG2 Main.* in .*; decompress it")


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
@pytest.mark.parametrize("kept", [0.02, 0.1, 0.5, 0.9])
def test_lossless_jpeg_that_is_cut_off_or_of_another_shape_is_refused(tmp_path, syntax, kept):
    encode = imagecodecs.ljpeg_encode if syntax == JPEGLosslessSV1 else imagecodecs.jpegls_encode
    voxels = RNG.integers(0, 4000, (1, 64, 48), np.uint16)

    def store(frame):
        def compress(_index, data):
            data.file_meta.TransferSyntaxUID = syntax
            data.PixelData = pydicom.encaps.encapsulate([frame])
            data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True

        return compress

    whole = encode(voxels[0])
    cut = series(tmp_path / "cut", voxels=voxels, each=store(whole[: int(kept * len(whole))]))
    cause = r".*its frame (has shape \(\)|is cut off)" if syntax == JPEGLSLossless else ""
    refused(cut, f"decodable, got {cause}")
    turned = series(tmp_path / "turned", voxels=voxels, each=store(encode(voxels[0].T.copy())))
    refused(turned, r"decodable, got .*its frame has shape \(48, 64\) instead of \(64, 48\)")


def test_files_of_others_in_jpeg_ls_are_their_plain_ones():
    plain, packed = (get_testdata_file(f"MR_small{name}.dcm", download=False) for name in ("", "_jpeg_ls_lossless"))
    np.testing.assert_array_equal(open_scan(packed), open_scan(plain))


def test_jpeg_of_twelve_bit_is_near_the_plain_file(tmp_path):
    y, x = np.mgrid[:64, :48]
    smooth = np.stack([(y * 40 + x * 20 + 50 * z) for z in range(3)]).astype(np.uint16)

    def compress(_index, data):
        encoded = imagecodecs.jpeg8_encode(data.pixel_array, level=98, bitspersample=12)
        data.file_meta.TransferSyntaxUID = JPEGExtended12Bit
        data.PixelData = pydicom.encaps.encapsulate([encoded])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True

    scan = open_scan(series(tmp_path / "ct", each=compress, voxels=smooth, BitsStored=12, HighBit=11))
    np.testing.assert_allclose(scan, smooth, atol=8)
