"""One pass through a network's layers, tensor after tensor, each freed after its last use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.unet.layers import Axes, Chain, Gate, Join, Layer, Sum, last_uses

Compute = Callable[[int, Layer, list[Tensor]], Tensor]


def run(chain: Chain, x: Tensor, compute: Compute, *, keep: Collection[int] = ()) -> list[Tensor]:
    """Return the tensors to keep, in the order of the pass, the output among them as the last.

    Parameters
    ----------
    x : (batch, channels, *spatial)
    compute : called with the number of each layer, the layer, and its source and skips, which have the source's shape;
        what it takes out of this list is freed as soon as it lets go of it
    """
    last, tensors, kept = last_uses(chain), {0: x}, list[Tensor]()
    for at, layer in enumerate(chain):
        inputs = [tensors[layer.source]]
        inputs += [centre(tensors[skip], tuple(inputs[0].shape[2:])) for skip in layer.skips]
        for tensor in (layer.source, *layer.skips):
            if last[tensor] == at:
                del tensors[tensor]
        tensors[at + 1] = compute(at, layer, inputs)
        if at + 1 in keep and at + 1 < len(chain):
            kept.append(tensors[at + 1])
    return [*kept, tensors[len(chain)]]


def combined(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """Return what a layer without weights makes of several tensors of one shape."""
    source, *skips = inputs
    match layer:
        case Join():
            return torch.cat((*skips, source), dim=1)
        case Gate():
            return skips[0] * source.sigmoid()
        case Sum():
            total = source + skips[0]
            for each in skips[1:]:
                total += each
            total = total / len(inputs) if layer.mean else total
            return total.relu_() if layer.relu else total
    raise TypeError(f"layer {layer} takes one tensor")


def interpolated(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Return ``factor`` times the resolution, each voxel interpolated between the nearest ones by their distance."""
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(x, scale_factor=tuple(map(float, factor)), mode=mode, align_corners=False)


def centre(x: Tensor, shape: Axes) -> Tensor:
    """Return the middle of x, spatial axes last, in this shape; the difference is even on every axis."""
    start = [(n - m) // 2 for n, m in zip(x.shape[2:], shape, strict=True)]
    for axis, (a, m) in enumerate(zip(start, shape, strict=True), start=2):
        x = x.narrow(axis, a, m)
    return x
