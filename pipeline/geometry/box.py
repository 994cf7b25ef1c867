"""Box: a half-open box of voxels with integer bounds, which may reach outside the volume."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pipeline.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Box:
    """The voxels ``start <= v < stop`` on every axis; bounds may be negative or past the volume."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(a > b for a, b in zip(self.start, self.stop, strict=True)):
            raise ArgumentError(f"a box starts before it stops on every axis, got {self.start} to {self.stop}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box of all voxels of a volume of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def n_voxels(self) -> int:
        """Voxels in the box."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index; only for boxes without negative bounds."""
        if any(a < 0 for a in self.start):
            raise ArgumentError(f"a box outside the volume has no slices, got {self}; clip it or read it mirrored")
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Return the box as an index into an array that holds the voxels of ``outer``."""
        return self.shift(tuple(-a for a in outer.start)).slices

    def grow(self, halo: tuple[int, ...]) -> Box:
        """Return the box with ``halo`` voxels more on both sides of each axis."""
        return Box(
            tuple(a - h for a, h in zip(self.start, halo, strict=True)),
            tuple(b + h for b, h in zip(self.stop, halo, strict=True)),
        )

    def shift(self, offset: tuple[int, ...]) -> Box:
        """Return the box moved by ``offset`` voxels."""
        return Box(
            tuple(a + o for a, o in zip(self.start, offset, strict=True)),
            tuple(b + o for b, o in zip(self.stop, offset, strict=True)),
        )

    def intersect(self, other: Box) -> Box:
        """Return the voxels in both boxes; an empty box where they do not meet."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def clip(self, shape: tuple[int, ...]) -> Box:
        """Return the part of the box inside a volume of this shape."""
        return self.intersect(Box.whole(shape))

    def round_up(self, stride: tuple[int, ...]) -> Box:
        """Return the box with its shape rounded up to multiples of ``stride``; the start stays."""
        return Box(
            self.start,
            tuple(a + -(-n // s) * s for a, n, s in zip(self.start, self.shape, stride, strict=True)),
        )
