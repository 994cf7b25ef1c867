"""Merges: which components on the two sides of a face are one instance, and what that makes of very many of them.

Sets that are joined pair by pair are Tarjan's (1975, doi:10.1145/321879.321884). Here all pairs are joined at once, in
rounds of whole-array operations, as Shiloach and Vishkin do in parallel (1982, doi:10.1016/0196-6774(82)90008-6).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.unsignedinteger[Any]]


def touching(before: Ids, behind: Ids, *, classes_before: NDArray[Any], classes_behind: NDArray[Any]) -> NDArray[Any]:
    """Return the pairs of components that touch across a face and are of one class, each once: int64, (pairs, 2).

    Parameters
    ----------
    before, behind : the plane of ids on each side of the face, of one shape; 0 is no component
    classes_before, classes_behind : of component 1, 2, ... of each side
    """
    both = (before != 0) & (behind != 0)
    a, b = before[both].astype(np.int64), behind[both].astype(np.int64)
    same = classes_before[a - 1] == classes_behind[b - 1]
    width = len(classes_behind) + 1
    pairs = np.unique(a[same] * width + b[same])
    return np.stack([pairs // width, pairs % width], axis=1)


def sets_of(pairs: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return for each of n members the smallest one of its set, where the members of a pair are of one set: (n,).

    Each round hangs every set that a pair joins to a smaller one below the smallest of those. One that has larger
    neighbours only either got one of them, or has a smaller one in the next round: two rounds halve the sets that are
    still to be joined, so that there are at most 2 log2(n).

    Parameters
    ----------
    pairs : (pairs, 2), of members 0 to n - 1
    """
    parents = np.arange(n)
    low, high = np.ascontiguousarray(np.sort(pairs, axis=1).T)
    while len(low):
        np.minimum.at(parents, high, low)
        while ((above := parents[parents]) != parents).any():
            parents = above
        a, b = parents[low], parents[high]
        apart = a != b
        low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
    return parents
