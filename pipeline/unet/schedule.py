"""What a stream has of every tensor when, and what it keeps for later: plain integers, no torch.

    skip       |..........|slab|     a branch that is ahead waits in a ring of rows: the newest slab, and as many
    other      ..|slab|              rows before it as the other branch is behind, which are the ones that it meets
    kept       ......|rr|slab|       what reaches along the stream keeps the last rows of its source, in front of
                                     the next slab

Joins make nothing: who takes a joined tensor takes its parts, each from its own ring or slab.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from pipeline.unet.layers import (
    Axes,
    Chain,
    Conv,
    Gate,
    Interpolate,
    Join,
    Layer,
    Pool,
    Span,
    Stride,
    Sum,
    Up,
    parts,
    spans,
)


@dataclass(frozen=True, slots=True)
class Taken:
    """A tensor of which a layer takes the rows that end ``delay`` rows before the newest."""

    tensor: int
    delay: int


@dataclass(frozen=True, slots=True)
class Ring:
    """The last ``n_rows`` rows of a tensor, over the positions ``cross`` across the stream."""

    n_rows: int
    cross: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A network as a stream runs it, slab by slab.

    Attributes
    ----------
    chain : its layers
    channels : of every tensor
    axis : the streamed one
    across : the others
    lags : for every tensor how far its end lies past that of the input, in its own rows; never positive
    n_rows : rows of a slab of every tensor
    cross : positions of every tensor across the stream
    under : positions of what a layer takes across the stream, for every layer
    takes : for every layer the parts of its source and of its skips; nothing for a join
    kept : rows of its source that every layer keeps in front of the next slab
    copies : whether a layer puts what it takes together in memory of its own; others read it where it lies
    rings : by tensor, of those that a layer takes later than they are made
    at_hand : tensors that a layer takes as they are made, and the network's output
    freed : for every layer those of them that no later one takes
    """

    chain: Chain
    channels: tuple[int, ...]
    axis: int
    across: Axes
    lags: tuple[int, ...]
    n_rows: tuple[int, ...]
    cross: tuple[tuple[Span, ...], ...]
    under: tuple[tuple[Span, ...], ...]
    takes: tuple[tuple[tuple[Taken, ...], ...], ...]
    kept: tuple[int, ...]
    copies: tuple[bool, ...]
    rings: dict[int, Ring]
    at_hand: frozenset[int]
    freed: tuple[tuple[int, ...], ...]

    def is_own(self, at: int) -> bool:
        """Whether a sum alone takes what its source has made, and takes it at once: it may change it."""
        first, *others = self.takes[at][0]
        own = not others and not first.delay and first.tensor > 0 and first.tensor in self.freed[at]
        return own and isinstance(self.chain[at], Sum)

    def taken_size(self, at: int) -> int:
        """Return the numbers that a layer puts together, for one of a batch; those of a sum or gate are its own."""
        layer = self.chain[at]
        if not self.copies[at] or isinstance(layer, Sum | Gate):
            return 0
        return (self.kept[at] + self.n_rows[layer.source]) * self.row_size(at)

    def row_size(self, at: int) -> int:
        """Return the numbers in a row of what a layer takes of its source."""
        n_channels = self.channels[self.chain[at].source]
        return n_channels * prod(stop - start for start, stop in self.under[at])

    def slab_size(self, tensor: int) -> int:
        """Return the numbers in a slab of a tensor."""
        return self.channels[tensor] * self.n_rows[tensor] * prod(stop - start for start, stop in self.cross[tensor])


def schedule_of(
    chain: Chain, cross: tuple[Span, ...], *, in_channels: int, order: Axes, slab: int
) -> Schedule:
    """Return how a network is streamed.

    Parameters
    ----------
    cross : the core's cross-section, one (start, stop) per axis across the stream, in their order
    order : the network's axes, the streamed one first
    slab : rows that enter at once, a multiple of the network's stride
    """
    axis, *across = order
    behind = lags(chain, axis)
    rows = (slab, *(slab // layer.scale[axis] for layer in chain))
    sections = tuple(zip(*(spans(chain, span, at) for span, at in zip(cross, across, strict=True)), strict=True))
    under = tuple(
        tuple(layer.needs(span, at) for span, at in zip(sections[n + 1], across, strict=True))
        for n, layer in enumerate(chain)
    )
    takes = tuple(_taken(chain, at, behind, axis) for at in range(len(chain)))
    kept = tuple(_kept(layer, behind[layer.source], axis) for layer in chain)
    copies = tuple(
        _copies(layer, taken, n_kept=n, is_cropped=sections[layer.source] != cut)
        for layer, taken, n, cut in zip(chain, takes, kept, under, strict=True)
    )
    freed = _freed(takes)
    return Schedule(
        chain=chain, channels=(in_channels, *(layer.out for layer in chain)), axis=axis, across=tuple(across),
        lags=behind, n_rows=rows, cross=sections, under=under, takes=takes, kept=kept, copies=copies,
        rings=_rings(takes, rows, under), at_hand=frozenset({len(chain)}.union(*freed)), freed=freed,
    )  # fmt: skip


@lru_cache(maxsize=16)
def lags(chain: Chain, axis: int) -> tuple[int, ...]:
    """Return for every tensor how far its end lies past that of a stream's input, in its own rows; never positive.

    A convolution of one voxel makes what would wait for another branch no sooner than that branch has come, unless its
    source is larger and need not wait as well.
    """
    ends = [0]
    for layer in chain:
        ends.append(layer.has(min(ends[tensor] for tensor in (layer.source, *layer.skips)), axis))
    inputs = [(layer.source, *layer.skips) for layer in chain]
    takers = {tensor: [at for at, each in enumerate(inputs) if tensor in each] for tensor in range(len(chain))}
    late = {
        tensor: max(ends[at + 1] for at in every) for tensor, every in takers.items()
        if every and all(chain[at].skips for at in every)
    }  # fmt: skip
    waiting = {
        part for at, layer in enumerate(chain) if layer.skips for tensor in inputs[at]
        if ends[tensor] > ends[at + 1] for part in parts(chain, tensor)
    }  # fmt: skip
    channels = {at + 1: layer.out for at, layer in enumerate(chain)}
    for at, layer in enumerate(chain):
        if at + 1 in late and isinstance(layer, Conv) and not any(layer.reach):
            fresh = [part for part in parts(chain, layer.source) if part not in waiting]
            if sum(channels.get(part, layer.into) for part in fresh) <= layer.out:
                ends[at + 1] = min(ends[at + 1], late[at + 1])
    return tuple(ends)


def rows_made(chain: Chain, n_rows: int, slab: int, axis: int) -> list[int]:
    """Return the rows that each layer makes for ``n_rows`` of the output, in whole slabs.

    What is interpolated past a slab's end is left out, but counts, as torch counts it.
    """
    made, ends = [], lags(chain, axis)[1:]
    for layer, (start, stop), lag in zip(chain, spans(chain, (0, n_rows), axis)[1:], ends, strict=True):
        n = slab // layer.scale[axis]
        n_slabs = -((lag - stop) // n) - (start - lag) // n
        between = layer.factor[axis] if isinstance(layer, Interpolate) and layer.factor[axis] > 1 else 0
        made.append(n_slabs * (n + between))
    return made


def cross_made(chain: Chain, extent: int, axis: int) -> list[int]:
    """Return the extent of what each layer makes for a core of this extent; upsampling makes all of each coarse one."""
    made = []
    for layer, span in zip(chain, spans(chain, (0, extent), axis)[1:], strict=True):
        start, stop = layer.makes(layer.needs(span, axis), axis) if isinstance(layer, Up) else span
        if isinstance(layer, Interpolate):
            start, stop = (each * layer.factor[axis] for each in layer.needs(span, axis))
        made.append(stop - start)
    return made


def _taken(chain: Chain, at: int, behind: tuple[int, ...], axis: int) -> tuple[tuple[Taken, ...], ...]:
    """Return what a layer takes of its source and of its skips."""
    layer = chain[at]
    if isinstance(layer, Join):
        return ()
    reach = layer.reach[axis] if isinstance(layer, Conv) else 0
    in_step = not layer.skips and not isinstance(layer, Conv)
    return tuple(
        _parts(chain, tensor, 0 if in_step else behind[tensor] - reach - behind[at + 1], behind)
        for tensor in (layer.source, *layer.skips)
    )


def _parts(chain: Chain, tensor: int, delay: int, behind: tuple[int, ...]) -> tuple[Taken, ...]:
    """Return the parts of a tensor as they are taken."""
    return tuple(Taken(part, delay + behind[part] - behind[tensor]) for part in parts(chain, tensor))


def _kept(layer: Layer, behind: int, axis: int) -> int:
    """Return how many rows of its source a layer keeps: a pair of rows may begin in one slab and end in the next."""
    match layer:
        case Conv():
            return 2 * layer.reach[axis]
        case Pool() | Stride():
            return (behind - layer.phase[axis]) % layer.factor[axis]
        case Interpolate():
            return int(layer.factor[axis] > 1)
    return 0


def _copies(layer: Layer, taken: tuple[tuple[Taken, ...], ...], *, n_kept: int, is_cropped: bool) -> bool:
    """Return whether a layer takes several parts, or some that go round a ring, or wants them side by side."""
    match layer:
        case Join():
            return False
        case Conv():
            together = any(layer.reach) or is_cropped
        case Stride() | Interpolate():
            together = n_kept > 0
        case _:
            together = isinstance(layer, Sum | Gate)
    return together or len(taken[0]) > 1 or taken[0][0].delay > 0


def _rings(
    takes: tuple[tuple[tuple[Taken, ...], ...], ...], rows: tuple[int, ...], under: tuple[tuple[Span, ...], ...]
) -> dict[int, Ring]:
    rings: dict[int, Ring] = {}
    for cross, inputs in zip(under, takes, strict=True):
        for each in (part for taken in inputs for part in taken if part.delay):
            n, was = rows[each.tensor] + each.delay, rings.get(each.tensor, Ring(0, cross))
            hull = ((min(a, c), max(b, d)) for (a, b), (c, d) in zip(was.cross, cross, strict=True))
            rings[each.tensor] = Ring(max(n, was.n_rows), tuple(hull))
    return rings


def _freed(takes: tuple[tuple[tuple[Taken, ...], ...], ...]) -> tuple[tuple[int, ...], ...]:
    last = {
        part.tensor: at for at, inputs in enumerate(takes) for taken in inputs for part in taken if not part.delay
    }
    return tuple(tuple(tensor for tensor, final in last.items() if final == at) for at in range(len(takes)))
