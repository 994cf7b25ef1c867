"""Networks, each written once as a program of layers; torch modules, streams, arithmetic and memory follow from it.

    unet       input ─ block ──────────── [gate] ─ join ─ block ─ head
                         └ down ─ block ─ [gate] ─ join ─ block ┘ up
                                    └ down ─ block ─ dropout ┘ up
    unet++     the same, with joins between neighbouring levels at every stage
    fcn        input ─ block ─ down ... block ─ down ... convolutions ─ score ─ up ─ add ─ up ─ add ─ up

A nested network joins each of its tensors with all that its level has made before. An fcn interpolates the scores of
its coarsest level, and adds those of the last pooling but one, then those of the pooling before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from pipeline.unet.foreign.network import ForeignSettings
from pipeline.unet.layers import Activate, Axes, Chain, Conv, Gate, Interpolate, Join, Layer, Pool, Stride, Sum, Up
from pipeline.unet.reach import FCN_BOTTOM
from pipeline.unet.settings import Block, Down, Family, Padding, UNetSettings, Upsampling, closed_form_rule


@dataclass(frozen=True, slots=True)
class Program:
    """A network.

    Attributes
    ----------
    layers : in the order of the forward pass; the last one makes the logits
    dropped : tensors of which training drops a part
    heads : tensors that are logits, which training compares with the truth, each for itself
    """

    layers: Chain
    dropped: tuple[int, ...]
    heads: tuple[int, ...]


def chain_of(settings: UNetSettings) -> Chain:
    """Return the layers in the order of the forward pass; tensor 0 is the input, tensor i + 1 what layer i makes."""
    return program_of(settings).layers


def why_not_streamed(settings: UNetSettings | ForeignSettings) -> str:
    """Return what keeps a network from being streamed, row after row; empty where nothing does."""
    return "a network from elsewhere" if isinstance(settings, ForeignSettings) else ""


def name_of(settings: UNetSettings | ForeignSettings) -> str:
    """Return what networks like this one are called, such as "3-D residual U-Net with attention gates"."""
    if isinstance(settings, ForeignSettings):
        return f"{settings.dims}-D {settings.source}"
    kinds = {Family.UNET: "U-Net", Family.NESTED: "U-Net++", Family.FCN: f"FCN-{settings.stride >> 2}s"}
    blocks = {Block.PLAIN: "", Block.RESIDUAL: "residual ", Block.PREACTIVATED: "preactivated residual "}
    parts = {
        "attention gates": settings.attention, "deep supervision": settings.deep_supervision,
        "strided convolutions": settings.down is Down.STRIDED, "anisotropic poolings": bool(settings.poolings),
        "neighbouring slices": settings.neighbours > 0,
    }
    having = " and ".join(name for name, has in parts.items() if has)
    name = f"{settings.dims}-D {blocks[settings.block]}{kinds[settings.family]}" + (f" with {having}" if having else "")
    is_v_net = settings.family is Family.UNET and settings.block is Block.RESIDUAL and settings.down is Down.STRIDED
    return f"{name} (V-Net)" if is_v_net else name


@lru_cache(maxsize=256)
def program_of(settings: UNetSettings) -> Program:
    """Return the network of these settings."""
    sketch = _Sketch(settings)
    match settings.family:
        case Family.UNET:
            heads = _u_shaped(sketch)
        case Family.NESTED:
            heads = _nested(sketch)
        case Family.FCN:
            heads = _fully_convolutional(sketch)
    return Program(tuple(sketch.layers), tuple(sketch.dropped), heads)


class _Sketch:
    """A program under way; every method adds layers and returns the tensor that they make."""

    def __init__(self, settings: UNetSettings) -> None:
        self.settings = settings
        self.layers: list[Layer] = []
        self.dropped: list[int] = []
        axes = range(settings.dims)
        self.factors = [tuple(settings.factors(axis)[level] for axis in axes) for level in range(settings.depth)]
        self.reaches = [tuple(settings.reaches(axis)[level] for axis in axes) for level in range(settings.depth + 1)]
        self.phases = _phases(settings)
        self.point = (0,) * settings.dims

    def channels(self, tensor: int) -> int:
        """Return the channels of a tensor."""
        return self.layers[tensor - 1].out if tensor else self.settings.in_channels

    def scale(self, tensor: int) -> Axes:
        """Return the voxels of the scan per voxel of a tensor."""
        return self.layers[tensor - 1].scale if tensor else (1,) * self.settings.dims

    def add(self, layer: Layer) -> int:
        """Add a layer."""
        self.layers.append(layer)
        return len(self.layers)

    def drop(self, x: int) -> int:
        """Let training drop a part of a tensor."""
        self.dropped.append(x)
        return x

    def conv(self, name: str, x: int, out: int, *, reach: Axes, relu: bool = True, norm: str = "") -> int:
        """Add a convolution; ``norm`` is the name that a normalisation after it has, if the network normalises."""
        norm = norm if self.settings.batch_norm else ""
        return self.add(
            Conv(source=x, scale=self.scale(x), out=out, name=name, into=self.channels(x), reach=reach, relu=relu,
                 norm=norm)
        )

    def block(self, name: str, x: int, widths: tuple[int, ...], level: int) -> int:
        """Add the convolutions of one level and path, as many as widths."""
        reach, entered = self.reaches[level], x
        if self.settings.block is Block.PREACTIVATED:
            for i, out in enumerate(widths):
                x = self.activate(f"{name}.{2 * i}", x) if x else x
                x = self.conv(f"{name}.{2 * i + 1}", x, out, reach=reach, relu=False)
        else:
            step = 3 if self.settings.batch_norm else 2  # convolution, (BatchNorm,) ReLU
            for i, out in enumerate(widths):
                relu = self.settings.block is Block.PLAIN or i < len(widths) - 1
                x = self.conv(f"{name}.{step * i}", x, out, reach=reach, relu=relu, norm=f"{name}.{step * i + 1}")
        return x if self.settings.block is Block.PLAIN else self.residual(name, x, entered)

    def residual(self, name: str, x: int, entered: int) -> int:
        """Add what entered a block to what it has made, by a convolution of one voxel where the channels differ."""
        if self.channels(entered) != self.channels(x):
            entered = self.conv(
                f"{name}.shortcut.0", entered, self.channels(x), reach=self.point, relu=False,
                norm=f"{name}.shortcut.1",
            )  # fmt: skip
        return self.sum(x, entered, relu=self.settings.block is Block.RESIDUAL)

    def activate(self, norm: str, x: int) -> int:
        """Add a normalisation, if the network normalises, and a ReLU."""
        norm = norm if self.settings.batch_norm else ""
        return self.add(Activate(source=x, scale=self.scale(x), out=self.channels(x), norm=norm))

    def sum(self, x: int, *others: int, relu: bool = False, mean: bool = False) -> int:
        """Add tensors up; x is the smallest."""
        out, scale = self.channels(x), self.scale(x)
        return self.add(Sum(source=x, skips=others, scale=scale, out=out, relu=relu, mean=mean))

    def join(self, skips: tuple[int, ...], x: int) -> int:
        """Put the channels of the skips in front of those of x."""
        out = sum(self.channels(each) for each in (*skips, x))
        return self.add(Join(source=x, skips=skips, scale=self.scale(x), out=out))

    def down(self, level: int, x: int) -> int:
        """Give up resolution between a level and the next coarser one."""
        settings, factor, phase = self.settings, self.factors[level], self.phases[level]
        scale = tuple(s * f for s, f in zip(self.scale(x), factor, strict=True))
        if settings.down is Down.POOLING:
            return self.add(Pool(source=x, scale=scale, out=self.channels(x), factor=factor, phase=phase))
        out = self.channels(x) if settings.double_before_pooling else settings.width << level + 1
        norm = f"down.{level}.1" if settings.batch_norm else ""
        return self.add(
            Stride(source=x, scale=scale, out=out, factor=factor, phase=phase, name=f"down.{level}.0",
                   into=self.channels(x), relu=True, norm=norm)
        )

    def up(self, name: str, x: int, out: int, level: int) -> int:
        """Regain the resolution of a level from the next coarser one."""
        factor, phase = self.factors[level], self.phases[level]
        return self.add(
            Up(source=x, scale=self._finer(x, factor), out=out, name=name, into=self.channels(x), factor=factor,
               phase=phase)
        )

    def interpolate(self, name: str, x: int, factor: Axes) -> int:
        """Regain resolution between voxels, by weights that are learnt unless the network resizes."""
        name = name if self.settings.up is Upsampling.TRANSPOSED else ""
        scale = self._finer(x, factor)
        return self.add(Interpolate(source=x, scale=scale, out=self.channels(x), name=name, factor=factor))

    def _finer(self, x: int, factor: Axes) -> Axes:
        return tuple(s // f for s, f in zip(self.scale(x), factor, strict=True))

    def gate(self, name: str, skip: int, signal: int) -> int:
        """Weigh each voxel of a skip by what it and the signal, of the same resolution, say of it."""
        inner = max(1, self.channels(skip) // 2)
        parts = {"signal": signal, "skip": skip}
        seen = [
            self.conv(f"{name}.{part}.0", x, inner, reach=self.point, relu=False, norm=f"{name}.{part}.1")
            for part, x in parts.items()
        ]
        weight = self.conv(
            f"{name}.weight.0", self.sum(*seen, relu=True), 1, reach=self.point, relu=False, norm=f"{name}.weight.1"
        )
        return self.add(Gate(source=weight, skips=(skip,), scale=self.scale(signal), out=self.channels(skip)))

    def head(self, x: int, name: str = "head") -> int:
        """Turn channels into logits."""
        return self.conv(name, x, self.settings.n_classes, reach=self.point, relu=False)


def _u_shaped(sketch: _Sketch) -> tuple[int, ...]:
    settings, x, skips = sketch.settings, 0, list[int]()
    for level in range(settings.depth):
        skips.append(sketch.block(f"contract.{level}", x, widths_of(settings, level), level))
        x = sketch.down(level, skips[-1])
    x = sketch.drop(sketch.block("bottom", x, widths_of(settings, settings.depth), settings.depth))
    for at, level in enumerate(reversed(range(settings.depth))):
        skip = skips.pop()
        width = sketch.channels(skip)
        x = sketch.up(f"up.{at}", x, sketch.channels(x) if settings.double_before_pooling else width, level)
        skip = sketch.gate(f"gate.{at}", skip, x) if settings.attention else skip
        x = sketch.block(f"expand.{at}", sketch.join((skip,), x), (width,) * settings.n_convs, level)
    return (sketch.head(x),)


def _nested(sketch: _Sketch) -> tuple[int, ...]:
    settings, x, made = sketch.settings, 0, list[list[int]]()
    for level in range(settings.depth + 1):
        deepest = level == settings.depth
        x = sketch.block("bottom" if deepest else f"contract.{level}", x, widths_of(settings, level), level)
        made.append([sketch.drop(x) if deepest else x])
        x = x if deepest else sketch.down(level, x)
        for stage, finer in enumerate(reversed(range(level)), start=1):
            widths = widths_of(settings, finer)
            up = sketch.up(f"up.{finer}.{stage}", made[finer + 1][-1], widths[-1], finer)
            joined = sketch.join(tuple(made[finer]), up)
            made[finer].append(sketch.block(f"expand.{finer}.{stage}", joined, widths, finer))
    *others, last = made[0][1:]
    if not settings.deep_supervision or not others:
        return (sketch.head(last),)
    heads = [sketch.head(each, f"side.{at}") for at, each in enumerate(others)]
    heads.append(sketch.head(last))
    sketch.sum(*heads, mean=True)
    return tuple(heads)


def _fully_convolutional(sketch: _Sketch) -> tuple[int, ...]:
    settings, x, pooled = sketch.settings, 0, list[int]()
    for level in range(settings.depth):
        x = sketch.down(level, sketch.block(f"contract.{level}", x, widths_of(settings, level), level))
        pooled.append(x)
    width = settings.width << settings.depth
    for at, reach in enumerate((FCN_BOTTOM, 0)):
        x = sketch.drop(
            sketch.conv(f"bottom.{3 * at}", x, width, reach=(reach,) * settings.dims, norm=f"bottom.{3 * at + 1}")
        )
    x = sketch.head(x)
    for at, level in enumerate((settings.depth - 1, settings.depth - 2)):
        x = sketch.interpolate(f"up.{at}", x, sketch.factors[level])
        x = sketch.sum(x, sketch.head(pooled[level - 1], f"score.{at}"))
    rest = tuple(prod(each) for each in zip(*sketch.factors[: settings.depth - 2], strict=True))
    return (sketch.interpolate("up.2", x, rest),)


def widths_of(settings: UNetSettings, level: int) -> tuple[int, ...]:
    """Return the channels after each convolution of a level of the contracting path."""
    width = settings.width << level
    return (width,) * (settings.n_convs - 1) + (2 * width if settings.double_before_pooling else width,)


def _phases(settings: UNetSettings) -> tuple[Axes, ...]:
    """Return on which voxels the windows of each pooling begin along each axis, in a tile as the rule says."""
    axes = []
    for axis, halo in enumerate(closed_form_rule(settings).halo):
        line, start, phases = settings.line(axis), -halo, list[int]()
        for factor, radius in zip(line.factors, line.radii, strict=False):
            start += radius if settings.padding is Padding.VALID else 0
            phases.append(start % factor)
            start = (start - phases[-1]) // factor
        axes.append(phases)
    return tuple(zip(*axes, strict=True))
