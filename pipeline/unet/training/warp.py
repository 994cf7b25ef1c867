"""Warp: patches are changed on the device, image, labels and weights through one and the same field.

Positions are in voxels and looked up by index, not through ``grid_sample``, whose coordinates from -1 to 1 are rounded:
no change, right angles and whole shifts give the very voxels. What lies outside is mirrored without repeating the edge.

All patches of a batch are changed together, though each was read as far as its own field reaches: their voxels lie one
after the other (``Ragged``), sent to the device at once.

    | patch 0 ........ | patch 1 ... | patch 2 .......... |     voxel = start of the patch + offset within it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.geometry.mirror import mirror_index
from pipeline.unet.training.augment import Field, Grey
from pipeline.unet.training.patches import IGNORED, Patch
from pipeline.unet.transfer import locks, sent

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


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Arrays of several shapes on the device, the voxels of one after those of the other.

    Attributes
    ----------
    flat : (channels, voxels of all)
    starts : int32 (arrays,), where each begins; ``sizes``: int32 (arrays, axes), voxels along each axis
    """

    flat: Tensor
    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]], *, device: str = "cpu") -> Ragged:
        """Return arrays (channels, *size)."""
        lengths = [array[0].size for array in arrays]
        starts = np.cumsum([0, *lengths[:-1]])
        rows = [torch.from_numpy(array).reshape(len(array), -1) for array in arrays]
        flat = torch.empty((len(rows[0]), sum(lengths)), dtype=rows[0].dtype, pin_memory=locks(device))
        torch.cat(rows, dim=1, out=flat)
        index = sent(np.column_stack([starts, [array.shape[1:] for array in arrays]]).astype(np.int32), device=device)
        return cls(flat.to(device, non_blocking=True), index[:, 0], index[:, 1:])

    def joined(self, offset: Tensor, index: Tensor, axis: int) -> Tensor:
        """Return positions in each array, of voxels along the axes before this one and along it."""
        return offset * _each(self.sizes[:, axis], like=index) + index

    def values(self, offset: Tensor) -> Tensor:
        """Return the values at these positions in each array, (channels, arrays, *out)."""
        at = (offset + _each(self.starts, like=offset)).flatten()
        return self.flat.index_select(1, at).reshape(-1, *offset.shape)

    def mirrored(self, at: Tensor, axis: int) -> Tensor:
        """Return the voxels along an axis that whole positions (arrays, *out) show."""
        period = _each(2 * (self.sizes[:, axis] - 1), like=at).clamp_min(1)
        at = at.remainder(period)
        return torch.minimum(at, period - at)


def batch_of(patches: Sequence[Patch], *, device: str) -> Batch:
    """Return patches with their changes carried out."""
    fields = [patch.change.field if patch.change else None for patch in patches]
    still = [number for number, field in enumerate(fields) if field is None]
    moved = [number for number, field in enumerate(fields) if field is not None]
    parts = [
        (numbers, shown([patches[number] for number in numbers], device=device))
        for numbers, shown in ((still, _as_read), (moved, _warped)) if numbers
    ]  # fmt: skip
    batch = parts[0][1] if len(parts) == 1 else _in_order(parts)
    return replace(batch, images=shaded(batch.images, [p.change.grey if p.change else Grey() for p in patches]))


def _as_read(patches: Sequence[Patch], *, device: str) -> Batch:
    """Return patches that nothing moves."""

    def stacked(arrays: Sequence[NDArray[Any] | None]) -> Tensor | None:
        there = [each for each in arrays if each is not None]
        return sent(np.stack(there), device=device) if there else None

    images, classes = stacked([p.image for p in patches]), stacked([p.classes for p in patches])
    assert images is not None
    assert classes is not None
    borders, target = stacked([p.borders for p in patches]), stacked([p.target for p in patches])
    return Batch(images, classes.long(), borders, target)


def _warped(patches: Sequence[Patch], *, device: str) -> Batch:
    """Return patches, each looked up through its own field."""
    fields = [patch.change.field for patch in patches if patch.change and patch.change.field]
    tile, core = patches[0].tile, patches[0].core
    seen = positions(fields, tile, device=device)
    known = seen if core == tile else positions(fields, core, device=device)
    images = Ragged.of([p.image for p in patches], device=device)
    classes = Ragged.of([p.classes[None] for p in patches], device=device)
    borders, targets = [p.borders[None] for p in patches if p.borders is not None], [p.target for p in patches]
    weights = linear(Ragged.of(borders, device=device), known)[:, 0] if borders else None
    if targets[0] is None:
        return Batch(linear(images, seen), nearest(classes, known).long(), weights)
    # a value between voxels is known where all of them are
    share = linear(replace(classes, flat=(classes.flat != IGNORED).float()), known)[:, 0]
    target = linear(Ragged.of([each for each in targets if each is not None], device=device), known)
    return Batch(linear(images, seen), torch.where(share > _ALL_KNOWN, 0, IGNORED), weights, target)


def _in_order(parts: list[tuple[list[int], Batch]]) -> Batch:
    """Return the patches of several batches as one, by their numbers."""

    def of_all(tensors: list[Tensor | None]) -> Tensor | None:
        there = [each for each in tensors if each is not None]
        if not there:
            return None
        pairs = (zip(numbers, each, strict=True) for (numbers, _), each in zip(parts, there, strict=True))
        return torch.stack([row for _, row in sorted(chain.from_iterable(pairs), key=itemgetter(0))])

    images, classes = of_all([part.images for _, part in parts]), of_all([part.classes for _, part in parts])
    assert images is not None
    assert classes is not None
    return Batch(images, classes, of_all([p.borders for _, p in parts]), of_all([p.target for _, p in parts]))


def positions(fields: Sequence[Field], shape: tuple[int, ...], *, device: str = "cpu") -> Tensor:
    """Return where the voxels of a box in the centre of each patch come from, float32 (patches, d, *shape).

    Counted from the first voxel that its ``field.margins(shape)`` asks for.
    """
    n, ones = len(shape), (1,) * len(shape)
    half = [(size - 1) / 2 for size in shape]
    before = [[margin for margin, _ in field.margins(shape)] for field in fields]
    starts = np.array(half) + before + [field.shift for field in fields]
    about = sent(np.dstack([starts, [field.matrix for field in fields]]).astype(np.float32), device=device)
    at = about[:, :, 0].reshape(-1, n, *ones)
    for axis, size in enumerate(shape):
        along = torch.arange(size, device=device, dtype=torch.float32) - half[axis]
        column = about[:, :, 1 + axis].reshape(-1, n, *ones)
        at = at + column * along.reshape(*(-1 if each == axis else 1 for each in range(n)))
    bending = [field for field in fields if field.nodes is not None]
    if not bending:
        return at
    nodes = [np.zeros_like(bending[0].nodes) if field.nodes is None else field.nodes for field in fields]
    bent = sent(np.stack(nodes).astype(np.float32), device=device)
    for axis, size in enumerate(shape):
        weights = sent(bending[0].weights(axis, size).astype(np.float32), device=device)
        bent = torch.tensordot(bent, weights, dims=([2], [1]))
    return at + bent


def linear(x: Ragged, at: Tensor) -> Tensor:
    """Return values (arrays, channels, *out) between those of x at positions (arrays, d, *out), mirrored outside."""
    low = at.floor()
    part, whole = at - low, low.int()
    corners = [(torch.zeros_like(whole[:, 0]), torch.ones_like(part[:, 0]))]
    for axis in range(at.shape[1]):
        sides = zip((whole[:, axis], whole[:, axis] + 1), (1 - part[:, axis], part[:, axis]), strict=True)
        near = [(x.mirrored(index, axis), weight) for index, weight in sides]
        corners = [
            (x.joined(offset, index, axis), so_far * weight) for offset, so_far in corners for index, weight in near
        ]  # fmt: skip
    out: Tensor | None = None
    for offset, weight in corners:
        value = x.values(offset) * weight
        out = value if out is None else out.add_(value)
    assert out is not None
    return out.transpose(0, 1)


def nearest(y: Ragged, at: Tensor) -> Tensor:
    """Return the values (arrays, *out) of y, of one channel, nearest to positions (arrays, d, *out), mirrored."""
    whole = (at + 0.5).floor().int()
    offset = y.mirrored(whole[:, 0], 0)
    for axis in range(1, at.shape[1]):
        offset = y.joined(offset, y.mirrored(whole[:, axis], axis), axis)
    return y.values(offset)[0]


def shaded(x: Tensor, greys: Sequence[Grey]) -> Tensor:
    """Return images (patches, channels, *size), each with its own change of grey values.

    Bit by bit the same where nothing is asked.
    """
    for axis, sigmas in enumerate(zip(*(grey.blur for grey in greys), strict=True), start=2):
        if max(sigmas) > 0:
            x = _blurred(x, axis, sigmas)
    values = np.array([(grey.gain, grey.shift, grey.gamma, grey.noise) for grey in greys])
    gain, shift, gamma, noise = sent(values, device=x.device).to(x.dtype).T.reshape(4, -1, *(1,) * (x.ndim - 1))
    if any((grey.gain, grey.shift) != (1.0, 0.0) for grey in greys):
        x = x * gain + shift
    if any(grey.gamma != 1 for grey in greys):
        axes = tuple(range(1, x.ndim))
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.where(gamma == 1, x, ((x - low) / width) ** gamma * width + low)
    if any(grey.noise > 0 for grey in greys):
        x = x + noise * torch.stack([_drawn(x[0], grey.seed) for grey in greys])
    return x


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Return noise of mean 0 and deviation 1, the same for the same seed."""
    drawn = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=drawn, device=like.device)


def _blurred(x: Tensor, axis: int, sigmas: Sequence[float]) -> Tensor:
    """Return each patch after its own Gaussian along one axis, cut at four standard deviations, mirrored outside."""
    reach, n = ceil(_BLUR_REACH * max(sigmas)), x.shape[axis]
    around = x.index_select(axis, sent(mirror_index(-reach, n + reach, n), device=x.device))
    weights = np.stack([_gaussian(sigma, reach) for sigma in sigmas], axis=1)
    out = torch.zeros_like(x)
    for step, weight in enumerate(sent(weights, device=x.device).reshape(len(weights), -1, *(1,) * (x.ndim - 1))):
        out.addcmul_(weight, around.narrow(axis, step, n))
    return out


def _gaussian(sigma: float, reach: int) -> NDArray[np.float32]:
    """Return the weights of 2 reach + 1 voxels, float32, zero beyond four standard deviations; sigma 0: the middle."""
    at = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (at / (sigma or 1.0)) ** 2) * (np.abs(at) <= ceil(_BLUR_REACH * sigma))
    shares: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return shares


def _each(values: Tensor, *, like: Tensor) -> Tensor:
    """Return one value for each array, to compute with a tensor (arrays, *out)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
