"""Foreground: where the rarer classes are, in an index that fits memory whatever the size of the scans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError

MOST_VOXELS = 2**14
_SEED = 0

Seen = tuple[int, tuple[int, ...], NDArray[np.signedinteger[Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class Foreground:
    """Voxels of all classes but the most frequent one, or all that are labelled, as of one class.

    Classes are drawn from evenly, as in nnU-Net (doi:10.1038/s41592-020-01008-z), so that the rarest is seen as often
    as the others; within a class its voxels are.

    Attributes
    ----------
    share : part of the patches that are centred on one of the voxels
    voxels : int64 (n, axes), of each class by each source: all, or an even sample of at most MOST_VOXELS
    counts : int64 (classes, sources), how many there are
    """

    share: float
    voxels: tuple[tuple[NDArray[np.int64], ...], ...]
    counts: NDArray[np.int64]

    def draw(self, rng: np.random.Generator) -> tuple[int, NDArray[np.int64]]:
        """Return the number of a source and a voxel of it."""
        which = int(rng.integers(len(self.voxels)))
        counts = self.counts[which]
        source = int(rng.choice(len(counts), p=counts / counts.sum()))
        held = self.voxels[which][source]
        return source, held[int(rng.integers(len(held)))]


def find_foreground(
    blocks: Iterable[Seen], *, n_classes: int, n_sources: int, share: float
) -> Foreground:
    """Return the foreground in the classes of all sources, seen block by block, each block once.

    Parameters
    ----------
    blocks : number of the source, where the block starts, its classes; negative ones do not count

    Raises
    ------
    ArgumentError : there are voxels of one class only, or of none.
    """
    voxels, counts = _sampled(blocks, n_classes=n_classes, n_sources=n_sources)
    totals = counts.sum(axis=1)
    others = [c for c in range(n_classes) if totals[c] and c != totals.argmax()]
    if not others:
        raise ArgumentError(
            f"foreground_share needs voxels of at least 2 classes where the network learns, got {(totals > 0).sum()}; "
            "label another, or set foreground_share = 0"
        )
    return Foreground(share, tuple(voxels[c] for c in others), counts[others])


def find_labelled(blocks: Iterable[Seen], *, n_sources: int) -> Foreground:
    """Return the voxels that are labelled; of all sources, seen block by block, each block once.

    Raises
    ------
    ArgumentError : none is.
    """
    alike = ((source, start, np.where(classes >= 0, 0, -1)) for source, start, classes in blocks)
    voxels, counts = _sampled(alike, n_classes=1, n_sources=n_sources)
    if not counts.any():
        raise ArgumentError(
            "labels must show classes where the network is to learn, got ignored voxels alone; label some there, or "
            "set another ignore"
        )
    return Foreground(1.0, voxels, counts)


def _sampled(
    blocks: Iterable[Seen], *, n_classes: int, n_sources: int
) -> tuple[tuple[tuple[NDArray[np.int64], ...], ...], NDArray[np.int64]]:
    """Return voxels and counts as Foreground has them, of every class by every source."""
    rng = np.random.default_rng(_SEED)  # the index is the same whatever the training's seed
    samples = [[_Sample.empty() for _ in range(n_sources)] for _ in range(n_classes)]
    for source, start, classes in blocks:
        for which in np.unique(classes[classes >= 0]).tolist():
            found = np.argwhere(classes == which) + np.array(start)
            samples[which][source] = samples[which][source].with_more(found, rng)
    counts = np.array([[each.count for each in row] for row in samples], dtype=np.int64)
    return tuple(tuple(each.voxels for each in row) for row in samples), counts


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """An even sample: of all voxels seen, those of lowest random key."""

    voxels: NDArray[np.int64]
    keys: NDArray[np.float64]
    count: int

    @classmethod
    def empty(cls) -> _Sample:
        return cls(np.empty((0, 0), np.int64), np.empty(0), 0)

    def with_more(self, found: NDArray[np.int64], rng: np.random.Generator) -> _Sample:
        keys = np.concatenate([self.keys, rng.random(len(found))])
        voxels = np.concatenate([self.voxels, found]) if self.count else found
        lowest = np.sort(np.argpartition(keys, MOST_VOXELS)[:MOST_VOXELS]) if len(keys) > MOST_VOXELS else slice(None)
        return _Sample(voxels[lowest], keys[lowest], self.count + len(found))
