"""The engine of a GPU: few passes over its memory."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from pipeline.unet.engine import Engine
from pipeline.unet.layers import Axes, Conv, Stride, Up
from pipeline.unet.settings import Upsampling


class CudaEngine(Engine):
    """The layers on a GPU by cuDNN and cuBLAS, asked for so that they write each layer once.

    Layers of few channels wait for memory there, and torch adds bias and ReLU by passes of their own over what a
    convolution has written: cuDNN does both where the sums still are (streams in bfloat16 of width 16 to 64 are 1.16 to
    1.36 times as fast, measured on an H200). What an up-convolution makes of a voxel is one product of matrices, and a
    copy to where its voxels belong: cuDNN's own kernels for it take 1.1 to 11 times as long, the most in float32.
    """

    def conv(self, at: int, x: Tensor, *, padding: Axes = ()) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU."""
        if not self._layer(at, Conv).relu:
            return super().conv(at, x, padding=padding)
        return self._with_relu(at, x, padding=padding or (0,) * self.dims, steps=(1,) * self.dims)

    def strided(self, at: int, x: Tensor) -> Tensor:
        """Return the coarser resolution, of a convolution without overlap and its ReLU."""
        layer = self._layer(at, Stride)
        if not layer.relu:
            return super().strided(at, x)
        return self._with_relu(at, x, padding=(0,) * self.dims, steps=self.ordered(layer.factor))

    def up(self, at: int, x: Tensor) -> Tensor:
        """Return the finer resolution."""
        if self.settings.up is Upsampling.RESIZE:
            return super().up(at, x)
        weight, bias = self._parameters[at]
        factor = self.ordered(self._layer(at, Up).factor)
        rows = x.movedim(1, -1)
        y = rows.reshape(-1, rows.shape[-1])
        y = y @ weight if bias is None else torch.addmm(bias, y, weight)
        return _side_by_side(y.view(*rows.shape[:-1], *factor, -1), self.dims)

    def _with_relu(self, at: int, x: Tensor, *, padding: Axes, steps: Axes) -> Tensor:
        weight, bias = self._parameters[at]
        made: Tensor = torch.cudnn_convolution_relu(x, weight, bias, steps, padding, (1,) * self.dims, 1)
        return made

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(self.chain[at], Up) or self.settings.up is Upsampling.RESIZE:
            return super()._prepared(at, weight, bias)
        matrix = weight.movedim(1, -1).flatten(1).to(self.device, self.dtype).contiguous()
        n_fine = prod(weight.shape[2:])
        return matrix, None if bias is None else bias.repeat(n_fine).to(self.device, self.dtype)


def can_fuse() -> bool:
    """Return whether this torch has cuDNN, and not another maker's library by the same name."""
    available: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.version.cuda is not None


def _side_by_side(y: Tensor, dims: int) -> Tensor:
    """Return (batch, *coarse, *factor, channels) as (batch, channels, *fine), channels last in memory."""
    n_batch, *coarse = y.shape[: 1 + dims]
    factor = y.shape[1 + dims : -1]
    pairs = [at for axis in range(dims) for at in (1 + axis, 1 + dims + axis)]
    fine = (n * f for n, f in zip(coarse, factor, strict=True))
    return y.permute(0, *pairs, -1).reshape(n_batch, *fine, y.shape[-1]).movedim(-1, 1)
