"""TileRule: which tiles a network accepts, and how a core is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box


@dataclass(frozen=True, slots=True)
class TileRule:
    """How a network may be laid over a scan, one number per spatial axis.

        |---------- tile = core + 2 halo ----------|     enters the network
             |------ output = tile - 2 loss ------|      leaves the network, loss = halo - trim
             |ttt|-------- core ---------|ttt|           trim drops the border, the core is left

    Attributes
    ----------
    stride : total downsampling; cores start at multiples of it from the scan's origin and have multiples of it as shape
    halo : voxels of context that the network needs on each side of an aligned core
    trim : voxels to drop on each side of the network's output to be left with the core
    """

    stride: tuple[int, ...]
    halo: tuple[int, ...]
    trim: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.stride) == len(self.halo) == len(self.trim):
            raise ArgumentError(f"stride, halo and trim need one number per axis, got {self}")
        if min(self.stride) < 1 or min(self.halo) < 0 or min(self.trim) < 0:
            raise ArgumentError(f"strides must be at least 1, halos and trims at least 0, got {self}")

    @property
    def ndim(self) -> int:
        """Number of spatial axes that the network sees."""
        return len(self.stride)

    def tile_shape(self, core_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that enters the network for a core of this shape, rounded up to the stride."""
        return tuple(
            -(-c // s) * s + 2 * h for c, s, h in zip(core_shape, self.stride, self.halo, strict=True)
        )

    def core_shape(self, tile_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the core of a tile of this shape.

        Raises
        ------
        ArgumentError : the network does not accept such a tile; the message names the sizes next to it.
        """
        core = tuple(t - 2 * h for t, h in zip(tile_shape, self.halo, strict=True))
        for t, c, s, h in zip(tile_shape, core, self.stride, self.halo, strict=True):
            if c < s or c % s:
                below, above = 2 * h + c // s * s, 2 * h + max(1, -(-c // s)) * s
                use = f"{below} or {above}" if c > s else f"{above}"
                raise ArgumentError(
                    f"tile must be twice the halo {h} and a multiple of the stride {s}, got {t}; use {use}"
                )
        return core

    def over_slices(self, neighbours: int = 0) -> TileRule:
        """Return the rule with one more axis in front that the network does not see: one slice after another.

        With each slice so many ``neighbours`` on each side enter, as channels: they are the halo along that axis.
        """
        return TileRule((1, *self.stride), (neighbours, *self.halo), (0, *self.trim))

    def cores(self, shape: tuple[int, ...], core_shape: tuple[int, ...]) -> Iterator[Box]:
        """Yield cores that cover a region of this shape exactly once, each at most ``core_shape`` and aligned.

        The region's own origin must be aligned. Sizes are balanced: 128 in cores of at most 96 gives two of 64.
        """
        spans = [
            _spans(n, c, s) for n, c, s in zip(shape, core_shape, self.stride, strict=True)
        ]
        for bounds in product(*spans):
            yield Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def _spans(size: int, largest: int, stride: int) -> list[tuple[int, int]]:
    """Cut ``size`` voxels into the fewest aligned spans of at most ``largest`` voxels, as equal as alignment allows."""
    units = -(-size // stride)
    n_spans = -(-units // max(1, largest // stride))
    step = -(-units // n_spans) * stride
    return [(a, min(a + step, size)) for a in range(0, size, step)]
