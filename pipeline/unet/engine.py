"""Engines: what computes a network's layers. All take the same weights; they differ in kernels and in precision.

Normalisation by frozen statistics is folded into the convolution before it, in float64, and ReLU runs with it. The
streamed axis comes first, so that a stream's rows lie one after another in memory; kernels are turned likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.unet.families import chain_of
from pipeline.unet.layers import Activate, Axes, Chain, Conv, Interpolate, Layer, Pool, Stride, Up
from pipeline.unet.network import UNet, channels_last, pooled
from pipeline.unet.passes import combined, interpolated, run
from pipeline.unet.settings import Padding, Upsampling

L = TypeVar("L", bound=Layer)


class Engine:
    """A network's layers, each computed by torch's own kernels, on any device and in any floating type.

    Parameters
    ----------
    network : in eval mode
    device : "cpu" or "cuda"
    dtype : of weights and activations
    first : the spatial axis that comes first in this engine's tensors, (batch, channels, first, others in order)
    tf32 : a GPU is to round what it multiplies to TF32; see ``exactly``, in which an engine is called
    """

    def __init__(
        self, network: UNet, *, device: str, dtype: torch.dtype = torch.float32, first: int = 0, tf32: bool = False
    ) -> None:
        self.settings, self.dtype, self.device, self.tf32 = network.settings, dtype, torch.device(device), tf32
        self.dims = network.settings.dims
        self.memory_format = channels_last(self.dims)
        self.order = (first, *(axis for axis in range(self.dims) if axis != first))
        self.chain: Chain = chain_of(network.settings)
        self._parameters = [self._parameters_of(network, at) for at in range(len(self.chain))]

    def conv(self, at: int, x: Tensor, *, padding: Axes = ()) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU.

        Parameters
        ----------
        padding : zeros on each side, along the engine's axes; none where it is empty
        """
        weight, bias = self._parameters[at]
        convolve = functional.conv2d if self.dims == 2 else functional.conv3d
        y = convolve(x, weight, bias, padding=padding or 0)
        return y.relu_() if self._layer(at, Conv).relu else y

    def up(self, at: int, x: Tensor) -> Tensor:
        """Return the finer resolution."""
        weight, bias = self._parameters[at]
        factor = self.ordered(self._layer(at, Up).factor)
        if self.settings.up is Upsampling.RESIZE:
            convolve = functional.conv2d if self.dims == 2 else functional.conv3d
            scale = tuple(map(float, factor))
            return functional.interpolate(convolve(x, weight, bias), scale_factor=scale, mode="nearest")
        transposed = functional.conv_transpose2d if self.dims == 2 else functional.conv_transpose3d
        return transposed(x, weight, bias, stride=factor)

    def strided(self, at: int, x: Tensor) -> Tensor:
        """Return the coarser resolution, of a convolution without overlap and its ReLU."""
        layer = self._layer(at, Stride)
        weight, bias = self._parameters[at]
        convolve = functional.conv2d if self.dims == 2 else functional.conv3d
        y = convolve(x, weight, bias, stride=self.ordered(layer.factor))
        return y.relu_() if layer.relu else y

    def interpolated(self, at: int, x: Tensor) -> Tensor:
        """Return the finer resolution, each voxel between the two nearest ones, zeros or the last one past the end."""
        layer = self._layer(at, Interpolate)
        factor = self.ordered(layer.factor)
        if not layer.name:
            return interpolated(x, factor)
        weight, bias = self._parameters[at]
        transposed = functional.conv_transpose2d if self.dims == 2 else functional.conv_transpose3d
        return transposed(x, weight, bias, stride=factor, padding=tuple(f // 2 for f in factor))

    def interpolated_inside(self, at: int, x: Tensor) -> Tensor:
        """Return those voxels of the finer resolution that lie between two of x along every axis."""
        y = self.interpolated(at, x)
        for axis, f in enumerate(self.ordered(self._layer(at, Interpolate).factor), start=2):
            y = y.narrow(axis, f // 2, y.shape[axis] - 2 * (f // 2))
        return y

    def activated(self, at: int, x: Tensor) -> Tensor:
        """Return the ReLU, after the frozen normalisation if there is one; x stays as it is."""
        weight, bias = self._parameters[at]
        if bias is None:
            return x.relu()
        shape = (1, -1, *(1,) * self.dims)
        return torch.addcmul(bias.reshape(shape), x, weight.reshape(shape)).relu_()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of a tile that the network takes, (batch, n_classes, *spatial), by one pass."""
        return run(self.chain, x.to(self.dtype), self._compute)[-1]

    def _compute(self, at: int, layer: Layer, inputs: list[Tensor]) -> Tensor:
        """Return what a layer makes."""
        if layer.skips:
            return combined(layer, inputs)
        source = inputs.pop()
        match layer:
            case Conv():
                same = self.settings.padding is Padding.SAME
                return self.conv(at, source, padding=self.ordered(layer.reach) if same else ())
            case Stride():
                return self.strided(at, source)
            case Pool():
                return pooled(source, self.ordered(layer.factor))
            case Up():
                return self.up(at, source)
            case Interpolate():
                return self.interpolated(at, source)
            case Activate():
                return self.activated(at, source)
        raise TypeError(f"layer {at} takes several tensors: {layer}")

    def ordered(self, each: Axes) -> Axes:
        """Return one number per axis of the network as the engine's axes have them."""
        return tuple(each[axis] for axis in self.order)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return a tensor of (batch, channels, *spatial) with undefined voxels."""
        return torch.empty(
            tuple(shape), dtype=self.dtype, device=self.device, memory_format=self.memory_format
        )

    def _layer(self, at: int, kind: type[L]) -> L:
        """Return a layer of the chain, which must be of this kind."""
        layer = self.chain[at]
        if not isinstance(layer, kind):
            raise TypeError(f"layer {at} is no {kind.__name__}: {layer}")
        return layer

    def _parameters_of(self, network: UNet, at: int) -> tuple[Tensor, Tensor | None]:
        layer = self.chain[at]
        norm = network.get_submodule(layer.norm) if isinstance(layer, Conv | Stride | Activate) and layer.norm else None
        if isinstance(layer, Activate) and norm is not None:
            scale, shift = _scaling(norm)
            return scale.to(self.device, self.dtype), shift.to(self.device, self.dtype)
        if not isinstance(layer, Conv | Stride | Up | Interpolate) or not layer.name:
            return torch.empty(0), None
        module = network.get_submodule(layer.name)
        convolution = module[0] if isinstance(module, nn.Sequential) else module
        weight, bias = _folded(convolution, norm)
        return self._prepared(at, weight.permute(0, 1, *(2 + axis for axis in self.order)), bias)

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a layer, float64, as its kernel wants them."""
        del at
        weight = weight.to(self.device, self.dtype).contiguous(memory_format=self.memory_format)
        return weight, None if bias is None else bias.to(self.device, self.dtype)


def _folded(convolution: Any, norm: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 modules of either dimension
    """Return weight and bias, float64, of a convolution and the frozen normalisation after it as one convolution."""
    weight = convolution.weight.detach().to(torch.float64, copy=True)
    bias = None if convolution.bias is None else convolution.bias.detach().double()
    if norm is None:
        return weight, bias
    scale, shift = _scaling(norm)
    weight *= scale.reshape(-1, *(1,) * (weight.ndim - 1))  # in place: a wide layer has most of a network's weights
    return weight, shift if bias is None else bias * scale + shift


def _scaling(norm: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 modules of either dimension
    """Return the frozen normalisation as factor and summand of each channel, float64."""
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale
