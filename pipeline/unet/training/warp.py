"""Warp: patches are changed on the device, image, labels and weights through one and the same field.

Positions are in voxels and looked up by index, not through ``grid_sample``, whose coordinates from -1 to 1 are rounded:
no change, right angles and whole shifts give the very voxels. What lies outside is mirrored without repeating the edge.

All patches of a batch are changed together, as they are ``packed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.unet.training.packed import Blur, Moved, Packed, Places, Row, Shades, Still, pack
from pipeline.unet.training.patches import IGNORED, Patch
from pipeline.unet.transfer import sent

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
    def of(cls, row: Row, *, device: str = "cpu") -> Ragged:
        """Return arrays that lie one after the other, on the device."""
        index = sent(row.index, device=device)
        return cls(sent(row.flat, device=device), index[:, 0], index[:, 1:])

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
    return unpacked(pack(patches), device=device)


def unpacked(packed: Packed, *, device: str) -> Batch:
    """Return a batch with all changes carried out; a GPU has copies of its arrays."""
    parts = [_as_read(packed.still, device=device)] if packed.still else []
    parts += [_warped(packed.moved, device=device)] if packed.moved else []
    batch = parts[0] if len(parts) == 1 else _in_order(parts, packed.numbers)
    return replace(batch, images=shaded(batch.images, packed.shades))


def _as_read(still: Still, *, device: str) -> Batch:
    """Return patches that nothing moves."""

    def there(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else sent(array, device=device)

    images, classes = sent(still.images, device=device), sent(still.classes, device=device)
    return Batch(images, classes.long(), there(still.borders), there(still.target))


def _warped(moved: Moved, *, device: str) -> Batch:
    """Return patches, each looked up through its own field."""
    seen = positions(moved.seen, device=device)
    known = positions(moved.known, device=device) if moved.known else seen
    images, classes = Ragged.of(moved.images, device=device), Ragged.of(moved.classes, device=device)
    weights = linear(Ragged.of(moved.borders, device=device), known)[:, 0] if moved.borders else None
    if moved.target is None:
        return Batch(linear(images, seen), nearest(classes, known).long(), weights)
    # a value between voxels is known where all of them are
    share = linear(replace(classes, flat=(classes.flat != IGNORED).float()), known)[:, 0]
    target = linear(Ragged.of(moved.target, device=device), known)
    return Batch(linear(images, seen), torch.where(share > _ALL_KNOWN, 0, IGNORED), weights, target)


def _in_order(parts: Sequence[Batch], numbers: tuple[int, ...]) -> Batch:
    """Return the patches of several batches as one, by their numbers."""
    order = sorted(range(len(numbers)), key=numbers.__getitem__)

    def of_all(tensors: list[Tensor | None]) -> Tensor | None:
        rows = [row for each in tensors if each is not None for row in each]
        return torch.stack([rows[at] for at in order]) if rows else None

    images, classes = of_all([part.images for part in parts]), of_all([part.classes for part in parts])
    assert images is not None
    assert classes is not None
    return Batch(images, classes, of_all([part.borders for part in parts]), of_all([part.target for part in parts]))


def positions(places: Places, *, device: str = "cpu") -> Tensor:
    """Return where the voxels of a box in the centre of each patch come from, float32 (patches, d, *shape)."""
    shape, about = places.shape, sent(places.about, device=device)
    n, ones = len(shape), (1,) * len(shape)
    at = about[:, :, 0].reshape(-1, n, *ones)
    for axis, size in enumerate(shape):
        along = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
        column = about[:, :, 1 + axis].reshape(-1, n, *ones)
        at = at + column * along.reshape(*(-1 if each == axis else 1 for each in range(n)))
    if places.nodes is None:
        return at
    bent = sent(places.nodes, device=device)
    for weights in places.weights:
        bent = torch.tensordot(bent, sent(weights, device=device), dims=([2], [1]))
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


def shaded(x: Tensor, shades: Shades) -> Tensor:
    """Return images (patches, channels, *size), each with its own change of grey values.

    Bit by bit the same where nothing is asked.
    """
    for blur in shades.blurs:
        x = _blurred(x, blur)
    asked = (shades.values != (1.0, 0.0, 1.0, 0.0)).any(axis=0)
    gain, shift, gamma, noise = sent(shades.values, device=x.device).to(x.dtype).T.reshape(4, -1, *(1,) * (x.ndim - 1))
    if asked[:2].any():
        x = x * gain + shift
    if asked[2]:
        axes = tuple(range(1, x.ndim))
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        width = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.where(gamma == 1, x, ((x - low) / width) ** gamma * width + low)
    if asked[3]:
        x = x + noise * torch.stack([_drawn(x[0], seed) for seed in shades.seeds])
    return x


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Return noise of mean 0 and deviation 1, the same for the same seed."""
    drawn = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=drawn, device=like.device)


def _blurred(x: Tensor, blur: Blur) -> Tensor:
    """Return each patch after its own Gaussian along one axis."""
    around = x.index_select(blur.axis, sent(blur.shown, device=x.device))
    out, weights = torch.zeros_like(x), sent(blur.weights, device=x.device)
    for step, weight in enumerate(weights.reshape(len(weights), -1, *(1,) * (x.ndim - 1))):
        out.addcmul_(weight, around.narrow(blur.axis, step, x.shape[blur.axis]))
    return out


def _each(values: Tensor, *, like: Tensor) -> Tensor:
    """Return one value for each array, to compute with a tensor (arrays, *out)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
