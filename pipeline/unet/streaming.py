"""Streaming inference: a network over a column of a scan, slab by slab, nothing computed twice along the column.

    input      |....|slab|            read one after another, each once
    layer 1     ...|....|slab|        every layer makes a slab of the same length, a little behind its source:
    layer 2    ..|....|slab|          it keeps the last rows of it, which the next slab's first outputs need
    output     |....|slab|            branches that are joined, added or gated wait for the one furthest behind

Rows are positions along the streamed axis, counted from the scan's origin, whatever the column's first row is, so that
a column that is taken up again in its middle computes the very same slabs. Across the column each layer computes what
the column's core needs, and no more (``layers.spans``). What is kept are the line buffers of hardware convolution
engines: 2 * reach rows for each convolution, and for each branch as many as it waits for others (``schedule``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.unet.engine import Engine
from pipeline.unet.layers import (
    Activate,
    Axes,
    Conv,
    Gate,
    Interpolate,
    Join,
    Pool,
    Span,
    Stride,
    Sum,
    Up,
    spans,
)
from pipeline.unet.readout import mean
from pipeline.unet.schedule import Taken, schedule_of
from pipeline.unet.slabs import Part, Piece, RingBuffer, Slab, add_side_by_side, copy_side_by_side, cropped, whole

ReadRows = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What stays between slabs, of one engine.

    Attributes
    ----------
    kept : the last rows of what each layer takes
    rings : by tensor, of what waits
    bench : flat, where one layer after another puts together what it takes
    """

    engine: Engine
    kept: list[Tensor]
    rings: dict[int, RingBuffer]
    bench: Tensor


class Stream:
    """Runs a network over columns with one cross-section.

    Parameters
    ----------
    engines : whose first axis is the streamed one; of several, with the same settings, the probabilities are averaged
    cross : the core's cross-section, one (start, stop) per remaining axis, positions in the scan
    slab : rows that enter at once, a multiple of the network's stride
    """

    def __init__(self, *engines: Engine, cross: tuple[Span, ...], slab: int) -> None:
        engine = engines[0]
        engine.settings.check_slab(slab)
        if len(cross) != engine.dims - 1:
            raise ArgumentError(
                f"a stream needs {engine.dims - 1} axes across it, got {len(cross)}; give all but the streamed one"
            )
        self.engines, self.engine, self.slab, self.chain = engines, engine, slab, engine.chain
        self.schedule = schedule_of(
            engine.chain, cross, in_channels=engine.settings.in_channels, order=engine.order, slab=slab
        )

    @property
    def cross(self) -> tuple[Span, ...]:
        """What ``read`` must deliver across the column, one (start, stop) per remaining axis; may leave the scan."""
        return self.schedule.cross[0]

    def slabs(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the rows that ``run`` will read, in its order; they may leave the scan."""
        low, high = spans(self.chain, (start, stop), self.schedule.axis)[0]
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
        needed = spans(self.chain, (start, stop), self.schedule.axis)
        memories, lag = self._memories(n_batch), self.schedule.lags[-1]
        for step in range(needed[0][0] // self.slab, (stop - 1 - lag) // self.slab + 1):
            logits = mean(self._logits(step, needed, memories, read), self.engine.settings.head)
            if logits is not None:
                at = step * self.slab + lag
                low, high = max(start, at), min(stop, at + self.slab)
                yield low, logits.narrow(2, low - at, high - low)

    def _memories(self, n_batch: int) -> list[_Memory]:
        """Return what stays between slabs, for each engine, still zero.

        All of it is made beforehand, so that what comes and goes with each slab finds the same places free each time.
        """
        plan = self.schedule

        def zeros(tensor: int, n_rows: int, cross: tuple[Span, ...]) -> Tensor:
            shape = (n_batch, plan.channels[tensor], n_rows, *(b - a for a, b in cross))
            return self.engine.empty(shape).zero_()

        def kept() -> list[Tensor]:
            every = zip(self.chain, plan.kept, plan.under, strict=True)
            return [zeros(layer.source, n_rows, under) for layer, n_rows, under in every]

        def rings() -> dict[int, RingBuffer]:
            return {at: RingBuffer(zeros(at, each.n_rows, each.cross), each.cross) for at, each in plan.rings.items()}

        longest = n_batch * max(map(plan.taken_size, range(len(self.chain))))
        bench = self.engine.empty((longest, *(1,) * (self.engine.dims + 1))).flatten()
        return [_Memory(engine, kept(), rings(), bench) for engine in self.engines]

    def _logits(
        self, step: int, needed: tuple[Span, ...], memories: list[_Memory], read: ReadRows
    ) -> Iterator[Tensor]:
        """Feed one slab to every engine; yields what comes out of each, nothing if none of it is needed."""
        entering = [self._input(step, needed[0], read)] * len(memories)
        for memory in memories:
            logits = self._step(step, needed, memory, entering.pop())
            if logits is not None:
                yield logits
            del logits

    def _step(self, step: int, needed: tuple[Span, ...], memory: _Memory, entering: Slab) -> Tensor | None:
        """Feed one slab; returns the logits that come out, None if none of them is needed."""
        plan, slabs = self.schedule, dict[int, Slab]()
        self._put(0, entering, slabs, memory, step)
        for at, layer in enumerate(self.chain):
            if isinstance(layer, Join):
                continue
            inputs = [[self._part(part, slabs, memory, step) for part in taken] for taken in plan.takes[at]]
            for tensor in plan.freed[at]:
                del slabs[tensor]
            x, cross = None, plan.cross[at + 1]
            if self._is_among(at + 1, step, needed[at + 1]):
                x = self._made(at, inputs, memory)
            elif plan.kept[at] and self._is_among(layer.source, step, layer.needs(needed[at + 1], plan.axis)):
                self._keep(at, inputs.pop(), memory)
            inputs.clear()
            self._put(at + 1, Slab(x, layer.out, cross), slabs, memory, step)
            del x
        return slabs.pop(len(self.chain)).x

    def _input(self, step: int, needed: Span, read: ReadRows) -> Slab:
        """Return the input's slab; rows that nothing depends on are zero."""
        begin, channels = step * self.slab, self.engine.settings.in_channels
        low, high = max(begin, needed[0]), min(begin + self.slab, needed[1])
        if low >= high:
            return Slab(None, channels, self.cross)
        x = read(low, high)
        if high - low < self.slab:
            part, x = x, self.engine.empty((*x.shape[:2], self.slab, *x.shape[3:])).zero_()
            x.narrow(2, low - begin, high - low).copy_(part)
        return Slab(x, channels, self.cross)

    def _is_among(self, tensor: int, step: int, needed: Span) -> bool:
        """Whether a row of the tensor's slab at this step is needed."""
        n = self.schedule.n_rows[tensor]
        begin = step * n + self.schedule.lags[tensor]
        return begin < needed[1] and begin + n > needed[0]

    def _put(self, tensor: int, slab: Slab, slabs: dict[int, Slab], memory: _Memory, step: int) -> None:
        """Have a slab at hand for the layers that take it now, and keep it for those that take it later."""
        n = self.schedule.n_rows[tensor]
        if tensor in memory.rings:
            memory.rings[tensor].put(slab, step * n, n)
        if tensor in self.schedule.at_hand:
            slabs[tensor] = slab

    def _part(self, part: Taken, slabs: dict[int, Slab], memory: _Memory, step: int) -> Part:
        """Return the rows of a tensor that a layer takes at this step."""
        n = self.schedule.n_rows[part.tensor]
        if part.delay:
            return memory.rings[part.tensor].part(step * n - part.delay, n)
        return [Piece(slabs[part.tensor], 0, 0, n)]

    def _made(self, at: int, inputs: list[list[Part]], memory: _Memory) -> Tensor:
        """Return a layer's slab; what it takes is let go of as soon as it is used."""
        layer, plan = self.chain[at], self.schedule
        if isinstance(layer, Sum | Gate):
            return self._combined(at, layer, inputs, memory)
        x = self._on_bench(at, inputs[0], memory) if plan.copies[at] else whole(inputs[0], plan.under[at])
        inputs.clear()
        match layer:
            case Conv():
                return memory.engine.conv(at, x)
            case Stride():
                return memory.engine.strided(at, x)
            case Pool():
                return self._pooled(layer, x, memory.kept[at])
            case Activate():
                return memory.engine.activated(at, x)
            case Up():
                x = memory.engine.up(at, x)
            case Interpolate():
                x = memory.engine.interpolated_inside(at, x)
            case _:
                raise TypeError(f"layer {layer} makes nothing")
        made = tuple(layer.makes(span, axis) for span, axis in zip(plan.under[at], plan.across, strict=True))
        return cropped(x, made, plan.cross[at + 1])

    def _on_bench(self, at: int, parts: list[Part], memory: _Memory) -> Tensor:
        """Return what a layer takes, in one copy, behind the rows kept from before, and keep its last ones."""
        before, n_rows = memory.kept[at], self.schedule.n_rows[self.chain[at].source]
        n_batch, n_channels, n_kept, *across = before.shape
        shape = n_batch, n_kept + n_rows, *across, n_channels
        x = memory.bench[: prod(shape)].view(shape).movedim(-1, 1)
        copy_side_by_side(x.narrow(2, n_kept, n_rows), parts, self.schedule.under[at])
        parts.clear()
        if n_kept:
            x.narrow(2, 0, n_kept).copy_(before)
            before.copy_(x.narrow(2, n_rows, n_kept))
        return x

    def _keep(self, at: int, parts: list[Part], memory: _Memory) -> None:
        """Keep the last rows of what a layer takes, before the first slab of its own that is needed."""
        if self.schedule.copies[at]:
            self._on_bench(at, parts, memory)
        else:
            memory.kept[at].copy_(whole(parts, self.schedule.under[at])[:, :, -1:])

    def _combined(self, at: int, layer: Sum | Gate, inputs: list[list[Part]], memory: _Memory) -> Tensor:
        """Return the sum, in the memory of its source where no other layer takes that, or the skip as weighed."""
        cross, before = self.schedule.under[at], memory.kept[at]
        source, *skips = inputs
        total = whole(source, cross) if self.schedule.is_own(at) else self.engine.empty(
            (before.shape[0], layer.out, self.schedule.n_rows[at + 1], *before.shape[3:])
        )  # fmt: skip
        if isinstance(layer, Gate):
            copy_side_by_side(total, skips[0], cross)
            return total.mul_(whole(source, cross).sigmoid())
        if not self.schedule.is_own(at):
            copy_side_by_side(total, source, cross)
        for parts in skips:
            add_side_by_side(total, parts, cross)
        total = total.div_(1 + len(skips)) if layer.mean else total
        return total.relu_() if layer.relu else total

    def _pooled(self, layer: Pool, x: Tensor, before: Tensor) -> Tensor:
        """Return the maximum of pairs; a row without its partner waits for the next slab."""
        factor = self.engine.ordered(layer.factor)
        if before.shape[2]:
            y = self.engine.empty((*x.shape[:2], x.shape[2] // 2, *x.shape[3:]))
            torch.maximum(before, x[:, :, :1], out=y[:, :, :1])
            torch.maximum(x[:, :, 1:-1:2], x[:, :, 2::2], out=y[:, :, 1:])
            before.copy_(x[:, :, -1:])
            x, factor = y, (1, *factor[1:])
        return _pooled(x, factor)


def _pooled(x: Tensor, factor: Axes) -> Tensor:
    """Return the maximum of pairs along every axis whose factor is 2."""
    for axis, f in enumerate(factor, start=2):
        if f == 2:
            index = (slice(None),) * axis
            x = torch.maximum(x[(*index, slice(0, None, 2))], x[(*index, slice(1, None, 2))])
    return x
