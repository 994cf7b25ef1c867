"""Moments: mean and deviation of each plane across a volume's first axis, added up block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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
            spread[at] = plane @ plane
        return cls(start, count, total, spread)


@dataclass(frozen=True, slots=True, eq=False)
class SliceStatistics:
    """Mean and standard deviation of each plane, float64 (channels, planes), in the scan's own intensity units."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @classmethod
    def merged(cls, blocks: Iterable[Moments], *, n_channels: int, n_planes: int) -> SliceStatistics:
        """Return the statistics from the moments of all blocks, each given once, added up without cancellation.

        By Chan, Golub and LeVeque 1983 (doi:10.1080/00031305.1983.10483115).
        """
        n = np.zeros(n_planes)
        mean, spread = np.zeros((2, n_channels, n_planes))
        for block in blocks:
            at = slice(block.start, block.start + block.total.shape[1])
            after = n[at] + block.count
            apart = block.total / block.count - mean[:, at]
            mean[:, at] += apart * (block.count / after)
            spread[:, at] += block.spread + apart**2 * (n[at] * block.count / after)
            n[at] = after
        if not n.all():
            raise ArgumentError(f"every plane needs a block, got none in plane {int(n.argmin())}; ingest again")
        return cls(mean, np.sqrt(spread / n))

    @property
    def sha256(self) -> str:
        """What tells these statistics from others."""
        return hashlib.sha256(np.stack([self.mean, self.std]).astype("<f8").tobytes()).hexdigest()
