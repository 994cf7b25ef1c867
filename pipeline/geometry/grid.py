"""BlockGrid: a volume cut into blocks so that every voxel lies in exactly one core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of work.

        |hhh|cccccccc|hhh|     tile: what is read, mirrored outside the volume
            |cccccccc|         core: what is written, by this block only

    Attributes
    ----------
    index : position in the grid's row-major order
    position : position along each axis of the grid
    core : clipped to the volume
    tile : the unclipped core, rounded up to ``align``, and the halo around it
    """

    index: int
    position: tuple[int, ...]
    core: Box
    tile: Box


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Blocks of ``core_shape`` laid edge to edge from the origin of a volume; the last ones are clipped.

    Attributes
    ----------
    shape : voxels of the volume along each axis, at least one
    core_shape : voxels of a core, a multiple of ``align``
    halo : voxels of context read on each side
    align : what tile sizes without their halo are multiples of (the network's stride), 1 by default
    """

    shape: tuple[int, ...]
    core_shape: tuple[int, ...]
    halo: tuple[int, ...] = ()
    align: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "halo", self.halo or (0,) * len(self.shape))
        object.__setattr__(self, "align", self.align or (1,) * len(self.shape))
        lengths = {len(self.shape), len(self.core_shape), len(self.halo), len(self.align)}
        if len(lengths) != 1:
            raise ArgumentError(f"shape, core, halo and align need one number per axis, got {self}")
        if min(self.shape) < 1 or min(self.core_shape) < 1 or min(self.align) < 1 or min(self.halo) < 0:
            raise ArgumentError(f"sizes must be at least 1 and halos at least 0, got {self}")
        for core, align in zip(self.core_shape, self.align, strict=True):
            if core % align:
                below, above = core // align * align, -(-core // align) * align
                use = f"{below} or {above}" if below else f"{above}"
                raise ArgumentError(f"core must be a multiple of the stride {align}, got {core}; use {use}")

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Blocks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.core_shape, strict=True))

    def __len__(self) -> int:
        return prod(self.grid_shape)

    def __iter__(self) -> Iterator[Block]:
        return (self.block(i) for i in range(len(self)))

    def block(self, index: int) -> Block:
        """Return the block at ``index`` of the row-major order."""
        if not 0 <= index < len(self):
            raise ArgumentError(f"block index must be in 0..{len(self) - 1}, got {index}")
        rest, reverse = index, []
        for n in reversed(self.grid_shape):
            rest, at = divmod(rest, n)
            reverse.append(at)
        position = tuple(reversed(reverse))
        start = tuple(at * c for at, c in zip(position, self.core_shape, strict=True))
        core = Box(start, tuple(a + c for a, c in zip(start, self.core_shape, strict=True))).clip(self.shape)
        return Block(index, position, core, core.round_up(self.align).grow(self.halo))

    def within(self, box: Box) -> Iterator[Block]:
        """Yield the blocks whose cores lie in a box that starts and ends on cores' borders, in row-major order."""
        ranges = [range(a // c, -(-b // c)) for a, b, c in zip(box.start, box.stop, self.core_shape, strict=True)]
        return (self.block(self.index_of(position)) for position in product(*ranges))

    def index_of(self, position: tuple[int, ...]) -> int:
        """Return the row-major index of the block at a position of the grid."""
        index = 0
        for at, n in zip(position, self.grid_shape, strict=True):
            index = index * n + at
        return index
