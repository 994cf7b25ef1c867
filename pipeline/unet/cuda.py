"""The engine of a GPU: few passes over its memory."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.unet.engine import Engine
from pipeline.unet.layers import Axes, Conv, Stride, Up
from pipeline.unet.settings import Upsampling


class CudaEngine(Engine):
    """The layers on a GPU by cuDNN and cuBLAS, asked for so that they write each layer once.

    Layers of few channels wait for memory there, and torch adds bias and ReLU by passes of their own over what a
    convolution has written: cuDNN does both where the sums still are (streams in bfloat16 of width 16 to 64 are 1.16 to
    1.36 times as fast, measured on an H200). What an up-convolution makes of a voxel is one product of matrices, and a
    copy to where its voxels belong: cuDNN's own kernels for it take 1.1 to 11 times as long, the most in float32. The
    head is such a product, too, with zeros up to 8 classes: in bfloat16 cuDNN's kernels take 2 to 7 times as long.
    """

    def conv(self, at: int, x: Tensor, *, padding: Axes = ()) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU."""
        layer = self._layer(at, Conv)
        if _is_product(layer):
            return self._product(at, x).movedim(-1, 1).narrow(1, 0, layer.out)
        if not layer.relu:
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
        factor = self.ordered(self._layer(at, Up).factor)
        made = self._product(at, x)
        return _side_by_side(made.view(*made.shape[:-1], *factor, -1), self.dims)

    def _with_relu(self, at: int, x: Tensor, *, padding: Axes, steps: Axes) -> Tensor:
        weight, bias = self._parameters[at]
        made: Tensor = torch.cudnn_convolution_relu(x, weight, bias, steps, padding, (1,) * self.dims, 1)
        return made.narrow(1, 0, self.chain[at].out)

    def _product(self, at: int, x: Tensor) -> Tensor:
        """Return what a layer makes of each voxel alone, (batch, *spatial, numbers)."""
        weight, bias = self._parameters[at]
        x = x.movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], -1)

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layer = self.chain[at]
        if isinstance(layer, Up) and self.settings.up is not Upsampling.RESIZE:
            matrix, n_fine = weight.movedim(1, -1).flatten(1), prod(weight.shape[2:])
            return self._moved(matrix), None if bias is None else self._moved(bias.repeat(n_fine))
        if isinstance(layer, Conv) and _is_product(layer):
            n_more = -layer.out % 8
            matrix = self._moved(pad(weight.flatten(1).t(), (0, n_more)))
            return matrix, None if bias is None else self._moved(pad(bias, (0, n_more)))
        if isinstance(layer, Conv) and self._is_misjudged(layer) and bias is not None:
            weight, bias = torch.cat((weight, torch.zeros_like(weight))), torch.cat((bias, torch.zeros_like(bias)))
        return super()._prepared(at, weight, bias)

    def _moved(self, values: Tensor) -> Tensor:
        return values.contiguous().to(self.device, self.dtype)

    def _is_misjudged(self, layer: Conv) -> bool:
        """Whether cuDNN takes a kernel without matrix instructions, unless it is asked for twice as many channels.

        That made 32 channels of 32 or more 9 to 11 times as fast in half precision (measured, cuDNN 9 as torch 2.11 has
        it). Autotuning finds better kernels, too, but need not find the same ones each time, with the same bits.
        """
        return self.dims == 2 and self.dtype.itemsize == 2 and layer.out == 32 <= layer.into and layer.relu


def _is_product(layer: Conv) -> bool:
    return not layer.relu and not any(layer.reach)


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
