"""Axes: how a file's own axes become a scan's c, z, y, x.

    letter   X  Y  Z  C  S (samples: RGB)  I (pages)  Q (unknown)          any other
    axis     x  y  z  c  c                 z          z; two of them: c, z  only of length 1

Axes of length 1 are dropped, except y and x: a volume of one slice is a picture, a picture of one channel has no c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.lazy import LazyScan, VoxelSource

_AXIS = {"X": "x", "Y": "y", "Z": "z", "C": "c", "S": "c", "I": "z", "Q": "z"}
_MOST_CHANNELS_LAST = 4


@dataclass(frozen=True, slots=True)
class ArrangedSource:
    """Another source seen with its axes in a new order; those that are left out have length 1.

    Attributes
    ----------
    order : for each axis seen, the axis of ``inner``
    """

    inner: VoxelSource
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(self.inner.shape[i] for i in self.order)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel."""
        return self.inner.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone, in voxels along each axis."""
        return tuple(self.inner.chunks[i] for i in self.order)

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        own = [slice(0, 1)] * len(self.inner.shape)
        for axis, part in zip(self.order, slices, strict=True):
            own[axis] = part
        voxels = self.inner.read(tuple(own))
        dropped = tuple(i for i in range(voxels.ndim) if i not in self.order)
        voxels = voxels.transpose(self.order + dropped)
        return voxels.reshape(voxels.shape[: len(self.order)])


def arrange(
    source: VoxelSource, *, axes: str, path: str, format_name: str, voxel_size_um: Mapping[str, float] | None = None
) -> LazyScan:
    """Return a scan along c, z, y, x of a source whose axes have these letters, one per axis.

    Parameters
    ----------
    voxel_size_um : micrometres by axis ("z", "y", "x"), as far as they are known

    Raises
    ------
    ScanError : time or another axis is longer than 1, an axis is there twice, or y or x is missing.
    """
    letters = axes.replace("QQ", "CZ", 1) if axes.count("Q") == 2 else axes
    if len(letters) != len(source.shape):
        raise ScanError(f"a scan needs one letter per axis, got {axes!r} for shape {source.shape} in {path}")
    found: dict[str, int] = {}
    for i, (letter, size) in enumerate(zip(letters, source.shape, strict=True)):
        axis = _AXIS.get(letter)
        if size == 1 and axis not in ("x", "y"):
            continue
        if axis is None or axis in found:
            raise _unfit(path, axes=axes, shape=source.shape)
        found[axis] = i
    if not {"x", "y"} <= found.keys():
        raise _unfit(path, axes=axes, shape=source.shape)
    dims = tuple(d for d in "czyx" if d in found)
    spatial, known = dims[int(dims[0] == "c") :], _known(voxel_size_um or {})
    voxel_size = tuple(known[d] for d in spatial) if known.keys() >= set(spatial) else None
    partial = () if voxel_size else tuple((d, known[d]) for d in spatial if d in known)
    order = tuple(found[d] for d in dims)
    return LazyScan(path, format_name, dims, voxel_size, ArrangedSource(source, order), partial)


def unlabelled(shape: tuple[int, ...], *, path: str) -> str:
    """Return the letters of an array that comes without names of axes.

    A last axis of at most 4 is the channels (RGB, RGBA) if every other axis is longer than that; otherwise two axes
    are y, x; three z, y, x; four c, z, y, x.
    """
    front, last = shape[:-1], shape[-1:]
    if len(shape) in (3, 4) and last[0] <= _MOST_CHANNELS_LAST < min(front):
        return "ZYX"[-len(front) :] + "S"
    if len(shape) in (2, 3, 4):
        return "CZYX"[-len(shape) :]
    raise ScanError(f"a scan must have 2 to 4 axes, got shape {shape} in {path}; save one time point or channel each")


def _unfit(path: str, *, axes: str, shape: tuple[int, ...]) -> ScanError:
    named = ", ".join(f"{a}={n}" for a, n in zip(axes, shape, strict=True))
    return ScanError(
        f"a scan must have y and x, at most one z and one channel axis and no other axis longer than 1, "
        f"got {named} in {path}; save each time point or series as a file of its own"
    )


def _known(told: Mapping[str, float]) -> dict[str, float]:
    """Return those of the sizes that are lengths."""
    return {axis: float(size) for axis, size in told.items() if np.isfinite(size) and size > 0}
