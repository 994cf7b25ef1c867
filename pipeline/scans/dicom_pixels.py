"""What pydicom reads of a DICOM file: its header, and the numbers of a frame, with imagecodecs where it has no decoder.

Lossless JPEG, JPEG-LS and JPEG of 12 bit need other packages in pydicom; imagecodecs is here already.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.files import has_preamble, is_bare_dicom_file
from pipeline.scans.lazy import damage_named, damaged

try:
    import pydicom
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array
except ImportError as missing:
    raise ScanError(
        'DICOM scans need the package pydicom, which is missing; pip install "haloseg[medical]"'
    ) from missing

_DECODERS = {
    uid.JPEGLossless: imagecodecs.ljpeg_decode,
    uid.JPEGLosslessSV1: imagecodecs.ljpeg_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode,
}
_END = b"\xff\xd9"
_MARK, _FRAME_HEADERS = 0xFF, {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
DECODER_DEPENDENCIES = dict.fromkeys(_DECODERS, ("imagecodecs",))  # asked for by pydicom, as is is_available


def is_available(syntax: str) -> bool:
    """Whether frames of a transfer syntax are decoded here."""
    return syntax in _DECODERS


def decode_frame(encoded: bytes, runner: Any) -> bytearray:  # noqa: ANN401 pydicom's DecodeRunner
    """Return the numbers of a frame, which are all there; tells pydicom how they lie."""
    if (shape := _shape(encoded)) != (runner.rows, runner.columns):
        raise ValueError(f"its frame has shape {shape} instead of {(runner.rows, runner.columns)}")
    is_jpeg_ls = runner.transfer_syntax in uid.JPEGLSTransferSyntaxes
    if is_jpeg_ls and _END not in encoded[-16:]:  # CharLS looks for what is missing for seconds
        raise ValueError("its frame is cut off")
    numbers = np.asarray(_DECODERS[runner.transfer_syntax](encoded))
    if numbers.ndim == 3:
        runner.set_option("planar_configuration", 0 if numbers.shape[-1] == runner.samples_per_pixel else 1)
    runner.set_option("bits_allocated", 8 * numbers.itemsize)
    if runner.pixel_representation and not is_jpeg_ls:
        numbers = _signed(numbers, n_bits=runner.bits_stored)
    return bytearray(numbers.tobytes())


def _shape(encoded: bytes) -> tuple[int, ...]:
    """Return the rows and columns that a JPEG tells; none if it is cut off before."""
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == _MARK:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4])
        if marker in _FRAME_HEADERS:
            return int.from_bytes(encoded[at + 5 : at + 7]), int.from_bytes(encoded[at + 7 : at + 9])
        at += 1 if marker == _MARK else 2 + length  # a mark may be repeated
    return ()


def _signed(numbers: NDArray[Any], *, n_bits: int) -> NDArray[Any]:
    """Return numbers whose highest bit is their sign as signed ones; pydicom does so for JPEG-LS alone."""
    spare = 8 * numbers.itemsize - n_bits
    shifted: NDArray[Any] = (numbers << spare).view(f"i{numbers.itemsize}") >> spare
    return shifted


for _syntax in _DECODERS:
    get_decoder(_syntax).add_plugin("haloseg", (__name__, decode_frame.__name__))


def header_of(path: str) -> Any:  # noqa: ANN401 pydicom's data set
    """Return a file's data set without its pixels."""
    if not has_preamble(path) and not is_bare_dicom_file(path):
        raise damaged(path, cause="it does not begin as DICOM does")
    with damage_named(path):
        return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def volume_of(header: Any) -> str:  # noqa: ANN401
    """Return the UID of the volume that a file of many frames is, or is a part of; empty of a single slice."""
    if int(header.get("NumberOfFrames", 1) or 1) < 2:
        return ""
    return str(header.get("ConcatenationUID", "") or header.get("SOPInstanceUID", "") or header.filename)


def is_volume(path: str) -> bool:
    """Whether a file is a volume of its own; not if it is a slice, a part of a concatenation, or cannot be read."""
    try:
        header = pydicom.dcmread(path, specific_tags=["NumberOfFrames", "ConcatenationUID"], stop_before_pixels=True)
        return bool(volume_of(header)) and "ConcatenationUID" not in header
    except Exception:  # noqa: BLE001 whoever reads it says what is wrong
        return False


def syntax_of(path: str, header: Any) -> str:  # noqa: ANN401
    """Return the transfer syntax of a file, guessed as pydicom does where it tells none.

    Raises
    ------
    ScanError : its frames cannot be decoded.
    """
    told = header.file_meta.get("TransferSyntaxUID")
    if not told:
        is_implicit, is_little = header.original_encoding
        plain = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        told = uid.ImplicitVRLittleEndian if is_implicit else plain
    if not _is_decodable(told):
        raise ScanError(
            f"a DICOM scan must be of a transfer syntax that can be decoded, got {told.name} in {path}; decompress it, "
            "with gdcmconv --raw say"
        )
    return str(told)


def _is_decodable(syntax: Any) -> bool:  # noqa: ANN401
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def decoded(path: str, *, index: int, syntax: str) -> NDArray[Any]:
    """Return the stored numbers of a frame, (y, x) or (y, x, c)."""
    if syntax == uid.DeflatedExplicitVRLittleEndian:  # pydicom 3.0 finds no frame of these in a file
        return np.asarray(pixel_array(pydicom.dcmread(path), index=index))
    return np.asarray(pixel_array(path, index=index, transfer_syntax_uid=syntax))
