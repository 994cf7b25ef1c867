"""Engines: what computes a network's layers. All take the same weights; they differ in kernels and in precision.

Normalisation by frozen statistics is folded into the convolution before it, in float64, and ReLU runs with it. The
streamed axis comes first, so that a stream's rows lie one after another in memory; kernels are turned likewise.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import Precision
from pipeline.unet.layers import Chain, Conv, Join, Pool, Up, chain_of
from pipeline.unet.network import UNet, centre, channels_last
from pipeline.unet.settings import Padding, Upsampling

# float32 lanes of an AVX-512 vector; oneDNN rounds the channels of a convolution's output up to them
_LANES = 16
_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class Engine:
    """A network's layers, each computed by torch's own kernels, on any device and in any floating type.

    Parameters
    ----------
    network : in eval mode
    device : "cpu" or "cuda"
    dtype : of weights and activations
    first : the spatial axis that comes first in this engine's tensors, (batch, channels, first, others in order)
    """

    def __init__(self, network: UNet, *, device: str, dtype: torch.dtype = torch.float32, first: int = 0) -> None:
        self.settings, self.dtype, self.device = network.settings, dtype, torch.device(device)
        self.dims = network.settings.dims
        self.memory_format = channels_last(self.dims)
        self.order = (first, *(axis for axis in range(self.dims) if axis != first))
        self.chain: Chain = chain_of(network.settings)
        self._parameters = [self._parameters_of(network, at) for at in range(len(self.chain))]

    def conv(self, at: int, x: Tensor, *, padding: int = 0) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU."""
        weight, bias = self._parameters[at]
        convolve = functional.conv2d if self.dims == 2 else functional.conv3d
        y = convolve(x, weight, bias, padding=padding)
        return y.relu_() if self._layer(at).relu else y

    def up(self, at: int, x: Tensor) -> Tensor:
        """Return twice the resolution."""
        weight, bias = self._parameters[at]
        if self.settings.up is Upsampling.RESIZE:
            convolve = functional.conv2d if self.dims == 2 else functional.conv3d
            return functional.interpolate(convolve(x, weight, bias), scale_factor=2, mode="nearest")
        transposed = functional.conv_transpose2d if self.dims == 2 else functional.conv_transpose3d
        return transposed(x, weight, bias, stride=2)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of a tile that the network takes, (batch, n_classes, *spatial), by one pass."""
        padded = self.settings.padding is Padding.SAME
        skips = {layer.skip: at for at, layer in enumerate(self.chain) if isinstance(layer, Join)}
        waiting: dict[int, Tensor] = {}
        x = x.to(self.dtype)
        for at, layer in enumerate(self.chain):
            match layer:
                case Conv():
                    x = self.conv(at, x, padding=layer.reach if padded else 0)
                case Pool():
                    x = (functional.max_pool2d if self.dims == 2 else functional.max_pool3d)(x, 2)
                case Up():
                    x = self.up(at, x)
                case Join():
                    x = torch.cat((centre(waiting.pop(at), tuple(x.shape[2:])), x), dim=1)
            if (join := skips.get(at + 1)) is not None:
                waiting[join] = x
        return x

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return a tensor of (batch, channels, *spatial) with undefined voxels."""
        return torch.empty(
            tuple(shape), dtype=self.dtype, device=self.device, memory_format=self.memory_format
        )

    def _layer(self, at: int) -> Conv:
        layer = self.chain[at]
        if not isinstance(layer, Conv):
            raise TypeError(f"layer {at} is no convolution: {layer}")
        return layer

    def _parameters_of(self, network: UNet, at: int) -> tuple[Tensor, Tensor | None]:
        layer = self.chain[at]
        if not isinstance(layer, Conv | Up):
            return torch.empty(0), None
        module = network.get_submodule(layer.name)
        convolution = module[0] if isinstance(module, nn.Sequential) else module
        weight, bias = _folded(convolution, _norm_after(network, layer))
        return self._prepared(at, weight.permute(0, 1, *(2 + axis for axis in self.order)), bias)

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a layer, float64, as its kernel wants them."""
        del at
        weight = weight.to(self.device, self.dtype).contiguous(memory_format=self.memory_format)
        return weight, None if bias is None else bias.to(self.device, self.dtype)


class OneDnnEngine(Engine):
    """The layers on a CPU by oneDNN, its weights laid out once and ReLU fused: what torch's own compiler calls.

    oneDNN fills its vectors with output channels. Where these are fewer than the vector's lanes, neighbouring voxels
    along the last axis become channels: a kernel shifted once for each, wider by as many voxels, and a step as wide.
    With channels last the result lies in memory as the plain one does (1.3 to 1.6 times faster, measured for 4 and 8
    channels in 3-D).
    """

    def __init__(self, network: UNet, *, device: str, dtype: torch.dtype = torch.float32, first: int = 0) -> None:
        self._packed: dict[int, tuple[int, Tensor, Tensor]] = {}
        super().__init__(network, device=device, dtype=dtype, first=first)

    def conv(self, at: int, x: Tensor, *, padding: int = 0) -> Tensor:
        """Return the output of the convolution at this place of the chain, and of its ReLU."""
        layer = self._layer(at)
        n_packed, weight, bias = self._packed.get(at, (1, *self._parameters[at]))
        if n_packed > 1 and (padding or (x.shape[-1] - 2 * layer.reach) % n_packed):
            n_packed, (weight, bias) = 1, self._parameters[at]
        n, relu = self.dims, "relu" if layer.relu else "none"
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [padding] * n, [1] * (n - 1) + [n_packed], [1] * n, 1, relu, [], ""
        )
        if n_packed == 1:
            return y
        y = y.movedim(1, -1)
        return y.reshape(*y.shape[:-2], y.shape[-2] * n_packed, layer.out).movedim(-1, 1)

    def _prepared(self, at: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super()._prepared(at, weight, bias)
        layer = self.chain[at]
        if not isinstance(layer, Conv):
            return weight, bias
        n_packed = _LANES // layer.out if _LANES % layer.out == 0 else 1
        if n_packed > 1 and layer.reach and bias is not None:
            kernel = 2 * layer.reach + 1
            wide = weight.new_zeros((n_packed, *weight.shape[:-1], kernel + n_packed - 1))
            for shift in range(n_packed):
                wide[shift, ..., shift : shift + kernel] = weight
            self._packed[at] = (n_packed, self._laid_out(wide.flatten(0, 1), n_packed), bias.repeat(n_packed))
        return self._laid_out(weight, 1), bias

    def _laid_out(self, weight: Tensor, step: int) -> Tensor:
        n, weight = self.dims, weight.contiguous(memory_format=self.memory_format)
        steps = [1] * (n - 1) + [step]
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, [0] * n, steps, [1] * n, 1, [])
        return packed


def make_engine(network: UNet, *, device: str, precision: Precision = Precision.FLOAT32, first: int = 0) -> Engine:
    """Return the fastest engine for a network on a device."""
    kind = OneDnnEngine if device == "cpu" and _has_onednn() else Engine
    return kind(network, device=device, dtype=_DTYPES.get(precision, torch.float32), first=first)


@cache
def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _norm_after(network: UNet, layer: Conv | Up) -> nn.Module | None:
    """Return the BatchNorm that follows a convolution, if one does."""
    if not network.settings.batch_norm or not isinstance(layer, Conv) or not layer.relu:
        return None
    parent, _, at = layer.name.rpartition(".")
    return network.get_submodule(f"{parent}.{int(at) + 1}")


def _folded(convolution: Any, norm: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 modules of either dimension
    """Return weight and bias, float64, of a convolution and the frozen normalisation after it as one convolution."""
    weight = convolution.weight.detach().double()
    bias = None if convolution.bias is None else convolution.bias.detach().double()
    if norm is None:
        return weight, bias
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return weight, shift if bias is None else bias * scale + shift


@cache
def keep_freed_memory() -> bool:
    """Keep the memory of freed activations in this process, so that the kernel need not hand it out page by page.

    Page faults cost up to 1.7 times on large activations (measured, glibc). Returns whether the allocator can do it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    return bool(set_option(mmap_max, 0) & set_option(trim_threshold, 2**31 - 1) & set_option(top_pad, 64 << 20))
