"""Slabs: some rows of a tensor, where they lie across a stream, and the rings in which they wait for other branches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.unet.layers import Span


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of a tensor, (batch, channels, rows, *cross), and where they lie across the column; None: nothing yet."""

    x: Tensor | None
    channels: int
    cross: tuple[Span, ...]

    def cropped(self, cross: tuple[Span, ...]) -> Slab:
        """Return the part over these positions."""
        return replace(self, x=None if self.x is None else cropped(self.x, self.cross, cross), cross=cross)


@dataclass(frozen=True, slots=True)
class Piece:
    """``n`` rows of a slab, from row ``source`` on, that go to row ``target``."""

    slab: Slab
    source: int
    target: int
    n: int

    def over(self, cross: tuple[Span, ...]) -> Tensor | None:
        """Return the rows, over these positions."""
        x = self.slab.cropped(cross).x
        return None if x is None else x.narrow(2, self.source, self.n)


Part = list[Piece]  # some channels of what a layer takes; the pieces lie one after another along the stream


@dataclass(frozen=True, slots=True)
class RingBuffer:
    """The last rows of a tensor: row n of a stream lies at n modulo their number."""

    x: Tensor
    cross: tuple[Span, ...]

    def put(self, slab: Slab, row: int, n: int) -> None:
        """Keep a slab whose first row is ``row``, in place of the oldest."""
        x = slab.cropped(self.cross).x
        if x is not None:
            for source, target, n_rows in self._round(row, n):
                self.x.narrow(2, source, n_rows).copy_(x.narrow(2, target, n_rows))

    def part(self, row: int, n: int) -> Part:
        """Return ``n`` rows from ``row`` on."""
        slab = Slab(self.x, self.x.shape[1], self.cross)
        return [Piece(slab, source, target, n_rows) for source, target, n_rows in self._round(row, n)]

    def _round(self, row: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Yield (place in the ring, place among the rows, how many) of rows that may go round."""
        first = row % self.x.shape[2]
        n_first = min(n, self.x.shape[2] - first)
        yield first, 0, n_first
        if n_first < n:
            yield 0, n_first, n - n_first


def cropped(x: Tensor, have: tuple[Span, ...], want: tuple[Span, ...]) -> Tensor:
    """Return the part over the positions ``want`` of rows that lie over ``have``."""
    if have == want:
        return x
    for axis, ((begin, _), (start, stop)) in enumerate(zip(have, want, strict=True), start=3):
        x = x.narrow(axis, start - begin, stop - start)
    return x


def whole(parts: Sequence[Part], cross: tuple[Span, ...]) -> Tensor:
    """Return the one piece that there is, over these positions, as it lies."""
    ((piece,),) = parts
    x = piece.over(cross)
    if x is None:
        raise ValueError(f"rows that are needed must have been made, got none over {cross}")
    return x


def copy_side_by_side(into: Tensor, parts: Sequence[Part], cross: tuple[Span, ...]) -> None:
    """Copy the parts side by side along the channels; zero where there is nothing."""
    for place, x in _places(into, parts, cross):
        if x is None:
            place.zero_()
        else:
            place.copy_(x)


def add_side_by_side(into: Tensor, parts: Sequence[Part], cross: tuple[Span, ...]) -> None:
    """Add the parts, side by side along the channels."""
    for place, x in _places(into, parts, cross):
        if x is not None:
            place.add_(x)


def _places(
    into: Tensor, parts: Sequence[Part], cross: tuple[Span, ...]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield for each piece where it goes, and what it is."""
    channel = 0
    for pieces in parts:
        n_channels = pieces[0].slab.channels
        for piece in pieces:
            yield into.narrow(1, channel, n_channels).narrow(2, piece.target, piece.n), piece.over(cross)
        channel += n_channels
