"""Streaming inference: a network over a column of a scan, slab by slab, nothing computed twice along the column.

    input      |....|slab|            read one after another, each once
    layer 1     ...|....|slab|        every layer makes a slab of the same length, a little behind its input:
    layer 2    ..|....|slab|          it keeps the last rows of its input, which the next slab's first outputs need
    output     |....|slab|            skip connections wait until the deeper levels have come as far

Rows are positions along the streamed axis, counted from the scan's origin, whatever the column's first row is, so that
a column that is taken up again in its middle computes the very same slabs. Across the column each layer computes what
the column's core needs, and no more (``layers.spans``). What is kept are the line buffers of hardware convolution
engines: 2 * reach rows for each convolution, and for each skip as many as the deeper levels lie behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.unet.engine import Engine
from pipeline.unet.families import why_not_streamed
from pipeline.unet.layers import Axes, Conv, Join, Pool, Span, Up, lags, spans

ReadRows = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class _Slab:
    """One slab of a tensor, (batch, channels, rows, *cross), and where it lies across the column; None: nothing yet."""

    x: Tensor | None
    channels: int
    cross: tuple[Span, ...]

    def cropped(self, cross: tuple[Span, ...]) -> _Slab:
        """Return the part over these positions."""
        if self.x is None or cross == self.cross:
            return replace(self, cross=cross)
        x = self.x
        for axis, (have, want) in enumerate(zip(self.cross, cross, strict=True), start=3):
            x = x.narrow(axis, want[0] - have[0], want[1] - want[0])
        return replace(self, x=x, cross=cross)


@dataclass(frozen=True, slots=True)
class _Piece:
    """``n`` rows of a slab, from row ``source`` on, that go to row ``target``."""

    slab: _Slab
    source: int
    target: int
    n: int


class Stream:
    """Runs a network over columns with one cross-section.

    Parameters
    ----------
    engine : whose first axis is the streamed one
    cross : the core's cross-section, one (start, stop) per remaining axis, positions in the scan
    slab : rows that enter at once, a multiple of the network's stride
    """

    def __init__(self, engine: Engine, *, cross: tuple[Span, ...], slab: int) -> None:
        engine.settings.check_slab(slab)
        if why := why_not_streamed(engine.settings):
            raise ArgumentError(f"a streamed network must be a plain U-Net, got {why}; run it by tiles")
        if len(cross) != engine.dims - 1:
            raise ArgumentError(
                f"a stream needs {engine.dims - 1} axes across it, got {len(cross)}; give all but the streamed one"
            )
        self.engine, self.slab, self.chain = engine, slab, engine.chain
        self._axis, *self._across = engine.order
        each = zip(cross, self._across, strict=True)
        self._cross = list(zip(*(spans(self.chain, span, axis) for span, axis in each), strict=True))
        self._lags = lags(self.chain, self._axis)
        self._joins = {layer.skips[0]: at for at, layer in enumerate(self.chain) if isinstance(layer, Join)}
        self._n_rows = [slab, *(slab // layer.scale[self._axis] for layer in self.chain)]

    @property
    def cross(self) -> tuple[Span, ...]:
        """What ``read`` must deliver across the column, one (start, stop) per remaining axis; may leave the scan."""
        return self._cross[0]

    def slabs(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the rows that ``run`` will read, in its order; they may leave the scan."""
        low, high = spans(self.chain, (start, stop), self._axis)[0]
        for step in range(low // self.slab, -(-high // self.slab)):
            yield max(low, step * self.slab), min(high, (step + 1) * self.slab)

    def run(self, start: int, stop: int, read: ReadRows, *, n_batch: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, logits) until rows ``start`` to ``stop`` are done, in order and without gaps.

        Parameters
        ----------
        read : called with each of ``slabs`` in turn; returns (batch, in_channels, rows, *cross), normalised, on the
            engine's device and in its dtype

        Yields
        ------
        the position of the first row, and logits (batch, n_classes, rows, *the core's cross-section)
        """
        needed = spans(self.chain, (start, stop), self._axis)
        kept = self._kept(n_batch)
        last = (stop - 1 - self._lags[-1]) // self.slab
        for step in range(needed[0][0] // self.slab, last + 1):
            logits = self._step(step, needed, kept, read)
            if logits is not None:
                at = step * self.slab + self._lags[-1]
                low, high = max(start, at), min(stop, at + self.slab)
                yield low, logits.narrow(2, low - at, high - low)

    def _kept(self, n_batch: int) -> list[Tensor]:
        """Return what every layer keeps between slabs, still zero: the last rows of its input, or slabs that wait.

        All of it is made beforehand, so that what comes and goes with each slab finds the same places free each time.
        """
        kept = []
        for at, layer in enumerate(self.chain):
            match layer:
                case Conv():
                    n, channels, cross = 2 * layer.reach[self._axis], layer.into, self._under(at)
                case Pool():
                    n, channels, cross = self._is_odd(at, layer), layer.out, self._under(at)
                case Join():
                    n, cross = self._n_waiting(at, layer) * self._n_rows[at + 1], self._cross[at + 1]
                    channels = self.chain[layer.skips[0] - 1].out
                case _:
                    n, channels, cross = 0, 0, ()
            shape = (n_batch, channels, n, *(b - a for a, b in cross or self.cross))
            kept.append(self.engine.empty(shape).zero_())
        return kept

    def _under(self, at: int) -> tuple[Span, ...]:
        """Return what a layer needs of its input across the column."""
        layer = self.chain[at]
        return tuple(layer.needs(span, axis) for span, axis in zip(self._cross[at + 1], self._across, strict=True))

    def _step(self, step: int, needed: tuple[Span, ...], kept: list[Tensor], read: ReadRows) -> Tensor | None:
        """Feed one slab; returns the logits that come out, None if none of them is needed."""
        inputs = [[_Piece(self._input(step, needed[0], read), 0, 0, self.slab)]]
        for at, layer in enumerate(self.chain):
            alive = self._alive(at + 1, step, needed)
            match layer:
                case Conv():
                    slab = self._convolved(at, layer, inputs, kept[at], alive=alive)
                case Pool():
                    slab = self._pooled(at, layer, inputs.pop().pop().slab, kept[at], alive=alive)
                case Up():
                    slab = self._doubled(at, layer, inputs.pop().pop().slab, alive=alive)
                case Join():
                    inputs.insert(0, self._waited(at, layer, kept[at], step))
                    continue
            inputs = [[_Piece(slab, 0, 0, self._n_rows[at + 1])]]
            if (join := self._joins.get(at + 1)) is not None:
                self._wait(join, slab, kept[join], step)
            del slab
        return inputs.pop().pop().slab.x

    def _input(self, step: int, needed: Span, read: ReadRows) -> _Slab:
        """Return the input's slab; rows that nothing depends on are zero."""
        begin, channels = step * self.slab, self.engine.settings.in_channels
        low, high = max(begin, needed[0]), min(begin + self.slab, needed[1])
        if low >= high:
            return _Slab(None, channels, self.cross)
        x = read(low, high)
        if high - low < self.slab:
            part, x = x, self.engine.empty((*x.shape[:2], self.slab, *x.shape[3:])).zero_()
            x.narrow(2, low - begin, high - low).copy_(part)
        return _Slab(x, channels, self.cross)

    def _alive(self, tensor: int, step: int, needed: tuple[Span, ...]) -> bool:
        """Whether a row of the tensor's slab at this step is needed."""
        n = self._n_rows[tensor]
        begin = step * n + self._lags[tensor]
        return begin < needed[tensor][1] and begin + n > needed[tensor][0]

    def _convolved(
        self, at: int, layer: Conv, inputs: list[list[_Piece]], before: Tensor, *, alive: bool
    ) -> _Slab:
        """Return a convolution's slab; its input is put behind the rows kept from before, in one copy."""
        out = _Slab(None, layer.out, self._cross[at + 1])
        if not alive and inputs[-1][0].slab.x is None:  # before the first row that is needed, or after the last
            return out
        if not any(layer.reach) and len(inputs) == 1 and (whole := inputs.pop().pop().slab).cross == out.cross:
            return out if whole.x is None or not alive else replace(out, x=self.engine.conv(at, whole.x))
        cross, n_kept, n_rows = self._under(at), before.shape[2], self._n_rows[at]
        x = self.engine.empty((*before.shape[:2], n_kept + n_rows, *(b - a for a, b in cross)))
        _fill(x.narrow(2, n_kept, n_rows), inputs, cross)
        inputs.clear()
        if n_kept:
            x.narrow(2, 0, n_kept).copy_(before)
            before.copy_(x.narrow(2, n_rows, n_kept))
        return replace(out, x=self.engine.conv(at, x)) if alive else out

    def _is_odd(self, at: int, layer: Pool) -> int:
        """Whether the first row of a slab is the second one of its pair."""
        return (self._lags[at] - layer.phase[self._axis]) % layer.factor[self._axis]

    def _pooled(self, at: int, layer: Pool, slab: _Slab, before: Tensor, *, alive: bool) -> _Slab:
        """Return the maximum of pairs; a row without its partner waits for the next slab."""
        out = _Slab(None, layer.out, self._cross[at + 1])
        x = slab.cropped(self._under(at)).x
        if x is None:
            return out
        factor = self.engine.ordered(layer.factor)
        if self._is_odd(at, layer):
            y = self.engine.empty((*x.shape[:2], x.shape[2] // 2, *x.shape[3:]))
            torch.maximum(before, x[:, :, :1], out=y[:, :, :1])
            torch.maximum(x[:, :, 1:-1:2], x[:, :, 2::2], out=y[:, :, 1:])
            before.copy_(x[:, :, -1:])
            x, factor = y, (1, *factor[1:])
        return replace(out, x=_pooled(x, factor)) if alive else out

    def _doubled(self, at: int, layer: Up, slab: _Slab, *, alive: bool) -> _Slab:
        """Return the finer resolution."""
        each = zip(slab.cross, self._across, strict=True)
        cross = tuple((layer.has(low, axis), layer.has(high, axis)) for (low, high), axis in each)
        x = self.engine.up(at, slab.x) if alive and slab.x is not None else None
        return _Slab(x, layer.out, cross)

    def _delay(self, at: int, layer: Join) -> int:
        """Return how many rows a skip is ahead of the branch that it waits for."""
        return self._lags[layer.skips[0]] - self._lags[at]

    def _n_waiting(self, at: int, layer: Join) -> int:
        """Return how many slabs of a skip are kept, the one at hand included."""
        return -(-self._delay(at, layer) // self._n_rows[at + 1]) + 1

    def _wait(self, at: int, slab: _Slab, ring: Tensor, step: int) -> None:
        """Keep what a join needs of a skip's slab until the other branch has come as far."""
        n = self._n_rows[at + 1]
        x = slab.cropped(self._cross[at + 1]).x
        if x is not None:
            ring.narrow(2, step * n % ring.shape[2], n).copy_(x)

    def _waited(self, at: int, layer: Join, ring: Tensor, step: int) -> list[_Piece]:
        """Return the skip's rows that belong beside the other branch's: the end of one slab, the begin of the next."""
        n = self._n_rows[at + 1]
        back, rest = divmod(self._delay(at, layer), n)
        slabs = [
            _Slab(ring.narrow(2, (step - each) * n % ring.shape[2], n), ring.shape[1], self._cross[at + 1])
            for each in (back, back + 1)
        ]
        pieces = [_Piece(slabs[0], 0, rest, n - rest)]
        return [*pieces, _Piece(slabs[1], n - rest, 0, rest)] if rest else pieces


def _fill(into: Tensor, parts: Sequence[list[_Piece]], cross: tuple[Span, ...]) -> None:
    """Copy the parts side by side along the channels; zero where there is nothing."""
    channel = 0
    for pieces in parts:
        for piece in pieces:
            place = into.narrow(1, channel, piece.slab.channels).narrow(2, piece.target, piece.n)
            x = piece.slab.cropped(cross).x
            if x is None:
                place.zero_()
            else:
                place.copy_(x.narrow(2, piece.source, piece.n))
        channel += pieces[0].slab.channels


def _pooled(x: Tensor, factor: Axes) -> Tensor:
    """Return the maximum of pairs along every axis whose factor is 2."""
    for axis, f in enumerate(factor, start=2):
        if f == 2:
            index = (slice(None),) * axis
            x = torch.maximum(x[(*index, slice(0, None, 2))], x[(*index, slice(1, None, 2))])
    return x
