"""MappedSource: voxels that lie uncompressed and in one piece in a file, on a disk or behind a URL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.files import about, fetched, is_remote
from pipeline.scans.lazy import damaged

LINE = 128  # voxels of one
_LARGEST_GAP_BYTES = 16 << 10  # between two lines that are fetched as one
_AT_ONCE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class MappedSource:
    """Voxels from byte ``offset`` of a file on, in C or Fortran order; see VoxelSource.

    The file is mapped anew for each read: no handle lives on, whatever thread, fork or pickle the source goes through.
    Of a remote one the lines that are wanted are fetched.
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"] = "C"

    def __post_init__(self) -> None:
        needed = self.offset + math.prod(self.shape) * self.dtype.itemsize
        size, _ = about(self.path)
        if needed > size:
            raise damaged(self.path, cause=f"its voxels end at byte {needed}, the file at byte {size}")

    @property
    def chunks(self) -> tuple[int, ...]:
        """Any voxel can be read alone; so many along the fastest axis are worth a read."""
        line = len(self.shape) - 1 if self.order == "C" else 0
        return tuple(min(n, LINE) if axis == line else 1 for axis, n in enumerate(self.shape))

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return a copy of the voxels under the slices."""
        if is_remote(self.path):
            return self._fetched(slices) if self.order == "C" else self._fetched(slices[::-1]).T
        voxels = np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape, order=self.order
        )
        return np.array(voxels[slices])

    def _fetched(self, slices: tuple[slice, ...]) -> NDArray[Any]:
        """Return the voxels under slices along the axes as they lie in the file, the fastest last."""
        size = self.dtype.itemsize
        shape = self.shape if self.order == "C" else self.shape[::-1]
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        lengths = tuple(s.stop - s.start for s in slices)
        starts = np.zeros(1, np.int64)
        for part, step in zip(slices[:-1], steps[:-1], strict=True):
            starts = (starts[:, np.newaxis] + step * np.arange(part.start, part.stop)).ravel()
        starts = self.offset + size * (starts + slices[-1].start)
        voxels = np.empty((len(starts), lengths[-1]), self.dtype)
        line = size * lengths[-1]
        for part in _batches(starts, line):
            self._fill(voxels[part], starts[part], line=line)
        return voxels.reshape(lengths)

    def _fill(self, voxels: NDArray[Any], starts: NDArray[np.int64], *, line: int) -> None:
        """Fetch lines of so many bytes from these places on; near ones in one piece."""
        ends = np.flatnonzero(np.diff(starts) - line > _LARGEST_GAP_BYTES) + 1
        groups = np.split(np.arange(len(starts)), ends)
        spans = [(int(starts[each[0]]), int(starts[each[-1]]) + line) for each in groups]
        for each, (begin, stop), found in zip(groups, spans, fetched(self.path, spans), strict=True):
            if len(found) < stop - begin:
                raise damaged(self.path, cause=f"it ends at byte {begin + len(found)}, its voxels at byte {stop}")
            for index in each:
                voxels[index] = np.frombuffer(found, self.dtype, voxels.shape[1], int(starts[index]) - begin)


def _batches(starts: NDArray[np.int64], line: int) -> Iterator[slice]:
    """Yield the lines in parts that are fetched at once, of bounded size together with what lies between them."""
    costs = np.minimum(np.diff(starts, append=starts[-1] + line), line + _LARGEST_GAP_BYTES)
    batches = np.cumsum(costs) // _AT_ONCE_BYTES
    edges = [0, *(np.flatnonzero(np.diff(batches)) + 1).tolist(), len(starts)]
    for begin, end in pairwise(edges):
        yield slice(begin, end)
