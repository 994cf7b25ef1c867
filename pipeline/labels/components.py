"""Components: the connected voxels of each class in an array, numbered in the order of their first voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

_PART = 2**22  # voxels that are counted at once


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The components of an array; those of different classes are never one.

    Attributes
    ----------
    ids : unsigned integers of the array's shape: 1 to n, 0 where there is none
    n_voxels : int64, (n,)
    firsts : int64, (n,), ascending: the index of each one's first voxel in the array, in C order
    classes : (n,), what its voxels are in the array
    """

    ids: NDArray[np.unsignedinteger[Any]]
    n_voxels: NDArray[np.int64]
    firsts: NDArray[np.int64]
    classes: NDArray[np.unsignedinteger[Any]]

    def __len__(self) -> int:
        return len(self.n_voxels)


def components(classes: NDArray[np.unsignedinteger[Any]]) -> Components:
    """Return the components of an array of classes, of 2 or 3 axes, whose voxels are neighbours if they share a face.

    The numbers are the same whichever way cc3d counts: the first voxel of 2 comes behind that of 1, in C order.

    Parameters
    ----------
    classes : 0 where no component is
    """
    writable = np.require(classes, requirements=["C", "W"])  # which cc3d needs
    ids, n = cc3d.connected_components(writable, connectivity=4 if classes.ndim == 2 else 6, return_N=True)
    n_voxels, firsts = _counted(ids.ravel(), n)
    order = np.argsort(firsts, kind="stable")
    if (order[1:] < order[:-1]).any():
        renumbered = np.zeros(n + 1, ids.dtype)
        renumbered[1 + order] = np.arange(1, n + 1)
        ids, n_voxels, firsts = renumbered[ids], n_voxels[order], firsts[order]
    return Components(ids, n_voxels, firsts, classes.ravel()[firsts])


def _counted(flat: NDArray[np.unsignedinteger[Any]], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many voxels each of n components has, and where its first one is."""
    n_voxels, firsts = np.zeros(n + 1, np.int64), np.full(n + 1, flat.size, np.int64)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        runs = np.concatenate([[0], 1 + np.flatnonzero(part[1:] != part[:-1])])
        ids = part[runs].astype(np.intp)
        np.add.at(n_voxels, ids, np.diff(runs, append=part.size))
        np.minimum.at(firsts, ids, start + runs)
    return n_voxels[1:], firsts[1:]


def coded(voxels: NDArray[Any], values: Sequence[int]) -> NDArray[np.unsignedinteger[Any]]:
    """Return 1 where a voxel has the first of some values, 2 where it has the second one, and 0 where it has none."""
    codes = np.zeros(voxels.shape, np.min_scalar_type(len(values)))
    for code, value in enumerate(values, start=1):
        np.copyto(codes, codes.dtype.type(code), where=voxels == voxels.dtype.type(value))
    return codes
