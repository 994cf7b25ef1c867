"""The engine of a processor: oneDNN's kernels, called directly, and fed so that they fill their vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.unet.engine import Engine
from pipeline.unet.layers import Axes, Conv, Stride, Up
from pipeline.unet.network import UNet
from pipeline.unet.settings import Upsampling

# float32 lanes of an AVX-512 vector; oneDNN rounds the channels of a convolution's output up to them
_LANES = 16


@dataclass(frozen=True, slots=True)
class _Packed:
    """A convolution that makes ``n`` neighbouring voxels along the last axis as channels, or 1 as it is.

    ``step`` voxels further on come the next ones: as many, or 1 where those that enter are packed likewise.
    """

    n: int
    step: int
    weight: Tensor
    bias: Tensor | None


class OneDnnEngine(Engine):
    """The layers on a CPU by oneDNN, its weights laid out once and ReLU fused: what torch's own compiler calls.

    oneDNN fills its vectors with output channels. Where these are fewer than the vector's lanes, neighbouring voxels
    along the last axis become channels: a kernel shifted once for each, wider by as many voxels, and a step as wide.
    With channels last the result lies in memory as the plain one does (1.3 to 1.6 times faster, measured for 4 and 8
    channels in 3-D). Where a single channel enters, pairs of voxels enter as two: the same product of matrices for
    float32 (1.0 to 1.2 times faster for 16 channels), and one that bfloat16 has instructions for (1.2 to 3.5 times).
    The two voxels that an up-convolution makes of one along the last axis are channels likewise, with the same bits
    (1.0 to 2.1 times faster; torch itself does not ask oneDNN for 3-D ones in float32: 2 to 6 times).
    """

    def __init__(
        self, network: UNet, *, device: str, dtype: torch.dtype = torch.float32, first: int = 0, tf32: bool = False
    ) -> None:
        self._packed: dict[int, _Packed] = {}
        super().__init__(network, device=device, dtype=dtype, first=first, tf32=tf32)

    def conv(self, at: int, x: Tensor, *, padding: Axes = ()) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU."""
        layer, n = self._layer(at, Conv), self.dims
        how = self._packed.get(at)
        if how is None or any(padding) or (x.shape[-1] - 2 * self.ordered(layer.reach)[-1]) % how.n:
            how = _Packed(1, 1, *self._parameters[at])
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            _with_neighbours(x, how.n // how.step), how.weight, how.bias, list(padding or (0,) * n),
            [1] * (n - 1) + [how.step], [1] * n, 1, "relu" if layer.relu else "none", [], "",
        )  # fmt: skip
        return _without_neighbours(y, how.n)

    def strided(self, at: int, x: Tensor) -> Tensor:
        """Return the coarser resolution, of a convolution without overlap and its ReLU."""
        layer, n = self._layer(at, Stride), self.dims
        weight, bias = self._parameters[at]
        steps, relu = list(self.ordered(layer.factor)), "relu" if layer.relu else "none"
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [0] * n, steps, [1] * n, 1, relu, [], ""
        )
        return y

    def up(self, at: int, x: Tensor) -> Tensor:
        """Return the finer resolution."""
        if self.settings.up is Upsampling.RESIZE:
            return super().up(at, x)
        weight, bias = self._parameters[at]
        *steps, last = self.ordered(self._layer(at, Up).factor)
        n, transposed = self.dims, torch.ops.mkldnn._convolution_transpose_pointwise
        y: Tensor = transposed(x, weight, bias, [0] * n, [0] * n, [*steps, 1], [1] * n, 1, "none", [], "")
        return _without_neighbours(y, last)

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super()._prepared(at, weight, bias)
        layer = self.chain[at]
        if isinstance(layer, Up) and self.settings.up is Upsampling.TRANSPOSED:
            n_packed = weight.shape[-1]
            weight = weight.movedim(-1, 1).flatten(1, 2).unsqueeze(-1).contiguous(memory_format=self.memory_format)
            return weight, None if bias is None else bias.repeat(n_packed)
        if isinstance(layer, Stride):
            return self._laid_out(weight, self.ordered(layer.factor)), bias
        if not isinstance(layer, Conv):
            return weight, bias
        if self.ordered(layer.reach)[-1] and bias is not None:
            self._pack(at, weight, bias)
        return self._laid_out(weight, (1,) * self.dims), bias

    def _pack(self, at: int, weight: Tensor, bias: Tensor) -> None:
        """Keep a convolution's weights for neighbouring voxels as channels, where that is faster."""
        n_out, n_in, kernel = *weight.shape[:2], weight.shape[-1]
        in_pairs = n_in == 1 and n_out >= _LANES // 2
        n = 2 if in_pairs else _LANES // n_out if _LANES % n_out == 0 else 1
        if n == 1:
            return
        wide = weight.new_zeros((n, *weight.shape[:-1], kernel + n - 1))
        for shift in range(n):
            wide[shift, ..., shift : shift + kernel] = weight
        wide = wide.flatten(0, 1)
        if in_pairs:  # an odd kernel is as wide as its pairs
            wide = wide.reshape(*wide.shape[:-1], -1, n).movedim(-1, 1).flatten(1, 2)
        step = 1 if in_pairs else n
        steps = (*(1,) * (self.dims - 1), step)
        self._packed[at] = _Packed(n, step, self._laid_out(wide, steps), bias.repeat(n))

    def _laid_out(self, weight: Tensor, steps: Axes) -> Tensor:
        n, weight = self.dims, weight.contiguous(memory_format=self.memory_format)
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, [0] * n, list(steps), [1] * n, 1, [])
        return packed


def _with_neighbours(x: Tensor, n: int) -> Tensor:
    """Return n neighbouring voxels along the last axis as channels, one after another."""
    if n == 1:
        return x
    x = x.movedim(1, -1)
    return x.reshape(*x.shape[:-2], x.shape[-2] // n, n * x.shape[-1]).movedim(-1, 1)


def _without_neighbours(y: Tensor, n: int) -> Tensor:
    """Return n neighbouring voxels that are channels, one after another, as voxels along the last axis."""
    if n == 1:
        return y
    y = y.movedim(1, -1)
    return y.reshape(*y.shape[:-2], y.shape[-2] * n, y.shape[-1] // n).movedim(-1, 1)


@cache
def has_onednn() -> bool:
    """Return whether this torch can call oneDNN's convolutions directly."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
