"""Warp: patches are changed on the device, image, labels and weights through one and the same field.

Positions are in voxels and looked up by index, not through ``grid_sample``, whose coordinates from -1 to 1 are rounded:
no change, right angles and whole shifts give the very voxels. What lies outside is mirrored without repeating the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
import torch
from torch import Tensor

from pipeline.unet.training.augment import Field, Grey
from pipeline.unet.training.patches import IGNORED, Patch

_BLUR_REACH = 4.0
_ALL_KNOWN = 1 - 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Patches as the network sees them, on its device.

    Attributes
    ----------
    images : float32 (batch, channels, *tile); classes: int64 (batch, *core)
    borders : float32 (batch, *core), what the labels add to each voxel's weight; None adds nothing
    target : float32 (batch, channels, *core), what the images are to become; None where labels are learnt
    """

    images: Tensor
    classes: Tensor
    borders: Tensor | None
    target: Tensor | None = None


def batch_of(patches: list[Patch], *, device: str) -> Batch:
    """Return patches with their changes carried out."""
    images, classes, borders, targets = zip(*(_shown(patch, device) for patch in patches), strict=True)
    return Batch(torch.stack(images), torch.stack(classes), _stacked(borders), _stacked(targets))


def _stacked(each: tuple[Tensor | None, ...]) -> Tensor | None:
    """Return what all patches have, or none of them."""
    there = [tensor for tensor in each if tensor is not None]
    return torch.stack(there) if there else None


def _shown(patch: Patch, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return image, classes, border weights and target of one patch."""
    image, classes = torch.from_numpy(patch.image).to(device), torch.from_numpy(patch.classes).to(device)
    borders, target = (
        None if each is None else torch.from_numpy(each).to(device) for each in (patch.borders, patch.target)
    )
    if patch.change is None:
        return image, classes, borders, target
    if (field := patch.change.field) is not None:
        image = linear(image, positions(field, patch.tile, device=device))
        at = positions(field, patch.core, device=device)
        if target is None:
            classes = nearest(classes, at)
        else:  # a value between voxels is known where all of them are
            known = linear((classes != IGNORED).float()[None], at)[0] > _ALL_KNOWN
            target, classes = linear(target, at), torch.where(known, 0, IGNORED)
        borders = None if borders is None else linear(borders[None], at)[0]
    return shaded(image, patch.change.grey), classes, borders, target


def positions(field: Field, shape: tuple[int, ...], *, device: str = "cpu") -> Tensor:
    """Return where the voxels of a box in the patch's centre come from, float32 (d, *shape).

    Counted from the first voxel that ``field.margins(shape)`` asks for.
    """
    n = len(shape)
    half = [(size - 1) / 2 for size in shape]
    start = [h + before + s for h, (before, _), s in zip(half, field.margins(shape), field.shift, strict=True)]
    at = torch.as_tensor(np.array(start), dtype=torch.float32, device=device).reshape(n, *(1,) * n)
    for axis, size in enumerate(shape):
        along = torch.arange(size, device=device, dtype=torch.float32) - half[axis]
        column = torch.as_tensor(field.matrix[:, axis], dtype=torch.float32, device=device).reshape(n, *(1,) * n)
        at = at + column * along.reshape(*(-1 if each == axis else 1 for each in range(n)))
    if field.nodes is None:
        return at
    bent = torch.as_tensor(field.nodes, dtype=torch.float32, device=device)
    for axis, size in enumerate(shape):
        weights = torch.as_tensor(field.weights(axis, size), dtype=torch.float32, device=device)
        bent = torch.tensordot(bent, weights, dims=([1], [1]))
    return at + bent


def linear(x: Tensor, at: Tensor) -> Tensor:
    """Return values (channels, *out) between those of x (channels, *size) at positions (d, *out), mirrored outside."""
    size = tuple(x.shape[1:])
    flat, low = x.reshape(len(x), -1), at.floor()
    part = (at - low).flatten(1)
    index = [[_mirrored(each.long().flatten() + step, n) for step in (0, 1)] for each, n in zip(low, size, strict=True)]
    out: Tensor | None = None
    for corner in product((0, 1), repeat=len(size)):
        weight = torch.ones_like(part[0])
        for axis, step in enumerate(corner):
            weight = weight * (part[axis] if step else 1 - part[axis])
        value = flat[:, _offset([index[axis][step] for axis, step in enumerate(corner)], size)] * weight
        out = value if out is None else out.add_(value)
    assert out is not None
    return out.reshape(len(x), *at.shape[1:])


def nearest(y: Tensor, at: Tensor) -> Tensor:
    """Return the values (*out) of y (*size) nearest to positions (d, *out), mirrored outside."""
    size = tuple(y.shape)
    index = [_mirrored((each + 0.5).floor().long().flatten(), n) for each, n in zip(at, size, strict=True)]
    return y.flatten()[_offset(index, size)].reshape(at.shape[1:])


def shaded(x: Tensor, grey: Grey) -> Tensor:
    """Return an image (channels, *size) with its grey values changed; bit by bit the same where nothing is asked."""
    for axis, sigma in enumerate(grey.blur, start=1):
        if sigma > 0:
            x = _blurred(x, axis, sigma)
    if (grey.gain, grey.shift) != (1.0, 0.0):
        x = x * grey.gain + grey.shift
    if grey.gamma != 1:
        low, high = x.amin(), x.amax()
        width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
        x = ((x - low) / width) ** grey.gamma * width + low
    if grey.noise > 0:
        drawn = torch.Generator(x.device).manual_seed(grey.seed)
        x = x + grey.noise * torch.randn(x.shape, generator=drawn, device=x.device)
    return x


def _blurred(x: Tensor, axis: int, sigma: float) -> Tensor:
    """Return x after a Gaussian along one axis, cut at four standard deviations, mirrored outside."""
    reach = ceil(_BLUR_REACH * sigma)
    steps = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = weights / weights.sum()
    along, n = torch.arange(x.shape[axis], device=x.device), x.shape[axis]
    out = torch.zeros_like(x)
    for step, weight in zip(steps, weights, strict=True):
        out += weight * x.index_select(axis, _mirrored(along + step, n))
    return out


def _mirrored(at: Tensor, n: int) -> Tensor:
    """Return the voxels from 0 to n - 1 that whole positions show; ``geometry.mirror`` says the same of arrays."""
    if n == 1:
        return torch.zeros_like(at)
    period = 2 * (n - 1)
    at = at.remainder(period)
    return torch.minimum(at, period - at)


def _offset(index: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """Return positions in the flat array."""
    offset = index[0]
    for axis in range(1, len(size)):
        offset = offset * size[axis] + index[axis]
    return offset
