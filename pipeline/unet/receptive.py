"""The tile rule of any torch network, measured: which outputs turn NaN when one input does, at every phase.

NaN survives every sum, product, ReLU and maximum (NaN * 0 is NaN), so that the outputs that are NaN are exactly those
that an input can reach, whatever the weights are. The reach is taken in the interior, where no border cuts it off:

    input    . . . . . . X . . . . . .      X: NaN, at every phase of the stride
    output   . . . N N N N N N . . . .      influence of X, first to last

From the influences follow stride and halo; tiles of that rule are then compared, number by number, with one pass over
a larger input, so that a network whose values depend on the position in another way is not taken for a regular one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.network import UNet
from pipeline.unet.settings import UNetSettings

LARGEST_SMALL = 512
LARGEST_LENGTH = 4096
LARGEST_STRIDE = 64
RELATIVE_TOLERANCE = 1e-4


def measured_rule(settings: UNetSettings) -> TileRule:
    """Return the measured tile rule of a network, found in a few seconds on small twins with the same reach.

    A twin has one channel, since channels have no extent, and two axes, of which the second is pooled as one of the
    network's is, since the settings hold one kernel and padding for all axes.
    """
    lines = [settings.factors(axis) for axis in range(settings.dims)]
    found = {line: _measured_line(settings, line) for line in set(lines)}
    stride, halo, trim = zip(*(found[line] for line in lines), strict=True)
    return TileRule(stride, halo, trim)


def _measured_line(settings: UNetSettings, factors: tuple[int, ...]) -> tuple[int, int, int]:
    """Return stride, halo and trim along an axis that is pooled by these factors."""
    plane = tuple((2, factor) for factor in factors)
    twin = UNet(replace(settings, dims=2, width=1, in_channels=1, neighbours=0, poolings=plane))
    with exact_sums(twin):
        probe = _Probe(twin, 2, 1)
        return _measure_axis(probe, probe.smallest_shape(), 1)


def measure_tile_rule(network: nn.Module, *, dims: int, in_channels: int) -> TileRule:
    """Return the stride, halo and trim of a network of shape-(batch, channel, *spatial) arrays, axis by axis.

    The network is measured in eval mode on its own device, and left in the mode that it was in.

    Raises
    ------
    ModelError : no input size is accepted, the output is not the input less a constant border, or the reach is not
        finite.
    """
    probe = _Probe(network, dims, in_channels)
    with exact_sums(network):
        base = probe.smallest_shape()
        axes = [_measure_axis(probe, base, axis) for axis in range(dims)]
    stride, halo, trim = (tuple(values) for values in zip(*axes, strict=True))
    return TileRule(stride, halo, trim)


@contextmanager
def exact_sums(network: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and by direct sums: Winograd and FFT kernels spread NaN over whole tiles."""
    was = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=False),
            _without_mkldnn(),
            torch.backends.nnpack.flags(enabled=False),
        ):
            yield
    finally:
        for module, training in was.items():
            module.training = training


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Run without oneDNN; its own context manager also sets TF32, which warns where there is none (torch 2.13)."""
    was = torch.backends.mkldnn.set_flags(_enabled=False)[0]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=was)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Probe:
    """A network, and what one asks it."""

    network: nn.Module
    dims: int
    in_channels: int

    def losses(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return how much smaller the output is than an input of this shape, or None where the network refuses it."""
        state = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        empty = {name: tensor.to("meta") for name, tensor in state.items()}
        x = torch.empty((1, self.in_channels, *shape), device="meta")
        try:
            out = torch.func.functional_call(self.network, empty, (x,))
        except Exception:  # noqa: BLE001 networks refuse a size by whatever error they like
            return None
        if not isinstance(out, Tensor) or out.ndim != self.dims + 2 or 0 in out.shape:
            return None
        return tuple(n - m for n, m in zip(shape, out.shape[2:], strict=True))

    def smallest_shape(self) -> tuple[int, ...]:
        """Return a small shape that the network accepts: cubes are tried first, then sizes of every remainder."""
        cubes = ((n,) * self.dims for n in range(1, LARGEST_SMALL + 1))
        mixed = product(range(LARGEST_SMALL, LARGEST_SMALL + 8), repeat=self.dims)
        for shape in chain(cubes, mixed):
            if self.losses(shape) is not None:
                break
        else:
            raise ModelError(
                f"a network must accept some input of shape (1, {self.in_channels}, *{self.dims} sizes), got none of "
                f"up to {LARGEST_SMALL + 7} voxels; check channels and axes"
            )
        for axis in range(self.dims):
            smaller = (_with(shape, axis, n) for n in range(1, shape[axis] + 1))
            shape = next(s for s in smaller if self.losses(s) is not None)
        return shape

    def run(self, x: Tensor) -> Tensor:
        """Return the network's output, float32 on the CPU."""
        at = next(chain(self.network.parameters(), self.network.buffers()), torch.empty(0)).device
        out: Tensor = self.network(x.to(at))
        return out.float().cpu()

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the same noise for the same shape, (1, in_channels, *shape)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn((1, self.in_channels, *shape), generator=generator)


@dataclass(frozen=True, slots=True)
class _Line:
    """One axis of a network; the others stay at a small size that it accepts."""

    probe: _Probe
    base: tuple[int, ...]
    axis: int
    loss: int

    def shape(self, size: int) -> tuple[int, ...]:
        return _with(self.base, self.axis, size)

    def accepts(self, size: int) -> bool:
        """Whether an input of this size gives an output that is smaller by the constant border."""
        losses = self.probe.losses(self.shape(size)) if size > 0 else None
        return losses is not None and losses[self.axis] == 2 * self.loss

    def accepted(self, size: int) -> int:
        """Return the smallest accepted size of at least ``size``."""
        for n in range(size, size + 4 * LARGEST_STRIDE):
            if self.accepts(n):
                return n
        raise ModelError(
            f"a network must accept sizes without end, got none in {size}..{size + 4 * LARGEST_STRIDE} along axis "
            f"{self.axis}; remove its limit on the input's size"
        )

    def influence(self, size: int, at: int) -> tuple[int, ...] | None:
        """Return the offsets, ascending, that the inputs at one position reach; None where a border cuts them off."""
        x = self.probe.noise(self.shape(size))
        x.select(self.axis + 2, at).fill_(torch.nan)
        out = self.probe.run(x).isnan().movedim(self.axis + 2, 0).flatten(1).any(1)
        reached = out.nonzero().flatten().tolist()
        if reached and (reached[0] == 0 or reached[-1] == len(out) - 1):
            return None
        return tuple(q + self.loss - at for q in reached)


def _measure_axis(probe: _Probe, base: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Return stride, halo and trim along one axis."""
    line = _Line(probe, base, axis, _loss(probe, base, axis))
    size = _interior_size(line)
    middle = size // 2
    influences: list[tuple[int, ...]] = []
    for period in range(1, LARGEST_STRIDE + 1):
        while len(influences) < 2 * period + 2:
            influences.append(_grown(line, size, middle + len(influences)))
        if any(a != b for a, b in zip(influences, influences[period:], strict=False)):
            continue
        for stride in range(period, LARGEST_STRIDE + 1, period):
            phases = [influences[(p - middle) % period] for p in range(stride)]
            halo = _halo(line, phases, stride)
            if halo is not None and _tiles_agree(line, stride, halo):
                return stride, halo, halo - line.loss
        break
    raise ModelError(
        f"outputs must depend on the input alike at every multiple of a stride of at most {LARGEST_STRIDE}, got a "
        f"network of which no tiling equals one pass along axis {axis}; remove what depends on the position"
    )


def _loss(probe: _Probe, base: tuple[int, ...], axis: int) -> int:
    """Return the border that the network drops on each side: the least, as poolings that drop a remainder add to it."""
    sizes = range(base[axis], base[axis] + LARGEST_STRIDE)
    losses = [found[axis] for n in sizes if (found := probe.losses(_with(base, axis, n))) is not None]
    fit = [n for n in losses if n >= 0 and n % 2 == 0]
    if not fit:
        raise ModelError(
            f"an output must be its input less the same border on both sides, got {sorted(set(losses))} voxels less "
            f"along axis {axis}; resample or crop inside the network"
        )
    return min(fit) // 2


def _interior_size(line: _Line) -> int:
    """Return a size at which probes near the middle are not cut off by the border, with room for every phase."""
    size = 32 + 2 * line.loss
    while size <= LARGEST_LENGTH:
        size = line.accepted(size)
        room = min(2 * LARGEST_STRIDE + 2, size // 4)
        if all(line.influence(size, at) is not None for at in (size // 2, size // 2 + room)):
            return size
        size *= 2
    raise _endless(line, size // 2)


def _grown(line: _Line, size: int, at: int) -> tuple[int, ...]:
    """Return the influence of a position, on a larger input of the same phase where the border cuts it off."""
    while (found := line.influence(size, at)) is None:
        size = line.accepted(size + LARGEST_STRIDE)
        if size > 2 * LARGEST_LENGTH:
            raise _endless(line, size)
    return found


def _endless(line: _Line, size: int) -> ModelError:
    return ModelError(
        f"a network must have a finite receptive field to be tiled, got one in which one voxel, set to NaN, "
        f"reaches the border of {size} along axis {line.axis}; replace layers that look at the whole input (GroupNorm, "
        "InstanceNorm, attention, squeeze-excite, global pooling) by ones with frozen statistics, such as BatchNorm"
    )


def _halo(line: _Line, phases: list[tuple[int, ...]], stride: int) -> int | None:
    """Return the smallest halo with which aligned tiles are accepted and their cores see nothing outside; or None.

    ``phases[p]`` are the offsets that an input at a position of remainder ``p`` reaches.
    """
    furthest = max((abs(q) for offsets in phases for q in offsets), default=0)
    start, step = (line.loss, 1) if line.loss else (0, stride)
    for halo in range(start, line.loss + furthest + 3 * stride, step):
        if covers(phases, stride, halo) and all(line.accepts(k * stride + 2 * halo) for k in (1, 2, 3, 4)):
            return halo
    return None


def covers(phases: list[tuple[int, ...]], stride: int, halo: int) -> bool:
    """Whether no input outside a tile reaches its core, for inputs of every remainder."""
    for phase, offsets in enumerate(phases):
        if not offsets:
            continue
        before = -1 - (-1 - phase) % stride
        size = (2 * halo) % stride
        after = size + (phase - size) % stride
        if before + offsets[-1] >= halo or after + offsets[0] < size - halo:
            return False
    return True


def _tiles_agree(line: _Line, stride: int, halo: int) -> bool:
    """Whether tiles of one core give the numbers of one pass over four cores."""
    tile, trim = stride + 2 * halo, halo - line.loss
    x = line.probe.noise(line.shape(4 * stride + 2 * halo))
    whole = line.probe.run(x)
    tolerance = RELATIVE_TOLERANCE * float(whole.abs().max())
    for k in range(4):
        part = line.probe.run(x.narrow(line.axis + 2, k * stride, tile)).narrow(line.axis + 2, trim, stride)
        expected = whole.narrow(line.axis + 2, trim + k * stride, stride)
        if not bool(((part - expected).abs() <= tolerance).all()):
            return False
    return True


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
