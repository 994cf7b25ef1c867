"""PNG and JPEG pictures: y, x or c, y, x (RGB, RGBA: all channels are kept), decoded whole and remembered for a while.

Palettes become colours and fewer than 8 bits become 8, as the decoder does; a camera's rotation mark is not applied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.scans.axes import arrange
from pipeline.scans.cache import DECODED
from pipeline.scans.lazy import LazyScan, damaged

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_NO_FRAME = {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class PictureSource:
    """The voxels of one picture; see VoxelSource."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    stamp: tuple[int, int]

    @property
    def chunks(self) -> tuple[int, ...]:
        """A picture is decoded as a whole."""
        return self.shape

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return a copy of the voxels under the slices."""
        in_part = any(s.stop - s.start < n for s, n in zip(slices, self.shape, strict=True))
        voxels = decoded(self.path, stamp=self.stamp, again=in_part)
        if voxels.shape != self.shape or voxels.dtype != self.dtype:
            raise damaged(self.path, cause=f"it changed to {voxels.shape} {voxels.dtype} since it was opened")
        return np.array(voxels[slices])


def open_picture(path: str, /) -> LazyScan:
    """Return the scan in a PNG or JPEG file; neither tells a voxel size that was measured.

    Raises
    ------
    ScanError : the file is cut off or cannot be decoded.
    """
    stat = Path(path).stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    voxels = decoded(path, stamp=stamp)
    source = PictureSource(path, voxels.dtype, voxels.shape, stamp)
    return arrange(source, axes="YXS"[: voxels.ndim], path=path, format_name=_kind(path))


def decoded(path: str, *, stamp: tuple[int, int], again: bool = False) -> NDArray[Any]:
    """Return a picture (y, x) or (y, x, c); ``again`` is of ``SegmentCache``."""

    def make() -> NDArray[Any]:
        data = Path(path).read_bytes()
        return _decoder(data)(data, path)

    return DECODED.get((path, stamp), make, again=again)


def header(path: str, /) -> tuple[int, ...]:
    """Return (height, width, bits, kind of colour) of a picture, from its header alone."""
    with Path(path).open("rb") as file:
        start = file.read(26)
        if start.startswith(PNG_MAGIC) and len(start) == 26:
            width, height, bits, colour = struct.unpack(">IIBB", start[16:26])
            return height, width, bits, colour
        if start.startswith(JPEG_MAGIC):
            file.seek(2)
            return _jpeg_frame(file, path)
    raise damaged(path, cause="it is neither PNG nor JPEG")


def _kind(path: str) -> str:
    with Path(path).open("rb") as file:
        return "PNG" if file.read(8) == PNG_MAGIC else "JPEG"


def _decoder(data: bytes) -> Callable[[bytes, str], NDArray[Any]]:
    return _decode_png if data.startswith(PNG_MAGIC) else _decode_jpeg


def _decode_png(data: bytes, path: str) -> NDArray[Any]:
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except (RuntimeError, ValueError) as error:
        raise damaged(path, cause=str(error)) from error


def _decode_jpeg(data: bytes, path: str) -> NDArray[Any]:
    # libjpeg paints what is missing of a cut-off file grey, without an error.
    if data.rfind(_JPEG_END) < data.rfind(b"\xff\xda"):
        raise damaged(path, cause="the end of the JPEG data is missing")
    try:
        return np.asarray(imagecodecs.jpeg_decode(data))
    except (RuntimeError, ValueError) as error:
        raise damaged(path, cause=str(error)) from error


def _jpeg_frame(file: Any, path: str) -> tuple[int, ...]:  # noqa: ANN401 any binary file
    """Walk the segments of a JPEG up to its frame header."""
    while (mark := file.read(2)) and len(mark) == 2 and mark[0] == 0xFF:
        code = mark[1]
        if code in _NO_LENGTH:
            continue
        length = int.from_bytes(file.read(2), "big")
        if 0xC0 <= code <= 0xCF and code not in _NO_FRAME:
            bits, height, width, channels = struct.unpack(">BHHB", file.read(6))
            return height, width, bits, channels
        file.seek(length - 2, 1)
    raise damaged(path, cause="it has no JPEG frame header")
