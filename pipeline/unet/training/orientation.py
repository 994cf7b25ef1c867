"""Orientation: the right-angle turns and reflections of patches, which put voxels elsewhere and change none."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the right-angle rotations and reflections of an array's last axes."""

    order: tuple[int, ...]
    flipped: tuple[bool, ...]

    @classmethod
    def none(cls, n_axes: int) -> Orientation:
        """Return the orientation that changes nothing."""
        return cls(tuple(range(n_axes)), (False,) * n_axes)

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array with its last axes in another order and direction; the same for image and labels."""
        front = array.ndim - len(self.order)
        turned: NDArray[Any] = array.transpose(*range(front), *(front + axis for axis in self.order))
        flips = tuple(slice(None, None, -1 if flip else None) for flip in self.flipped)
        flipped: NDArray[Any] = turned[(..., *flips)]
        return flipped

    def along(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Return what belongs to each axis in the order of the turned axes."""
        return tuple(values[axis] for axis in self.order)

    def towards(self, offset: tuple[float, ...]) -> tuple[float, ...]:
        """Return an offset as it is once everything is turned."""
        return tuple(-a if flip else a for a, flip in zip(self.along(offset), self.flipped, strict=True))

    def before(self, margins: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """Return which voxels before and after a box become these margins of it once it is turned."""
        sides = [margin[::-1] if flip else margin for margin, flip in zip(margins, self.flipped, strict=True)]
        return tuple(sides[self.order.index(axis)] for axis in range(len(sides)))


def orientations(
    core: tuple[int, ...], *, halo: tuple[int, ...], voxel_size_um: tuple[float, ...] | None
) -> tuple[Orientation, ...]:
    """Return all orientations that keep a patch's shape and voxel size; voxels of unknown size count as cubes.

    The first one changes nothing.
    """
    size = voxel_size_um or (1.0,) * len(core)
    alike = list(zip(core, halo, (round(s / min(size), 3) for s in size), strict=True))
    axes = range(len(core))
    orders = [order for order in product(axes, repeat=len(core)) if sorted(order) == list(axes)]
    kept = [order for order in orders if all(alike[a] == alike[b] for a, b in zip(order, axes, strict=True))]
    return tuple(Orientation(order, flips) for order in kept for flips in product((False, True), repeat=len(core)))
