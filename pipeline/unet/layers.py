"""A U-Net as a chain of layers, and where each layer's voxels lie: plain integers, no torch.

Positions are those of the scan, halved on each level. A convolution of reach r sees r voxels to each side, whatever
its padding: zeros are met at a border only, and the halo keeps the border out of reach. Hence for every axis

    layer           to have a .. b, it needs              having its input up to e, it has
    convolution     a - r .. b + r                        e - r
    pooling         2a + phase .. 2b + phase              (e - phase) // 2
    upsampling      (a - phase) // 2 .. ceil((b - phase) / 2)      2e + phase
    join            a .. b of both branches               the shorter of both

Read from the right, this says how much of every layer a core needs; read from the left, how far a stream has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pipeline.unet.settings import Padding, UNetSettings, Upsampling, closed_form_rule

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution, by ``name`` in the network, and the ReLU after it where there is one."""

    name: str
    level: int
    into: int
    out: int
    reach: int
    relu: bool

    def needs(self, span: Span) -> Span:
        """Return the input positions that the outputs ``span`` depend on."""
        return span[0] - self.reach, span[1] + self.reach

    def has(self, end: int) -> int:
        """Return where the output ends when the input ends at ``end``."""
        return end - self.reach


@dataclass(frozen=True, slots=True)
class Pool:
    """The maximum of two voxels along every axis, ``phase`` and the one after it; ``level`` is the coarse one."""

    level: int
    out: int
    phase: int

    def needs(self, span: Span) -> Span:
        """Return the fine positions that the coarse ones depend on."""
        return 2 * span[0] + self.phase, 2 * span[1] + self.phase

    def has(self, end: int) -> int:
        """Return where the coarse voxels end when the fine ones end at ``end``."""
        return (end - self.phase) // 2


@dataclass(frozen=True, slots=True)
class Up:
    """Twice the resolution, by ``name`` in the network; ``level`` is the fine one."""

    name: str
    level: int
    into: int
    out: int
    phase: int

    def needs(self, span: Span) -> Span:
        """Return the coarse positions that the fine ones depend on."""
        return (span[0] - self.phase) // 2, -((self.phase - span[1]) // 2)

    def has(self, end: int) -> int:
        """Return where the fine voxels end when the coarse ones end at ``end``."""
        return 2 * end + self.phase


@dataclass(frozen=True, slots=True)
class Join:
    """The channels of an earlier layer, the output of number ``skip - 1`` in the chain, in front of its input's."""

    level: int
    skip: int
    out: int

    def needs(self, span: Span) -> Span:
        """Return the positions needed of both branches."""
        return span

    def has(self, end: int) -> int:
        """Return where the joined channels end: the other branch, nearer to the input, is never behind."""
        return end


Layer = Conv | Pool | Up | Join
Chain = tuple[Layer, ...]


def chain_of(settings: UNetSettings) -> Chain:
    """Return the layers in the order of the forward pass; tensor 0 is the input, tensor i + 1 what layer i makes."""
    chain: list[Layer] = []
    skips: list[tuple[int, int]] = []
    phases = _phases(settings)
    into = settings.in_channels
    for level, channels in enumerate(channels_of(settings)):
        if level:
            chain.append(Pool(level, into, phases[level - 1]))
        chain += _convs("bottom" if level == settings.depth else f"contract.{level}", level, channels, settings)
        into = channels[-1]
        skips.append((len(chain), into))
    skips.pop()
    for at, level in enumerate(reversed(range(settings.depth))):
        skip, width = skips.pop()
        deep = into if settings.double_before_pooling else width
        chain.append(Up(f"up.{at}", level, into, deep, phases[level]))
        chain.append(Join(level, skip, deep + width))
        chain += _convs(f"expand.{at}", level, (deep + width, *(width,) * settings.n_convs), settings)
        into = width
    return (*chain, Conv("head", 0, into, settings.n_classes, 0, relu=False))


def channels_of(settings: UNetSettings) -> list[tuple[int, ...]]:
    """Return for each level the channels before the first and after each convolution of the contracting path."""
    levels, into = [], settings.in_channels
    for level in range(settings.depth + 1):
        width = settings.width << level
        if settings.double_before_pooling:
            chain = (into, *(width,) * (settings.n_convs - 1), 2 * width)
        else:
            chain = (into, *(width,) * settings.n_convs)
        levels.append(chain)
        into = chain[-1]
    return levels


def _convs(name: str, level: int, channels: tuple[int, ...], settings: UNetSettings) -> list[Layer]:
    step = 3 if settings.batch_norm else 2  # convolution, (BatchNorm,) ReLU
    reach = settings.kernel // 2
    return [
        Conv(f"{name}.{step * i}", level, into, out, reach, relu=True)
        for i, (into, out) in enumerate(pairwise(channels))
    ]


def _phases(settings: UNetSettings) -> tuple[int, ...]:
    """Return on which voxels the windows of each pooling begin, modulo 2, in a tile that starts as the rule says."""
    start = -closed_form_rule(settings).halo[0]
    phases = []
    for _ in range(settings.depth):
        start += settings.radius if settings.padding is Padding.VALID else 0
        phases.append(start % 2)
        start = (start - phases[-1]) // 2
    return tuple(phases)


def spans(chain: Chain, core: Span) -> tuple[Span, ...]:
    """Return for every tensor the positions along one axis that the outputs ``core`` depend on, and no others."""
    needed: dict[int, Span] = {len(chain): core}
    for at in reversed(range(len(chain))):
        layer, span = chain[at], needed[at + 1]
        needed[at] = _hull(needed.get(at), layer.needs(span))
        if isinstance(layer, Join):
            needed[layer.skip] = _hull(needed.get(layer.skip), span)
    return tuple(needed[at] for at in range(len(chain) + 1))


def _hull(a: Span | None, b: Span) -> Span:
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]))


def lags(chain: Chain) -> tuple[int, ...]:
    """Return for every tensor how far its end lies past that of a stream's input, on its own level; never positive."""
    ends = [0]
    for layer in chain:
        ends.append(layer.has(ends[-1]))
    return tuple(ends)


def multiply_adds(layer: Layer, settings: UNetSettings) -> int:
    """Return the multiplications of a layer per voxel that it makes."""
    if isinstance(layer, Conv):
        kernel: int = (2 * layer.reach + 1) ** settings.dims
        return layer.into * layer.out * kernel
    if isinstance(layer, Up):
        return layer.into * layer.out >> (settings.dims if settings.up is Upsampling.RESIZE else 0)
    return 0
