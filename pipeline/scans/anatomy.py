"""Anatomy: how a medical scan's axes, whose directions in the body are told, become z, y, x.

    axis   grows towards the patient's     a slice of it, first row above, is seen as radiologists see it
    z      head (superior)
    y      back (posterior)
    x      left

Scans of one patient lie alike then, whatever the format and the order in which voxels were stored: the mask in a NIfTI
file fits the DICOM series that it was drawn on. Voxels are never resampled: an oblique axis counts as the one that it
comes nearest to. A single slice is a picture, as it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.axes import arrange
from pipeline.scans.lazy import LazyScan, VoxelSource, damaged

UM_PER_MM = 1000.0
_LPS = "xyz"  # the patient's axes, as DICOM counts them: to the left, to the back, to the head


@dataclass(frozen=True, slots=True)
class FlippedSource:
    """Another source with some axes counted from their end.

    Attributes
    ----------
    flipped : for each axis of ``inner``, whether it is
    """

    inner: VoxelSource
    flipped: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel."""
        return self.inner.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone, in voxels along each axis."""
        return self.inner.chunks

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        each = zip(slices, self.flipped, self.shape, strict=True)
        own = tuple(slice(n - s.stop, n - s.start) if flip else s for s, flip, n in each)
        return self.inner.read(own)[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]


@dataclass(frozen=True, slots=True)
class ScaledSource:
    """Another source whose numbers mean ``slope`` times them plus ``intercept``, in the given type."""

    inner: VoxelSource
    slope: float
    intercept: float
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.inner.shape

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone, in voxels along each axis."""
        return self.inner.chunks

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the values under the slices."""
        return scaled(self.inner.read(slices), self.slope, self.intercept, dtype=self.dtype)


def scaled(stored: NDArray[Any], slope: float, intercept: float, *, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return what stored numbers mean, computed in float64, or exactly where they stay integers.

    Raises
    ------
    ValueError : a number is not of the type, since the file has others than it says.
    """
    if dtype.kind == "f":
        return (stored.astype(np.float64) * slope + intercept).astype(dtype)
    meant, about = stored.astype(np.int64) + int(intercept), np.iinfo(dtype)
    if meant.size and (meant.min() < about.min or meant.max() > about.max):
        raise ValueError(f"numbers must be of {dtype}, as its header says, got {meant.min()} to {meant.max()}")
    return meant.astype(dtype)


def scaled_dtype(
    stored: np.dtype[Any], slope: float, intercept: float, *, limits: tuple[int, int] | None = None
) -> np.dtype[Any]:
    """Return the smallest type that holds what stored numbers mean: themselves, integers that are shifted, or float32.

    Parameters
    ----------
    limits : lowest and highest number that is stored, where that is less than the type could hold
    """
    if (slope, intercept) == (1.0, 0.0):
        return stored
    if stored.kind not in "iu" or slope != 1.0 or intercept != int(intercept):
        return np.dtype(np.float64 if stored.itemsize == 8 else np.float32)
    low, high = limits or (int(np.iinfo(stored).min), int(np.iinfo(stored).max))
    for candidate in (stored, np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64)):
        about = np.iinfo(candidate)
        if about.min <= low + intercept and high + intercept <= about.max:
            return candidate
    return np.dtype(np.float64)


def length_of(step: NDArray[np.floating[Any]]) -> float:
    """Return the length of a step to six digits: what the files tell is of float32, or computed of it."""
    return float(f"{np.linalg.norm(step):.6g}")


def in_body(
    source: VoxelSource, steps: NDArray[np.float64], *, axes: str, path: str, format_name: str,
    measured: tuple[bool, ...] = (True, True, True),
) -> LazyScan:  # fmt: skip
    """Return a scan along (c), z, y, x of a source whose voxels lie in a body.

    Parameters
    ----------
    steps : for each of the source's three spatial axes, in their order, the way from one voxel to the next: shape (3,
        3), millimetres to the left, to the back and to the head
    measured : for each of these steps, whether its length is known, and not its direction alone
    axes : for each of the source's axes "*" if it is spatial, the fastest last, else its letter, see ``axes.arrange``

    Raises
    ------
    ScanError : the steps are not of three axes in space.
    """
    lengths = np.linalg.norm(steps, axis=1)
    if not np.isfinite(steps).all() or abs(np.linalg.det(steps)) < 1e-6 * np.prod(lengths) or not lengths.all():
        raise damaged(path, cause=f"the directions of its axes must span space, got {steps.round(4).tolist()}")
    spatial = [i for i, letter in enumerate(axes) if letter == "*"]
    if thin := [at for at, i in enumerate(spatial) if source.shape[i] == 1]:
        steps = _as_stored(thin[0]) * lengths[:, np.newaxis]
    shares = np.abs(steps) / lengths[:, np.newaxis]
    towards = max(permutations(range(3)), key=lambda order: sum(shares[i, axis] for i, axis in enumerate(order)))
    letters, flipped, size = list(axes), [False] * len(axes), dict[str, float]()
    for at, (i, axis) in enumerate(zip(spatial, towards, strict=True)):
        letters[i], flipped[i] = _LPS[axis].upper(), bool(steps[at, axis] < 0)
        if measured[at]:
            size[_LPS[axis]] = UM_PER_MM * length_of(steps[at])
    turned = FlippedSource(source, tuple(flipped)) if any(flipped) else source
    return arrange(turned, axes="".join(letters), path=path, format_name=format_name, voxel_size_um=size)


def _as_stored(thin: int) -> NDArray[np.float64]:
    """Return the directions of three axes of which one is of a single voxel: that is z, the others y and x in order."""
    y, x = (axis for axis in range(3) if axis != thin)
    directions = np.zeros((3, 3))
    directions[[thin, y, x], [2, 1, 0]] = 1.0
    return directions
