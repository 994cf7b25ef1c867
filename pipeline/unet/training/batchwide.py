"""Batchwide: layers that see a whole batch though each process of a team has a share of it.

torch's SyncBatchNorm runs on GPUs alone (2.13: "expected input tensor to be on GPU"); this one is the same on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.unet.network import channels_last
from pipeline.unet.training.team import Team, added

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def widen(network: nn.Module, *, n_patches: int, team: Team) -> None:
    """Let batch normalisation and dropout of a network act as they would in one process with all ``n_patches``.

    Names and values of its weights stay as they are, and so does what it computes when it does not learn.
    """
    if team.n == 1:
        return
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in _NORMS:
                setattr(parent, name, _norm_like(layer))
            elif isinstance(layer, _DROPOUTS):
                setattr(parent, name, _Dropout(layer, n_patches=n_patches, share=team.share(n_patches)))


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _BatchNorm3d(nn.BatchNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


_NORMS: dict[type[nn.Module], type[nn.BatchNorm2d | nn.BatchNorm3d]] = {
    nn.BatchNorm2d: _BatchNorm2d, nn.BatchNorm3d: _BatchNorm3d,
}  # fmt: skip


def _norm_like(layer: Any) -> nn.Module:  # noqa: ANN401 a BatchNorm of either dimension
    """Return the layer with the same weights and statistics, taken over the whole batch."""
    weight = layer.weight
    wide = _NORMS[type(layer)](layer.num_features, layer.eps, layer.momentum, device=weight.device, dtype=weight.dtype)
    wide.load_state_dict(layer.state_dict())
    return wide


def _normalised(layer: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    """Return x (batch, channels, *spatial) with the mean 0 and the deviation 1 over all batches; statistics follow."""
    axes, shape = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
    n_here = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float32, device=x.device)
    sums, n = added(torch.cat([x.sum(axes, dtype=torch.float32), n_here])).tensor_split([-1])
    mean = sums / n
    variance = added((x.detach() - mean.reshape(shape)).square().sum(axes, dtype=torch.float32)) / n
    with torch.no_grad():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked += 1
        momentum = layer.momentum if layer.momentum is not None else 1 / int(layer.num_batches_tracked)
        layer.running_mean.lerp_(mean, momentum)
        layer.running_var.lerp_(variance * n / (n - 1), momentum)
    scale = torch.rsqrt(variance + layer.eps)
    y: Tensor = _Normalised.apply(x, layer.weight, layer.bias, mean, scale, n)  # type: ignore[no-untyped-call]
    return y


class _Normalised(torch.autograd.Function):
    """``weight (x - mean) scale + bias`` whose gradient knows that mean and scale are those of x in all processes.

    Ioffe and Szegedy 2015, doi:10.48550/arXiv.1502.03167.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, n: Tensor  # noqa: ANN401
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, scale, n)
        shape = (-1, *(1,) * (x.ndim - 2))
        slope = weight * scale
        y: Tensor = (x - mean.reshape(shape)) * slope.reshape(shape) + bias.reshape(shape)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, mean, scale, n = ctx.saved_tensors
        axes, shape = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
        known = (x - mean.reshape(shape)) * scale.reshape(shape)
        gradient = gradient.to(known.dtype)
        here = torch.stack([gradient.sum(axes), (gradient * known).sum(axes)])
        along, stretch = (added(here) / n).unbind()
        back = gradient - along.reshape(shape) - known * stretch.reshape(shape)
        back = back * (weight * scale).reshape(shape)
        return back.to(x.dtype), here[1], here[0], None, None, None


class _Dropout(nn.Module):
    """Dropout that draws for the whole batch, as one process would, and takes its share of that."""

    def __init__(self, layer: nn.Module, *, n_patches: int, share: slice) -> None:
        super().__init__()
        self.layer, self.n_patches, self.share = layer, n_patches, share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        ones = x.new_ones((self.n_patches, *x.shape[1:])).contiguous(memory_format=channels_last(x.ndim - 2))
        kept: Tensor = self.layer(ones)  # drawn in the order in which the voxels of a whole batch lie in memory
        return x * kept[self.share]
