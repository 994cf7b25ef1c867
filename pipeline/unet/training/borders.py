"""Borders: instances as classes with a gap between those that touch, and the weights that make a network learn the gap.

    instances   1 1 1 2 2 2 0 0 3 3
    classes     1 1 0 0 1 1 0 0 1 1     voxels beside another instance become background
    weights     . . * * . . + + . .     of the background, the higher the nearer to two instances

Ronneberger et al. 2015, doi:10.1007/978-3-319-24574-4_28. Both are computed as they are read, from as many voxels
around as they depend on, so that any part is the same as that part of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import Sliceable

REACH = 4.0  # standard deviations of d1 + d2 beyond which weights are zero: there, less than 0.0004 of the border's
_BLOCK_VOXELS = 2**20
_FAR = np.float32(np.inf)


@dataclass(frozen=True, slots=True)
class Separated:
    """Instances as classes, int8: 1 inside them, 0 elsewhere and where another instance is a neighbour, -1 ignored.

    Neighbours are all of the 3 x 3 (x 3) voxels around, the structuring element of a dilation. A voxel inside that has
    a neighbour in a gap, and one that nobody has labelled, is ignored, too: that one may be of another instance. Of
    FIB-25 with every tenth slice labelled, half of these voxels are gaps, a third of all gaps there; of the others that
    are inside as far as is labelled, 2 %.

    Attributes
    ----------
    instances : integers, shape (*spatial); 0 is the background
    axes : those along which instances are told apart; the network's
    ignore : value of voxels that nobody has labelled, None where there is none
    """

    instances: Sliceable
    axes: tuple[int, ...]
    ignore: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.instances.shape

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.int8]:
        """Return the classes under the slices."""
        box = _box(index, self.shape)
        n_steps = 1 if self.ignore is None else 2
        around = box.grow(tuple(n_steps * (axis in self.axes) for axis in range(box.ndim))).clip(self.shape)
        ids = np.asarray(self.instances[around.slices])
        classes = separated(ids, axes=self.axes, ignore=self.ignore)
        if self.ignore is not None:
            gaps, unknown = (classes == 0) & (ids != 0), classes < 0
            unsure = (classes == 1) & beside(gaps, axes=self.axes) & beside(unknown, axes=self.axes)
            classes[unsure] = -1
        return classes[box.inside(around)]


@dataclass(frozen=True, slots=True)
class Borders:
    """What is added to the weight of each voxel, float32: ``highest exp(-(d1 + d2)^2 / (2 sigma^2))``, background only.

    d1 and d2 are the distances to the nearest instance and to the second nearest, from voxel to voxel. Where they add
    up to more than four sigma the weight is zero, so that it depends on the voxels around only.

    Attributes
    ----------
    instances, axes, ignore : see Separated, whose gaps belong to the background
    spacing : distance of voxels along every axis, in voxels of the finest
    highest : the paper's w0; sigma: in voxels of the finest axis
    """

    instances: Sliceable
    axes: tuple[int, ...]
    spacing: tuple[float, ...]
    highest: float
    sigma: float
    ignore: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.instances.shape

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.float32]:
        """Return the weights under the slices."""
        box, most = _box(index, self.shape), REACH * self.sigma
        reach = tuple(int(most / s) if axis in self.axes else 0 for axis, s in enumerate(self.spacing))
        around = box.grow(tuple(r + 1 if r else 0 for r in reach)).clip(self.shape)
        ids = np.asarray(self.instances[around.slices])
        inside = separated(ids, axes=self.axes, ignore=self.ignore) == 1
        total = sum_of_two(np.where(inside, ids, 0), reach=reach, spacing=self.spacing)
        weights = np.where(total <= most, self.highest * np.exp(-0.5 * (total / self.sigma) ** 2), 0.0)
        weights[inside] = 0
        return weights[box.inside(around)].astype(np.float32)


def separated(
    ids: NDArray[Any], *, axes: tuple[int, ...], ignore: int | None = None
) -> NDArray[np.int8]:
    """Return the classes of instances, int8: 1 inside, 0 outside and beside another instance, -1 ignored."""
    unknown = np.zeros(ids.shape, bool) if ignore is None else ids == ignore
    inside = (ids != 0) & ~unknown
    alone = inside.copy()
    for here, there in _neighbours(ids.ndim, axes):
        alone[here] &= ~inside[there] | (ids[here] == ids[there])
    return np.where(unknown, -1, alone).astype(np.int8)


def beside(mask: NDArray[np.bool_], *, axes: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which voxels are in a mask or have a neighbour there, along these axes."""
    near = mask.copy()
    for here, there in _neighbours(mask.ndim, axes):
        near[here] |= mask[there]
    return near


def sum_of_two(
    ids: NDArray[Any], *, reach: tuple[int, ...], spacing: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return the sum of the distances to the nearest and the second nearest instance; inf where two are not in reach.

    Axis by axis, each voxel keeps its two nearest instances among those that voxels along the axis keep: squares of
    distances add up over axes, and the third of a line is never among the two nearest of any voxel. Exact, and as much
    work for a thousand instances as for two.

    Parameters
    ----------
    ids : 0 is background
    reach : voxels along each axis that are looked at, to either side; 0 leaves an axis out
    spacing : distance of voxels along each axis
    """
    _, dense = np.unique(np.append(ids.ravel(), 0), return_inverse=True)
    first = (dense[:-1] - dense[-1]).reshape(ids.shape).astype(np.int32)
    best: tuple[NDArray[Any], ...] = (
        np.where(first != 0, np.float32(0), _FAR), first, np.full(ids.shape, _FAR), np.zeros_like(first)
    )  # fmt: skip
    for axis, (n_steps, apart) in enumerate(zip(reach, spacing, strict=True)):
        before, best = best, tuple(each.copy() for each in best)
        for step in range(-n_steps, n_steps + 1):
            if step and abs(step) < ids.shape[axis]:
                here, there = _pair(tuple(step if each == axis else 0 for each in range(ids.ndim)))
                merged = tuple(each[here] for each in best)
                for k in (0, 2):
                    merged = _merged(merged, before[k][there] + np.float32((step * apart) ** 2), before[k + 1][there])
                for part, value in zip(best, merged, strict=True):
                    part[here] = value
    return np.sqrt(best[0].astype(np.float64)) + np.sqrt(best[2].astype(np.float64))


def in_memory(array: Sliceable) -> NDArray[Any]:
    """Return all of what is computed as it is read, made block by block."""
    shape = array.shape
    side = max(1, round(_BLOCK_VOXELS ** (1 / sum(n > 1 for n in shape)))) if max(shape) > 1 else 1
    grid = BlockGrid(shape, tuple(min(n, side) for n in shape))
    out: NDArray[Any] | None = None
    for block in grid:
        part = np.asarray(array[block.core.slices])
        if out is None:
            out = np.empty(shape, part.dtype)
        out[block.core.slices] = part
    assert out is not None
    return out


def _merged(best: tuple[NDArray[Any], ...], far: NDArray[Any], who: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return the two nearest instances, (distance, instance) twice, of two and a third one."""
    d1, i1, d2, i2 = best
    same, nearer = who == i1, far < d1
    second = (far < d2) & ~same
    return (
        np.where(nearer, far, d1), np.where(nearer, who, i1),
        np.where(nearer & ~same, d1, np.where(second, far, d2)),
        np.where(nearer & ~same, i1, np.where(second, who, i2)),
    )  # fmt: skip


def _neighbours(n_axes: int, axes: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield slices of voxels and of their neighbours, for each of the 3 x 3 (x 3) around along these axes."""
    for step in product(*((-1, 0, 1) if axis in axes else (0,) for axis in range(n_axes))):
        yield _pair(step)


def _pair(step: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return slices of all voxels that have a neighbour this step away, and of these neighbours."""
    here = tuple(slice(max(0, -s), -s if s > 0 else None) for s in step)
    there = tuple(slice(max(0, s), s if s < 0 else None) for s in step)
    return here, there


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    spans = [each.indices(n) for each, n in zip(index, shape, strict=True)]
    return Box(tuple(a for a, _, _ in spans), tuple(max(a, b) for a, b, _ in spans))
