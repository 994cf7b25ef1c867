"""Moments: mean and deviation of each plane across a volume's first axis, added up block by block."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What one block adds to the statistics of the planes that it meets.

    Attributes
    ----------
    start : the first of these planes
    count : voxels of each plane in the block
    total, spread : float64 (channels, planes): sum of the intensities, and of their squared distances from the mean
    """

    start: int
    count: int
    total: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, voxels: NDArray[Any], *, start: int) -> Moments:
        """Return the moments of a block's voxels, (channels, z, y, x), whose first plane is ``start``."""
        count = int(np.prod(voxels.shape[2:]))
        total, spread = np.empty((2, *voxels.shape[:2]))
        for at in np.ndindex(voxels.shape[:2]):
            plane = voxels[at].astype(np.float64).ravel()
            total[at] = plane.sum()
            plane -= total[at] / count
            spread[at] = np.square(plane, out=plane).sum()  # not by BLAS, whose threads spin and round by their number
        return cls(start, count, total, spread)


@dataclass(frozen=True, slots=True, eq=False)
class SliceStatistics:
    """Mean and standard deviation of each plane, float64 (channels, planes), in the scan's own intensity units."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def sha256(self) -> str:
        """What tells these statistics from others."""
        return hashlib.sha256(np.stack([self.mean, self.std]).astype("<f8").tobytes()).hexdigest()


class PlaneSums:
    """The sum of all blocks' moments so far, each added once.

    By Chan, Golub and LeVeque 1983 (doi:10.1080/00031305.1983.10483115): without cancellation.
    """

    def __init__(self, *, n_channels: int, n_planes: int) -> None:
        self._n = np.zeros(n_planes)
        self._mean, self._spread = np.zeros((2, n_channels, n_planes))

    def add(self, block: Moments) -> None:
        """Add the moments of one more block."""
        at = slice(block.start, block.start + block.total.shape[1])
        before, after = self._n[at], self._n[at] + block.count
        apart = block.total / block.count - self._mean[:, at]
        self._spread[:, at] += block.spread + apart**2 * (before * block.count / after)
        self._mean[:, at] += apart * (block.count / after)
        self._n[at] = after

    def statistics(self) -> SliceStatistics:
        """Return the statistics of each plane.

        Raises
        ------
        ArgumentError : no block met a plane.
        """
        if not self._n.all():
            raise ArgumentError(f"every plane needs a block, got none in plane {int(self._n.argmin())}; ingest again")
        return SliceStatistics(self._mean, np.sqrt(self._spread / self._n))
