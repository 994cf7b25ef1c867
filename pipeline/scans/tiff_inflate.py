"""Long deflated strips of a TIFF, decoded some rows at a time: neither a strip nor its voxels are in memory whole."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.scans.files import Read
from pipeline.scans.lazy import damaged

_LONG_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_PIECE_BYTES = 16 << 20
_DEFLATE, _NO_PREDICTOR, _DIFFERENCES, _YCBCR = (8, 32946), 1, 2, 6


@dataclass(frozen=True, slots=True)
class Inflate:
    """Decodes strips of rows of plain voxels, or of their differences along the row, as tifffile's decoders do.

    Attributes
    ----------
    dtype : as in the file
    differences : whether each voxel but the first of a row is stored as its difference from the one before
    """

    path: str
    dtype: np.dtype[Any]
    differences: bool

    def __call__(
        self, read: Read, offset: int, count: int, shape: tuple[int, ...]
    ) -> Iterator[NDArray[Any]]:
        """Yield the voxels (depth 1, length, width, contiguous samples) of a strip, some rows after another.

        Parameters
        ----------
        offset, count : where the strip lies in the file, in bytes
        shape : of all its voxels
        """
        _, n_left, *row = shape
        row_bytes, pending = math.prod(row) * self.dtype.itemsize, bytearray()
        for piece in self._inflated(read, offset, count):
            pending += piece
            n_rows = min(len(pending) // row_bytes, n_left)
            if n_rows:
                yield self._voxels(bytes(pending[: n_rows * row_bytes]), (1, n_rows, *row))
                del pending[: n_rows * row_bytes]
                n_left -= n_rows
            if not n_left:
                return  # what follows is padding
        raise damaged(self.path, cause=f"the strip at byte {offset} lacks {n_left} of {shape[1]} rows")

    def _inflated(self, read: Read, offset: int, count: int) -> Iterator[bytes]:
        """Yield what comes of a strip, in pieces of bounded size."""
        inflate = zlib.decompressobj()
        for start in range(0, count, _READ_BYTES):
            data = read(offset + start, min(_READ_BYTES, count - start))
            while data and not inflate.eof:
                yield inflate.decompress(data, _PIECE_BYTES)
                data = inflate.unconsumed_tail
        yield inflate.flush()

    def _voxels(self, data: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
        voxels = np.frombuffer(data, self.dtype).reshape(shape).astype(self.dtype.newbyteorder("="), copy=False)
        return np.asarray(imagecodecs.delta_decode(voxels, axis=2)) if self.differences else voxels


def inflate_for(key: Any, *, path: str, dtype: np.dtype[Any]) -> Inflate | None:  # noqa: ANN401 tifffile is not typed
    """Return how strips of pages like this one are decoded, or None where they are short or of another kind."""
    plain = (
        key.compression in _DEFLATE and key.predictor in (_NO_PREDICTOR, _DIFFERENCES) and key.fillorder == 1
        and key.photometric != _YCBCR and key.shaped[1] == 1 and key.bitspersample == 8 * dtype.itemsize
        and key.dtype == dtype.newbyteorder("=") and (dtype.kind in "iu" or key.predictor == _NO_PREDICTOR)
    )  # fmt: skip
    strip_bytes = min(key.rowsperstrip, key.shaped[2]) * math.prod(key.shaped[3:]) * dtype.itemsize
    if key.is_tiled or not plain or strip_bytes < _LONG_BYTES:
        return None
    return Inflate(path, dtype, key.predictor == _DIFFERENCES)
