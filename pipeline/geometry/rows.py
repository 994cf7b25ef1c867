"""Rows: a column of a volume read along one axis, mirrored outside the volume, each chunk once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable, mirror_index, read_mirrored


class MirroredRows:
    """Reads rows of a column; what was read lately is kept, so that mirrored rows cost no second read.

        chunk      |-------|-------|-------|      read whole, across the column, when the first of its rows is wanted
        rows       h h h 0 1 2 3 4 ...            outside the volume: rows that are in memory already

    Parameters
    ----------
    array : shape (..., *spatial)
    axis : the spatial axis along which rows are counted
    column : what to read across it, one range per spatial axis; that of ``axis`` says which rows will be asked for
    step : rows of a chunk of the array
    keep_all : keep every row that was read, since the column will be read several times
    """

    def __init__(self, array: Sliceable, *, axis: int, column: Box, step: int, keep_all: bool = False) -> None:
        self._array, self._axis, self.column, self._step = array, axis, column, step
        self._n_front = len(array.shape) - column.ndim
        self._n_rows = array.shape[self._n_front + axis]
        self._keep_all = keep_all
        self._pieces: dict[int, NDArray[Any]] = {}
        self.n_voxels_read = 0

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``, shape (..., *column with stop - start along the axis)."""
        at = mirror_index(start, stop, self._n_rows)
        numbers = np.unique(at // self._step).tolist()
        axis = self._n_front + self._axis
        parts = [self._piece(number) for number in numbers]
        if not self._keep_all:
            self._forget(stop, used=set(numbers))
        if len(parts) == 1 and start >= 0 and stop <= self._n_rows:
            first = numbers[0] * self._step
            return parts[0][(slice(None),) * axis + (slice(start - first, stop - first),)]
        joined: NDArray[Any] = np.concatenate(parts, axis=axis)
        taken: NDArray[Any] = joined.take(at - numbers[0] * self._step, axis=axis)
        return taken

    def _piece(self, number: int) -> NDArray[Any]:
        """Return all rows of a chunk, mirrored across the column."""
        if number not in self._pieces:
            start, stop = list(self.column.start), list(self.column.stop)
            start[self._axis] = number * self._step
            stop[self._axis] = min(self._n_rows, (number + 1) * self._step)
            box = Box(tuple(start), tuple(stop))
            self._pieces[number] = read_mirrored(self._array, box)
            self.n_voxels_read += box.clip(tuple(self._array.shape[self._n_front :])).n_voxels
        return self._pieces[number]

    def _forget(self, stop: int, *, used: set[int]) -> None:
        """Drop the chunks that no later row shows; the volume's end shows its last rows twice."""
        later = mirror_index(stop, max(stop, self.column.stop[self._axis]), self._n_rows)
        wanted = used | set(np.unique(later // self._step).tolist())
        for number in [each for each in self._pieces if each not in wanted]:
            del self._pieces[number]
