"""MappedSource: voxels that lie uncompressed and in one piece in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.lazy import damaged


@dataclass(frozen=True, slots=True)
class MappedSource:
    """Voxels from byte ``offset`` of a file on, in C or Fortran order; see VoxelSource.

    The file is mapped anew for each read: no handle lives on, whatever thread, fork or pickle the source goes through.
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"] = "C"

    def __post_init__(self) -> None:
        needed = self.offset + math.prod(self.shape) * self.dtype.itemsize
        size = Path(self.path).stat().st_size
        if needed > size:
            raise damaged(self.path, cause=f"its voxels end at byte {needed}, the file at byte {size}")

    @property
    def chunks(self) -> tuple[int, ...]:
        """Lines along the fastest axis can be read alone."""
        line = len(self.shape) - 1 if self.order == "C" else 0
        return tuple(n if axis == line else 1 for axis, n in enumerate(self.shape))

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return a copy of the voxels under the slices."""
        voxels = np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape, order=self.order
        )
        return np.array(voxels[slices])
