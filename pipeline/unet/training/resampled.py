"""Resampled: where the voxels that a network sees lie in an image of another voxel size.

Both grids cover the same ground: they begin at the edge of the first voxel, not at its centre.

    image          | 0 | 1 | 2 | 3 | 4 | 5 |
    seen, step 2   |   0   |   1   |   2   |      seen voxel k lies at (k + 1/2) step - 1/2

An image is never resampled as a whole: each patch is, once, by the field that also augments it (``augment.Field``).
"""

from __future__ import annotations

from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box

_ALIKE = 0.01
_ABOUT_AS_LARGE = 1.5

Steps = tuple[float, ...]


def checked_size(voxel_size_um: tuple[float, ...]) -> tuple[float, ...]:
    """Return a voxel size, empty or (y, x) or (z, y, x) in um; refuse what is none."""
    if len(voxel_size_um) not in {0, 2, 3} or not all(0 < size < float("inf") for size in voxel_size_um):
        raise ArgumentError(
            f"voxel_size_um must be two or three lengths above 0, got {voxel_size_um}; give y and x, or z, y and x"
        )
    return voxel_size_um


def about_as_large(size_um: tuple[float, ...], other_um: tuple[float, ...]) -> bool:
    """Whether one network may see voxels of both sizes: along no axis is one of them over 1.5 times the other."""
    return all(max(a / b, b / a) <= _ABOUT_AS_LARGE for a, b in zip(size_um, other_um, strict=True))


def steps_between(size_um: tuple[float, ...], seen_um: tuple[float, ...]) -> Steps:
    """Return the voxels of an image per voxel that is seen, along every axis; none where all sizes agree.

    Sizes within a percent of each other agree: stored ones are rounded.
    """
    steps = tuple(seen / size for size, seen in zip(size_um, seen_um, strict=True))
    exact = tuple(1.0 if abs(step - 1) < _ALIKE else step for step in steps)
    return () if set(exact) == {1.0} else exact


def seen_region(region: Box, steps: Steps) -> Box:
    """Return the voxels seen whose centres lie in a region of the image, at least one along every axis."""
    if not steps:
        return region
    start = [ceil(a / step - 0.5) for a, step in zip(region.start, steps, strict=True)]
    stop = [ceil(b / step - 0.5) for b, step in zip(region.stop, steps, strict=True)]
    return Box(tuple(start), tuple(max(a + 1, b) for a, b in zip(start, stop, strict=True)))


def placed(box: Box, steps: Steps) -> tuple[Box, tuple[float, ...]]:
    """Return the box of the same shape that lies about where a box of voxels seen does, and what its centre lacks.

    Along every axis it is nearest: what lacks is at most half a voxel of the image.
    """
    starts, rests = [], []
    for a, n, step in zip(box.start, box.shape, steps, strict=True):
        exact = (a + n / 2) * step - n / 2
        starts.append(floor(exact + 0.5))
        rests.append(exact - starts[-1])
    return Box(tuple(starts), tuple(a + n for a, n in zip(starts, box.shape, strict=True))), tuple(rests)


def nearest(start: int, stop: int, step: float) -> NDArray[np.intp]:
    """Return the voxel of the image nearest to each voxel seen, which may lie outside the image."""
    at: NDArray[np.intp] = np.floor((np.arange(start, stop) + 0.5) * step).astype(np.intp)
    return at
