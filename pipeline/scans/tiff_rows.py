"""Long strips of a TIFF that are not compressed, seen as many short ones, so that only rows that count are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHORT_BYTES = 256 << 10
_LONG_BYTES = 1 << 20
_UNCOMPRESSED, _YCBCR = 1, 6


@dataclass(frozen=True, slots=True)
class Rows:
    """How the pages of an image are cut into short strips; decodes one as tifffile's decoders do.

    Attributes
    ----------
    dtype : as in the file
    page_shape : separate samples, depth (1), length, width, contiguous samples
    n_rows_before : of a strip in the file; the last one of a page may have fewer
    n_rows : of a short strip, likewise; they divide those of a strip, unless a page is one strip
    """

    dtype: np.dtype[Any]
    page_shape: tuple[int, ...]
    n_rows_before: int
    n_rows: int

    @property
    def segment_shape(self) -> tuple[int, ...]:
        """Voxels along the page's five axes."""
        return 1, 1, self.n_rows, *self.page_shape[3:]

    @property
    def row_bytes(self) -> int:
        """Of one row of a page."""
        return math.prod(self.page_shape[3:]) * self.dtype.itemsize

    def fit(self, counts: tuple[int, ...]) -> bool:
        """Whether strips of so many bytes hold all of their rows: none was left out, and none is short."""
        n_strips = math.ceil(self.page_shape[2] / self.n_rows_before)
        rows = [min(self.n_rows_before, self.page_shape[2] - n * self.n_rows_before) for n in range(n_strips)]
        return list(counts) == [n * self.row_bytes for n in rows] * self.page_shape[0]

    def places(self, offsets: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return where the short strips of a page begin, and their bytes, from where its strips begin."""
        length, per_sample = self.page_shape[2], len(offsets) // self.page_shape[0]
        starts, counts = list[int](), list[int]()
        for sample in range(self.page_shape[0]):
            for row in range(0, length, self.n_rows):
                strip, inside = divmod(row, self.n_rows_before)
                starts.append(offsets[sample * per_sample + strip] + inside * self.row_bytes)
                counts.append(min(self.n_rows, length - row) * self.row_bytes)
        return tuple(starts), tuple(counts)

    def __call__(
        self, data: bytes | None, segment: int, /
    ) -> tuple[NDArray[Any] | None, tuple[int, ...], tuple[int, ...]]:
        """Return voxels (depth, length, width, contiguous samples), where they begin in the page, and their shape."""
        length = self.page_shape[2]
        sample, strip = divmod(segment, math.ceil(length / self.n_rows))
        first = strip * self.n_rows
        shape = (1, min(self.n_rows, length - first), *self.page_shape[3:])
        voxels = None if data is None else np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape)
        return voxels, (sample, 0, first, 0, 0), shape


def short_strips(key: Any, *, dtype: np.dtype[Any]) -> Rows | None:  # noqa: ANN401 tifffile is not typed
    """Return how pages like this one are cut, or None where their strips are short, or hold more than plain voxels."""
    length = key.shaped[2]
    plain = (
        key.compression == _UNCOMPRESSED and key.predictor == key.fillorder == 1 and key.photometric != _YCBCR
        and key.shaped[1] == 1 and key.bitspersample == 8 * dtype.itemsize and key.dtype == dtype.newbyteorder("=")
    )  # fmt: skip
    whole = Rows(dtype, key.shaped, min(key.rowsperstrip, length), length)
    if key.is_tiled or not plain or whole.n_rows_before * whole.row_bytes < _LONG_BYTES:
        return None
    most = max(1, _SHORT_BYTES // whole.row_bytes)
    n_rows = most if whole.n_rows_before == length else next(
        n for n in range(most, 0, -1) if whole.n_rows_before % n == 0
    )  # fmt: skip
    return replace(whole, n_rows=n_rows)
