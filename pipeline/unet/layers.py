"""The layers of networks, and where each layer's voxels lie: plain integers, no torch.

Positions are those of the scan, divided by each pooling. A convolution of reach r sees r voxels to each side, whatever
its padding: zeros are met at a border only, and the halo keeps the border out of reach. Hence along every axis, for a
factor f of 1 or 2,

    layer           to have a .. b, it needs              having its input up to e, it has
    convolution     a - r .. b + r                        e - r
    pooling         f a + phase .. f b + phase            (e - phase) // f
    upsampling      (a - phase) // f .. ceil((b - phase) / f)      f e + phase
    join, sum       a .. b of all branches                the shortest of them

Read from the right, this says how much of every layer a core needs; read from the left, how far a stream has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pipeline.unet.settings import Padding, UNetSettings, Upsampling

Span = tuple[int, int]
Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What makes one tensor of others; tensor 0 is the network's input, tensor i + 1 what layer i makes.

    Attributes
    ----------
    source : the tensor that the layer takes
    skips : others that it takes, of the same resolution, cropped about their centre where they are larger
    scale : voxels of the scan per voxel that it makes, along each axis
    out : channels that it makes
    """

    source: int
    scale: Axes
    out: int
    skips: tuple[int, ...] = ()

    def needs(self, span: Span, axis: int) -> Span:
        """Return the positions of the source that the outputs ``span`` depend on."""
        del axis
        return span

    def has(self, end: int, axis: int) -> int:
        """Return where the output ends when what it is made of, the shortest of all branches, ends at ``end``."""
        del axis
        return end


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(Layer):
    """A convolution, by ``name`` in the network, the normalisation ``norm`` after it, and a ReLU, if it has them."""

    name: str
    into: int
    reach: Axes
    relu: bool
    norm: str = ""

    def needs(self, span: Span, axis: int) -> Span:
        """Return the positions of the source that the outputs depend on."""
        return span[0] - self.reach[axis], span[1] + self.reach[axis]

    def has(self, end: int, axis: int) -> int:
        """Return where the output ends."""
        return end - self.reach[axis]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool(Layer):
    """The maximum of ``factor`` voxels along every axis, beginning with ``phase``."""

    factor: Axes
    phase: Axes

    def needs(self, span: Span, axis: int) -> Span:
        """Return the fine positions that the coarse ones depend on."""
        f, phase = self.factor[axis], self.phase[axis]
        return f * span[0] + phase, f * span[1] + phase

    def has(self, end: int, axis: int) -> int:
        """Return where the coarse voxels end when the fine ones end at ``end``."""
        return (end - self.phase[axis]) // self.factor[axis]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stride(Pool):
    """A convolution of the same voxels in place of their maximum."""

    name: str
    into: int
    relu: bool
    norm: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Up(Layer):
    """``factor`` times the resolution, by ``name`` in the network."""

    name: str
    into: int
    factor: Axes
    phase: Axes

    def needs(self, span: Span, axis: int) -> Span:
        """Return the coarse positions that the fine ones depend on."""
        f, phase = self.factor[axis], self.phase[axis]
        return (span[0] - phase) // f, -((phase - span[1]) // f)

    def has(self, end: int, axis: int) -> int:
        """Return where the fine voxels end when the coarse ones end at ``end``."""
        return self.factor[axis] * end + self.phase[axis]

    def makes(self, span: Span, axis: int) -> Span:
        """Return the fine positions that follow from the coarse ones ``span``."""
        return self.has(span[0], axis), self.has(span[1], axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolate(Layer):
    """``factor`` times the resolution, each voxel between the two nearest ones; learnt where it has a ``name``."""

    name: str
    factor: Axes

    def needs(self, span: Span, axis: int) -> Span:
        """Return the coarse positions that the fine ones depend on."""
        f = self.factor[axis]
        return span if f == 1 else ((span[0] - f // 2) // f, (span[1] - 1 - f // 2) // f + 2)

    def has(self, end: int, axis: int) -> int:
        """Return where the fine voxels end when the coarse ones end at ``end``."""
        f = self.factor[axis]
        return end if f == 1 else f * end - f // 2

    def makes(self, span: Span, axis: int) -> Span:
        """Return the fine positions that lie between the coarse ones ``span``."""
        return -self.has(-span[0], axis), self.has(span[1], axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Layer):
    """A ReLU, after the normalisation ``norm`` if there is one."""

    norm: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(Layer):
    """The channels of the skips, in front of those of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(Layer):
    """The sum of source and skips, or their mean, and a ReLU after it where there is one."""

    relu: bool = False
    mean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate(Layer):
    """The skip, each voxel times the sigmoid of the source, which has one channel."""


Chain = tuple[Layer, ...]


def spans(chain: Chain, core: Span, axis: int) -> tuple[Span, ...]:
    """Return for every tensor the positions along an axis that the outputs ``core`` depend on, and no others."""
    needed: dict[int, Span] = {len(chain): core}
    for at in reversed(range(len(chain))):
        layer, span = chain[at], needed[at + 1]
        needed[layer.source] = _hull(needed.get(layer.source), layer.needs(span, axis))
        for skip in layer.skips:
            needed[skip] = _hull(needed.get(skip), span)
    return tuple(needed[at] for at in range(len(chain) + 1))


def _hull(a: Span | None, b: Span) -> Span:
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]))


def parts(chain: Chain, tensor: int) -> tuple[int, ...]:
    """Return the tensors whose channels a tensor has, itself unless it was joined of others."""
    layer = chain[tensor - 1] if tensor else None
    if not isinstance(layer, Join):
        return (tensor,)
    return tuple(part for each in (*layer.skips, layer.source) for part in parts(chain, each))


def shapes(chain: Chain, tile_shape: Axes, padding: Padding) -> list[Axes]:
    """Return the voxels of every tensor, along each axis, where a tile of this shape enters."""
    every, dropped = [tile_shape], 2 if padding is Padding.VALID else 0
    for layer in chain:
        shape = every[layer.source]
        match layer:
            case Conv():
                shape = tuple(n - dropped * reach for n, reach in zip(shape, layer.reach, strict=True))
            case Pool():
                shape = tuple(n // f for n, f in zip(shape, layer.factor, strict=True))
            case Up() | Interpolate():
                shape = tuple(n * f for n, f in zip(shape, layer.factor, strict=True))
        every.append(shape)
    return every


def last_uses(chain: Chain) -> list[int]:
    """Return for every tensor the last layer that takes it; for the network's output the number of layers."""
    last = [len(chain)] * (len(chain) + 1)
    for at, layer in enumerate(chain):
        for tensor in (layer.source, *layer.skips):
            last[tensor] = at
    return last


def n_weights(layer: Layer) -> int:
    """Return the numbers in a layer's kernel, without its bias."""
    match layer:
        case Conv():
            return layer.into * layer.out * prod(2 * reach + 1 for reach in layer.reach)
        case Stride() | Up():
            return layer.into * layer.out * prod(layer.factor)
        case Interpolate() if layer.name:
            return layer.out**2 * prod(2 * f if f > 1 else 1 for f in layer.factor)
    return 0


def multiply_adds(layer: Layer, settings: UNetSettings) -> int:
    """Return the multiplications of a layer per voxel that it makes; what is interpolated by rule counts as none."""
    match layer:
        case Up():
            return layer.into * layer.out // (prod(layer.factor) if settings.up is Upsampling.RESIZE else 1)
        case Interpolate():
            return n_weights(layer) // prod(layer.factor)
    return n_weights(layer)
