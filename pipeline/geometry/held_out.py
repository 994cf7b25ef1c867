"""What of each image is held out from a training, to choose the weights by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box


def long_axis(shape: tuple[int, ...]) -> int:
    """Return the first axis of more than one voxel: of its planes some are held out.

    Raises
    ------
    ArgumentError : there is none.
    """
    axis = next((axis for axis, n in enumerate(shape) if n > 1), None)
    if axis is None:
        raise ArgumentError(
            f"an image must have two voxels at least, to learn and to hold out, got shape {shape}; name a larger one"
        )
    return axis


def split(
    shape: tuple[int, ...], *, fraction: float, occurrences: NDArray[np.int64] | None = None
) -> tuple[tuple[Box, ...], tuple[Box]]:
    """Return the regions to learn from and the one held out: neighbouring planes, so that they are not learnt with.

    They are the last ones, unless a class of the image is not there, or nowhere else: an organ lies in the middle.
    Then they are those that have most classes in common with the rest, and the most even share of each.

    Parameters
    ----------
    fraction : of the planes that are held out; one at least is, and one is not
    occurrences : voxels of each class in each plane of the long axis, shape (classes, planes)
    """
    axis = long_axis(shape)
    n, whole = shape[axis], Box.whole(shape)
    n_held = min(n - 1, max(1, round(n * fraction)))
    start = n - n_held if occurrences is None else _begin(occurrences, n_held)

    def planes(first: int, last: int) -> Box:
        return Box(
            tuple(first if at == axis else a for at, a in enumerate(whole.start)),
            tuple(last if at == axis else b for at, b in enumerate(whole.stop)),
        )

    learnt = ((0, start), (start + n_held, n))
    return tuple(planes(a, b) for a, b in learnt if a < b), (planes(start, start + n_held),)


def _begin(occurrences: NDArray[np.int64], n_held: int) -> int:
    """Return the first plane that is held out."""
    present = occurrences[occurrences.any(axis=1)]
    below: NDArray[np.int64] = np.pad(present.cumsum(axis=1), ((0, 0), (1, 0)))
    shares = (below[:, n_held:] - below[:, :-n_held]) / below[:, -1:]
    n_lost = ((shares == 0) | (shares == 1)).sum(axis=0)
    if not n_lost[-1]:
        return len(occurrences[0]) - n_held
    uneven = np.abs(shares - n_held / occurrences.shape[1]).max(axis=0, initial=0)
    order: NDArray[np.intp] = np.lexsort((uneven, n_lost))
    return int(order[0])
