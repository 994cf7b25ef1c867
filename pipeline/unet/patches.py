"""Patches: random crops of images and their labels, straight from the stores.

The context around a patch is mirrored outside the image, as at inference. Labels outside the region that may be
learnt from, or shown, are IGNORED; intensities there are seen.

    |hhhh|cccccccc|hhhh|     what enters the network
         |cccccccc|          what is compared with the labels
    region  |----------...   labels before it are ignored
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable, read_mirrored

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Source:
    """An image to learn from.

    Attributes
    ----------
    image : shape (channels, *spatial); ``labels``: integers, shape (*spatial)
    windows : (offset, scale) of each channel
    region : where labels count
    """

    image: Sliceable
    labels: Sliceable
    windows: tuple[tuple[float, float], ...]
    region: Box


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the right-angle rotations and reflections of an array's last axes."""

    order: tuple[int, ...]
    flipped: tuple[bool, ...]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array with its last axes in another order and direction; the same for image and labels."""
        front = array.ndim - len(self.order)
        turned: NDArray[Any] = array.transpose(*range(front), *(front + axis for axis in self.order))
        return np.flip(turned, tuple(front + axis for axis, flip in enumerate(self.flipped) if flip))


def orientations(
    core: tuple[int, ...], *, halo: tuple[int, ...], voxel_size_um: tuple[float, ...] | None
) -> tuple[Orientation, ...]:
    """Return all orientations that keep a patch's shape and voxel size; voxels of unknown size count as cubes.

    The first one changes nothing.
    """
    size = voxel_size_um or (1.0,) * len(core)
    alike = list(zip(core, halo, (round(s / min(size), 3) for s in size), strict=True))
    axes = range(len(core))
    orders = [order for order in product(axes, repeat=len(core)) if sorted(order) == list(axes)]
    kept = [order for order in orders if all(alike[a] == alike[b] for a, b in zip(order, axes, strict=True))]
    return tuple(Orientation(order, flips) for order in kept for flips in product((False, True), repeat=len(core)))


@dataclass(frozen=True, slots=True)
class Patches:
    """Where patches come from and what they look like; axes are the images' spatial ones.

    Attributes
    ----------
    class_values : label values, ascending; their positions are the classes
    n_axes : axes of the network; of a volume's patches it sees the last two where this is 2
    turns : orientations to draw from; contrast: how far intensities are scaled and shifted
    """

    sources: tuple[Source, ...]
    core: tuple[int, ...]
    halo: tuple[int, ...]
    class_values: tuple[int, ...]
    n_axes: int
    turns: tuple[Orientation, ...]
    contrast: float

    def at(self, source: Source, core: Box) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what a patch shows the network, float32 (channels, *tile), and its classes, int64 (*core)."""
        return self._seen(*self._read(source, core))

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return a random patch, turned at random; larger images are drawn from in proportion."""
        voxels = np.array([source.region.n_voxels for source in self.sources], dtype=np.float64)
        source = self.sources[int(rng.choice(len(self.sources), p=voxels / voxels.sum()))]
        x, y = self._read(source, self.place(source, rng))
        turn = self.turns[int(rng.integers(len(self.turns)))]
        gain, shift = 1 + self.contrast * rng.uniform(-1, 1), self.contrast * rng.uniform(-1, 1)
        return self._seen(turn.apply(x) * np.float32(gain) + np.float32(shift), turn.apply(y))

    def place(self, source: Source, rng: np.random.Generator) -> Box:
        """Return a core anywhere in the region; where the region is smaller than it, one that holds the region."""
        start = []
        for a, b, n in zip(source.region.start, source.region.stop, self.core, strict=True):
            first, last = min(a, b - n), max(a, b - n)
            start.append(int(rng.integers(first, last + 1)))
        return self._core(tuple(start))

    def batch(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return ``n`` random patches, stacked along a new first axis."""
        xs, ys = zip(*(self.draw(rng) for _ in range(n)), strict=True)
        return np.stack(xs), np.stack(ys)

    def fixed(self, most: int) -> list[tuple[Source, Box]]:
        """Return at most ``most`` places, evenly spread over all regions, always the same."""
        places = []
        for source in self.sources:
            spans = []
            for a, b, n in zip(source.region.start, source.region.stop, self.core, strict=True):
                spans.append([min(at, b - n) for at in range(a, b, n)])
            places += [(source, self._core(start)) for start in product(*spans)]
        chosen = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
        return [places[i] for i in chosen]

    def _read(self, source: Source, core: Box) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return normalised intensities (channels, *tile) and classes (*core), along the image's axes."""
        raw = read_mirrored(source.image, core.grow(self.halo))
        offset, scale = np.array(source.windows).T.reshape(2, -1, *(1,) * core.ndim)
        x = ((raw.astype(np.float64) - offset) * scale).astype(np.float32)
        found = np.searchsorted(self.class_values, read_mirrored(source.labels, core)).astype(np.int64)
        inside = core.intersect(source.region).shift(tuple(-a for a in core.start))
        y = np.full_like(found, IGNORED)
        y[inside.slices] = found[inside.slices]
        return x, y

    def _seen(
        self, x: NDArray[np.float32], y: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return a patch along the network's axes, without that across its slices."""
        front = len(self.core) - self.n_axes
        return x.reshape(x.shape[:1] + x.shape[1 + front :]), y.reshape(y.shape[front:])

    def _core(self, start: tuple[int, ...]) -> Box:
        return Box(start, tuple(a + n for a, n in zip(start, self.core, strict=True)))
