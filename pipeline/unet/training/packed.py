"""Packed: a batch as it goes to a device, in a few arrays; all that can be reckoned beforehand is.

Each patch was read as far as its own field reaches (``augment``): their voxels lie one after the other.

    | patch 0 ........ | patch 1 ... | patch 2 .......... |     voxel = start of the patch + offset within it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.mirror import mirror_index
from pipeline.unet.training.augment import Field, Grey
from pipeline.unet.training.patches import Patch

_BLUR_REACH = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Arrays of several shapes, the voxels of one after those of the other.

    Attributes
    ----------
    flat : (channels, voxels of all)
    index : int32 (arrays, 1 + axes), where each begins, and its voxels along each axis
    """

    flat: NDArray[Any]
    index: NDArray[np.int32]

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]]) -> Row:
        """Return arrays (channels, *size)."""
        starts = np.cumsum([0, *(array[0].size for array in arrays[:-1])])
        flat = np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
        return cls(flat, np.column_stack([starts, [array.shape[1:] for array in arrays]]).astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """What says where the voxels of a box in the centre of each patch come from.

    Attributes
    ----------
    shape : of the box
    about : float32 (patches, d, 1 + d), where the centre comes from, then the matrix of each field; counted from the
        first voxel that its ``field.margins(shape)`` asks for
    nodes : float32 (patches, d, *(k,) * d), displacements of the nodes of each field; None where nothing is bent
    weights : along each axis float32 (voxels, k), how much each node counts
    """

    shape: tuple[int, ...]
    about: NDArray[np.float32]
    nodes: NDArray[np.float32] | None
    weights: tuple[NDArray[np.float32], ...]

    @classmethod
    def of(cls, fields: Sequence[Field], shape: tuple[int, ...]) -> Places:
        """Return the places of a box of this shape."""
        half = [(size - 1) / 2 for size in shape]
        before = [[margin for margin, _ in field.margins(shape)] for field in fields]
        starts = np.array(half) + before + [field.shift for field in fields]
        about = np.dstack([starts, [field.matrix for field in fields]]).astype(np.float32)
        bending = [field for field in fields if field.nodes is not None]
        if not bending:
            return cls(shape, about, None, ())
        nodes = [np.zeros_like(bending[0].nodes) if field.nodes is None else field.nodes for field in fields]
        weights = (bending[0].weights(axis, size).astype(np.float32) for axis, size in enumerate(shape))
        return cls(shape, about, np.stack(nodes).astype(np.float32), tuple(weights))


@dataclass(frozen=True, slots=True, eq=False)
class Blur:
    """A Gaussian for each patch along one axis, cut at four standard deviations, mirrored outside.

    Attributes
    ----------
    axis : of images (patches, channels, *size)
    shown : int64, the voxels that those from the reach before the first to that after the last one show
    weights : float32 (2 * reach + 1, patches)
    """

    axis: int
    shown: NDArray[np.intp]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, sigmas: Sequence[float], *, axis: int, n: int) -> Blur:
        """Return the blur along an axis of ``n`` voxels."""
        reach = ceil(_BLUR_REACH * max(sigmas))
        weights = np.stack([_gaussian(sigma, reach) for sigma in sigmas], axis=1)
        return cls(axis, mirror_index(-reach, n + reach, n), weights)


@dataclass(frozen=True, slots=True, eq=False)
class Shades:
    """What happens to the grey values of each patch.

    Attributes
    ----------
    values : float64 (patches, 4): gain, shift, gamma, noise
    seeds : of the noise
    """

    blurs: tuple[Blur, ...]
    values: NDArray[np.float64]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, greys: Sequence[Grey], size: tuple[int, ...]) -> Shades:
        """Return the changes of images of this size."""
        along = enumerate(zip(*(grey.blur for grey in greys), strict=True))
        blurs = [Blur.of(sigmas, axis=2 + axis, n=size[axis]) for axis, sigmas in along if max(sigmas) > 0]
        values = np.array([(grey.gain, grey.shift, grey.gamma, grey.noise) for grey in greys])
        return cls(tuple(blurs), values, tuple(grey.seed for grey in greys))


@dataclass(frozen=True, slots=True, eq=False)
class Still:
    """Patches that nothing moves: (patches, ...) of what ``Patch`` has."""

    images: NDArray[np.float32]
    classes: NDArray[np.signedinteger[Any]]
    borders: NDArray[np.float32] | None
    target: NDArray[np.float32] | None

    @classmethod
    def of(cls, patches: Sequence[Patch]) -> Still:
        """Return patches one beside the other."""
        borders, targets = _of_all([p.borders for p in patches]), _of_all([p.target for p in patches])
        return cls(
            np.stack([p.image for p in patches]), np.stack([p.classes for p in patches]),
            np.stack(borders) if borders else None, np.stack(targets) if targets else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """Patches that are each to be looked up through a field of its own.

    Attributes
    ----------
    seen : where what enters the network comes from; ``known``: what is compared with the labels; None: the same
    """

    images: Row
    classes: Row
    borders: Row | None
    target: Row | None
    seen: Places
    known: Places | None

    @classmethod
    def of(cls, patches: Sequence[Patch]) -> Moved:
        """Return patches that have fields."""
        fields = [patch.change.field for patch in patches if patch.change and patch.change.field]
        tile, core = patches[0].tile, patches[0].core
        borders, targets = _of_all([p.borders for p in patches]), _of_all([p.target for p in patches])
        return cls(
            Row.of([p.image for p in patches]), Row.of([p.classes[None] for p in patches]),
            Row.of([each[None] for each in borders]) if borders else None, Row.of(targets) if targets else None,
            Places.of(fields, tile), None if core == tile else Places.of(fields, core),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A batch; ``numbers`` are those of the patches in ``still``, then of those in ``moved``."""

    still: Still | None
    moved: Moved | None
    numbers: tuple[int, ...]
    shades: Shades


def pack(patches: Sequence[Patch]) -> Packed:
    """Return patches in the arrays that go to a device; no torch is needed."""
    fields = [patch.change.field if patch.change else None for patch in patches]
    still = [number for number, field in enumerate(fields) if field is None]
    moved = [number for number, field in enumerate(fields) if field is not None]
    return Packed(
        Still.of([patches[number] for number in still]) if still else None,
        Moved.of([patches[number] for number in moved]) if moved else None, (*still, *moved),
        Shades.of([patch.change.grey if patch.change else Grey() for patch in patches], patches[0].tile),
    )  # fmt: skip


def _of_all(arrays: Sequence[NDArray[np.float32] | None]) -> list[NDArray[np.float32]]:
    """Return the arrays, which all patches have, or none."""
    return [each for each in arrays if each is not None]


def _gaussian(sigma: float, reach: int) -> NDArray[np.float32]:
    """Return the weights of 2 reach + 1 voxels, float32, zero beyond four standard deviations; sigma 0: the middle."""
    at = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (at / (sigma or 1.0)) ** 2) * (np.abs(at) <= ceil(_BLUR_REACH * sigma))
    shares: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return shares
