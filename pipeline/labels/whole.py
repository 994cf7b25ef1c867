"""Whole numbers: labels that a file stores as floats, as masks of many tools are, as the integers that they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError

_INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # by the bytes of a float, whose whole numbers they hold


def label_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the integers that hold labels of this type: themselves, of floats those as wide, of booleans uint8."""
    if stored.kind == "f":
        return np.dtype(_INTEGERS[stored.itemsize])
    return np.dtype(np.uint8) if stored.kind == "b" else stored


def as_labels(voxels: NDArray[Any], *, axes: str, start: tuple[int, ...], path: str) -> NDArray[Any]:
    """Return voxels as labels; nothing is rounded.

    Parameters
    ----------
    axes, start, path : of the voxels, the position of their first one, and the file, for messages

    Raises
    ------
    ScanError : a float is no whole number, negative, or so large that not every one up to it is a float.
    """
    if voxels.dtype.kind == "f":
        largest = 2 ** (np.finfo(voxels.dtype).nmant + 1)
        good = (voxels >= 0) & (voxels <= largest) & (np.trunc(voxels) == voxels)
        if not good.all():
            at = np.unravel_index(int(np.argmin(good)), voxels.shape)
            where = ", ".join(f"{axis} {n + int(i)}" for axis, n, i in zip(axes, start, at, strict=True))
            raise ScanError(
                f"labels must be integers, or {voxels.dtype} that are whole numbers from 0 to {largest}, got "
                f"{voxels[at]} at {where} in {path}; convert them first"
            )
    return voxels.astype(label_dtype(voxels.dtype), copy=False)
