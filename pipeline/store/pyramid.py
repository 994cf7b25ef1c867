"""Pyramids, level by level and shard by shard: means for intensities, modes for labels (never averaged)."""

from __future__ import annotations

from enum import StrEnum
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable
from pipeline.store.arrays import Layout, create_array
from pipeline.store.location import Location
from pipeline.store.ngff import Level


class Downsampling(StrEnum):
    """How the voxels under one voxel of the next level become one."""

    MEAN = "mean"
    MODE = "mode"


def downsample(voxels: NDArray[Any], factors: tuple[int, ...], how: Downsampling) -> NDArray[Any]:
    """Return the array with its last axes shrunk by ``factors`` (1 or 2), sizes rounded up, dtype kept.

    A voxel at an odd end stands for itself alone. Means of integers are rounded half to even; of labels that are
    equally frequent the smallest is taken.
    """
    front = voxels.ndim - len(factors)
    pad = [(0, 0)] * front + [(0, -n % f) for n, f in zip(voxels.shape[front:], factors, strict=True)]
    padded = np.pad(voxels, pad, mode="edge")
    return _mean(padded, factors) if how is Downsampling.MEAN else _mode(padded, factors)


def _neighbours(padded: NDArray[Any], factors: tuple[int, ...]) -> list[NDArray[Any]]:
    """Return for each position within a cell the view of all voxels at that position."""
    every = (slice(None),) * (padded.ndim - len(factors))
    return [
        padded[every + tuple(slice(o, None, f) for o, f in zip(offset, factors, strict=True))]
        for offset in product(*(range(f) for f in factors))
    ]


def _mean(padded: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    views = _neighbours(padded, factors)
    total = views[0].astype(np.float64)
    for view in views[1:]:
        total += view
    total /= len(views)
    return (np.rint(total) if padded.dtype.kind in "iu" else total).astype(padded.dtype)


def _mode(padded: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    """Return the modes; most cells of labels lie inside one object, and need no votes."""
    views = _neighbours(padded, factors)
    best = views[0].copy()
    mixed = np.zeros(best.shape, dtype=np.bool_)
    for view in views[1:]:
        mixed |= view != views[0]
    best[mixed] = _voted([view[mixed] for view in views])
    return best


def _voted(views: list[NDArray[Any]]) -> NDArray[Any]:
    best = views[0].copy()
    votes = np.zeros(best.shape, dtype=np.uint8)
    for view in views:
        count = np.zeros(best.shape, dtype=np.uint8)
        for other in views:
            count += view == other
        better = (count > votes) | ((count == votes) & (view < best))
        np.copyto(best, view, where=better)
        np.copyto(votes, count, where=better)
    return best


def read_downsampled(
    source: Sliceable, core: Box, *, factors: tuple[int, ...], how: Downsampling, depth: int
) -> NDArray[Any]:
    """Return the voxels of ``core``, a box of the coarser level, from the finer one: (..., *core.shape).

    Reads ``depth`` planes of the coarser level at a time, so that only one slab of the finer level is in memory.
    """
    front = len(source.shape) - core.ndim
    planes = []
    for top in range(core.start[0], core.stop[0], depth):
        part = Box((top, *core.start[1:]), (min(top + depth, core.stop[0]), *core.stop[1:]))
        above = _above(part, factors, source.shape[front:])
        planes.append(downsample(np.asarray(source[(slice(None),) * front + above.slices]), factors, how))
    return np.concatenate(planes, axis=front)


def _above(box: Box, factors: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    """Return the voxels of the finer level that lie under a box of the coarser one."""
    return Box(
        tuple(a * f for a, f in zip(box.start, factors, strict=True)),
        tuple(b * f for b, f in zip(box.stop, factors, strict=True)),
    ).clip(shape)


def create_levels(
    location: Location, levels: tuple[Level, ...], *, front: tuple[int, ...], dtype: np.dtype[Any], layout: Layout,
    axes: str,
) -> None:
    """Make the arrays of all levels that are not there yet; the only writer of their metadata."""
    for level in levels:
        if not (location / level.path / "zarr.json").exists():
            create_array(
                location / level.path, shape=front + level.shape, dtype=dtype, layout=layout, axes=tuple(axes)
            )
