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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.unet.engine import Engine
from pipeline.unet.layers import Conv, Join, Pool, Span, Up, lags, spans

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


@dataclass(slots=True)
class _State:
    """What a layer remembers of earlier slabs: the last rows of its input, or the slabs that wait to be joined."""

    rows: Tensor | None = None
    slabs: deque[_Slab] = field(default_factory=deque)


class Stream:
    """Runs a network over columns with one cross-section.

    Parameters
    ----------
    engine : whose first axis is the streamed one
    cross : the core's cross-section, one (start, stop) per remaining axis, positions in the scan
    slab : rows that enter at once, a multiple of the network's stride
    """

    def __init__(self, engine: Engine, *, cross: tuple[Span, ...], slab: int) -> None:
        stride = engine.settings.stride
        if len(cross) != engine.dims - 1 or slab < stride or slab % stride:
            raise ArgumentError(
                f"a stream needs {engine.dims - 1} cross axes and slabs of a multiple of the stride {stride}, got "
                f"{len(cross)} and {slab}; use {max(1, slab // stride) * stride}"
            )
        self.engine, self.slab, self.chain = engine, slab, engine.chain
        self._cross = list(zip(*(spans(self.chain, each) for each in cross), strict=True))
        self._lags = lags(self.chain)
        self._n_rows = [slab >> level for level in (0, *(layer.level for layer in self.chain))]

    @property
    def cross(self) -> tuple[Span, ...]:
        """What ``read`` must deliver across the column, one (start, stop) per remaining axis; may leave the scan."""
        return self._cross[0]

    def slabs(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the rows that ``run`` will read, in its order; they may leave the scan."""
        low, high = spans(self.chain, (start, stop))[0]
        for step in range(low // self.slab, -(-high // self.slab)):
            yield max(low, step * self.slab), min(high, (step + 1) * self.slab)

    def run(self, start: int, stop: int, read: ReadRows) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, logits) until rows ``start`` to ``stop`` are done, in order and without gaps.

        Parameters
        ----------
        read : called with each of ``slabs`` in turn; returns (batch, in_channels, rows, *cross), normalised, on the
            engine's device and in its dtype

        Yields
        ------
        the position of the first row, and logits (batch, n_classes, rows, *the core's cross-section)
        """
        needed = spans(self.chain, (start, stop))
        states = [_State() for _ in self.chain]
        last = (stop - 1 - self._lags[-1]) // self.slab
        for step in range(needed[0][0] // self.slab, last + 1):
            logits = self._step(step, needed, states, read)
            if logits is not None:
                at = step * self.slab + self._lags[-1]
                low, high = max(start, at), min(stop, at + self.slab)
                yield low, logits.narrow(2, low - at, high - low)

    def _step(self, step: int, needed: tuple[Span, ...], states: list[_State], read: ReadRows) -> Tensor | None:
        """Feed one slab; returns the logits that come out, None if none of them is needed."""
        inputs = [[_Piece(self._input(step, needed[0], read), 0, 0, self.slab)]]
        for at, layer in enumerate(self.chain):
            alive = self._alive(at + 1, step, needed)
            match layer:
                case Conv():
                    slab = self._convolved(at, layer, inputs, states[at], alive=alive)
                case Pool():
                    slab = self._pooled(at, layer, inputs.pop().pop().slab, states[at], alive=alive)
                case Up():
                    slab = self._doubled(at, layer, inputs.pop().pop().slab, alive=alive)
                case Join():
                    inputs.insert(0, self._waited(at, layer, states[at]))
                    continue
            inputs = [[_Piece(slab, 0, 0, self._n_rows[at + 1])]]
            for join in self._joins_of(at + 1):
                self._wait(join, slab, states[join])
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
        self, at: int, layer: Conv, inputs: list[list[_Piece]], state: _State, *, alive: bool
    ) -> _Slab:
        """Return a convolution's slab; its input is put behind the rows kept from before, in one copy."""
        out = _Slab(None, layer.out, self._cross[at + 1])
        if layer.reach == 0 and len(inputs) == 1 and (whole := inputs.pop().pop().slab).cross == out.cross:
            return out if whole.x is None or not alive else replace(out, x=self.engine.conv(at, whole.x))
        n_batch = next((p.slab.x.shape[0] for part in inputs for p in part if p.slab.x is not None), 0)
        if state.rows is not None:
            n_batch = state.rows.shape[0]
        if not n_batch:
            return out
        cross = tuple(layer.needs(span) for span in out.cross)
        n_kept, n_rows = 2 * layer.reach, self._n_rows[at]
        x = self.engine.empty((n_batch, layer.into, n_kept + n_rows, *(b - a for a, b in cross)))
        _fill(x.narrow(2, n_kept, n_rows), inputs, cross)
        inputs.clear()
        if n_kept:
            before, after = x.narrow(2, 0, n_kept), x.narrow(2, n_rows, n_kept)
            if state.rows is None:
                before.zero_()
                state.rows = after.clone(memory_format=self.engine.memory_format)
            else:
                before.copy_(state.rows)
                state.rows.copy_(after)
        return replace(out, x=self.engine.conv(at, x)) if alive else out

    def _pooled(self, at: int, layer: Pool, slab: _Slab, state: _State, *, alive: bool) -> _Slab:
        """Return the maximum of pairs; a row without its partner waits for the next slab."""
        out = _Slab(None, layer.out, self._cross[at + 1])
        x = slab.cropped(tuple(layer.needs(span) for span in out.cross)).x
        if x is None:
            return out
        odd = (self._lags[at] - layer.phase) % 2
        before = state.rows
        if odd:
            state.rows = x.narrow(2, x.shape[2] - 1, 1).clone(memory_format=self.engine.memory_format)
        if not alive:
            return out
        if odd:
            y = self.engine.empty((*x.shape[:2], x.shape[2] // 2, *x.shape[3:]))
            torch.maximum(x[:, :, :1] if before is None else before, x[:, :, :1], out=y[:, :, :1])
            torch.maximum(x[:, :, 1:-1:2], x[:, :, 2::2], out=y[:, :, 1:])
        else:
            y = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
        del x, slab
        return replace(out, x=_halved(y))

    def _doubled(self, at: int, layer: Up, slab: _Slab, *, alive: bool) -> _Slab:
        """Return twice the resolution along every axis."""
        cross = tuple((layer.has(low), layer.has(high)) for low, high in slab.cross)
        x = self.engine.up(at, slab.x) if alive and slab.x is not None else None
        return _Slab(x, layer.out, cross)

    def _joins_of(self, tensor: int) -> list[int]:
        return [at for at, layer in enumerate(self.chain) if isinstance(layer, Join) and layer.skip == tensor]

    def _delay(self, at: int, layer: Join) -> int:
        """Return how many rows a skip is ahead of the branch that it waits for."""
        return self._lags[layer.skip] - self._lags[at]

    def _wait(self, at: int, slab: _Slab, state: _State) -> None:
        """Keep a skip's slab until its join has come as far, and of it what the join needs, where that is much less."""
        kept = slab.cropped(self._cross[at + 1])
        if kept.x is not None and kept.x.nbytes < _WORTH_COPYING * kept.x.untyped_storage().nbytes():
            kept = replace(kept, x=kept.x.clone(memory_format=self.engine.memory_format))
        state.slabs.append(kept)

    def _waited(self, at: int, layer: Join, state: _State) -> list[_Piece]:
        """Return the skip's rows that belong beside the other branch's: the end of one slab, the begin of the next."""
        n = self._n_rows[at + 1]
        back, rest = divmod(self._delay(at, layer), n)
        nothing = replace(state.slabs[-1], x=None)
        past = [*reversed(state.slabs), *(nothing,) * (back + 2)]
        while len(state.slabs) > back + bool(rest):
            state.slabs.popleft()
        pieces = [_Piece(past[back], 0, rest, n - rest)]
        return [*pieces, _Piece(past[back + 1], n - rest, 0, rest)] if rest else pieces


_WORTH_COPYING = 0.85


@dataclass(frozen=True, slots=True)
class _Piece:
    """``n`` rows of a slab, from row ``source`` on, that go to row ``target``."""

    slab: _Slab
    source: int
    target: int
    n: int


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


def _halved(x: Tensor) -> Tensor:
    """Return the maximum of pairs along every axis across the column."""
    for axis in range(3, x.ndim):
        index = (slice(None),) * axis
        x = torch.maximum(x[(*index, slice(0, None, 2))], x[(*index, slice(1, None, 2))])
    return x
