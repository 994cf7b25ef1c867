"""Patches: random crops of images and their labels, straight from the stores.

The context around a patch is mirrored outside the image, as at inference. Labels outside the region that may be
learnt from, or shown, are IGNORED; intensities there are seen.

    |hhhh|cccccccc|hhhh|     what enters the network
         |cccccccc|          what is compared with the labels
    region  |----------...   labels before it are ignored

Where images differ in voxel size, cores and regions are counted in voxels as the network sees them (``resampled``).

A patch that will be warped is read as far as its own field reaches (``augment``), so that it is made of what the scan
shows there, and mirrored only where the scan ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.training.augment import Augmentation, Change, Field, Grey, draw_change
from pipeline.unet.training.foreground import Foreground, find_foreground, find_labelled
from pipeline.unet.training.orientation import Orientation
from pipeline.unet.training.overlapping import UNKNOWN, label_by_label
from pipeline.unet.training.resampled import nearest, placed
from pipeline.unet.training.source import Source

IGNORED = UNKNOWN
_BYTES = np.arange(256, dtype=np.uint8)
_FEW_CLASSES = 8

Classes = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """What was read for a patch, and what is to be done to it; axes are the network's.

    Attributes
    ----------
    image : float32, (channels, *tile), or what the change's field asks for instead of the tile
    classes : integers, (*core), or what the field asks for instead; IGNORED where they do not count
    borders : float32, of the shape of ``classes``
    tile, core : shapes of what enters the network and of what is compared with the labels
    target : float32, (channels, *core), or what the field asks for instead
    """

    image: NDArray[np.float32]
    classes: Classes
    borders: NDArray[np.float32] | None
    tile: tuple[int, ...]
    core: tuple[int, ...]
    change: Change | None = None
    target: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Patches:
    """Where patches come from and what they look like; axes are the images' spatial ones.

    Attributes
    ----------
    class_values : label values, ascending; their positions are the classes; empty: the labels are codes
    n_axes : axes of the network; of a volume's patches it sees the last two where this is 2, and what the halo adds
        across them as channels; see ``UNetSettings.neighbours``
    turns : orientations to draw from
    augmentation : how far drawn patches are changed
    spacing : distance of voxels along the network's axes, in voxels of the finest; empty: all alike
    ignore : label value of voxels that nobody has labelled
    foreground : voxels that part of the patches are centred on; None: all lie anywhere
    labelled : voxels of which each of the others shows one; None: they lie anywhere
    n_overlapping : labels whose codes the sources have, see ``Overlapping``; 0: each voxel is of one class
    """

    sources: tuple[Source, ...]
    core: tuple[int, ...]
    halo: tuple[int, ...]
    class_values: tuple[int, ...]
    n_axes: int
    turns: tuple[Orientation, ...]
    augmentation: Augmentation
    spacing: tuple[float, ...] = ()
    ignore: int | None = None
    foreground: Foreground | None = None
    labelled: Foreground | None = None
    n_overlapping: int = 0

    @property
    def tile(self) -> tuple[int, ...]:
        """Shape of what enters the network, along its axes."""
        return tuple(c + 2 * h for c, h in zip(self.core, self.halo, strict=True))[-self.n_axes :]

    def at(self, source: Source, core: Box) -> Patch:
        """Return the patch of a core as it is."""
        return self.changed(source, core, turn=Orientation.none(core.ndim))

    def changed(self, source: Source, core: Box, *, turn: Orientation, change: Change | None = None) -> Patch:
        """Return the patch of a core, turned, with what a change of it looks up around it."""
        change, core = self._in_voxels_of(source, core, turn, change)
        field = change.field if change else None
        seen = self._reached(core.grow(self.halo), turn, field)
        known = self._reached(core, turn, field) if any(self.halo) else seen
        x = source.intensities(seen, turn)
        y, front = self._classes(source, known), len(self.core) - self.n_axes
        w = None if source.borders is None else read_mirrored(source.borders, known)
        t = None if source.target is None else source.target.values(known)

        def shown(turned: NDArray[Any], axis: int) -> NDArray[Any]:
            channels = (-1,) * axis  # an axis across slices had one voxel, or those of neighbours, too
            return np.ascontiguousarray(turned.reshape(channels + turned.shape[axis + front :]))

        borders = None if w is None else shown(turn.apply(w), 0).astype(np.float32, copy=False)
        target = None if t is None else shown(turn.apply(t), 1)
        return Patch(shown(x, 1), shown(turn.apply(y), 0), borders, self.tile, self.core[front:], change, target)

    def _in_voxels_of(
        self, source: Source, core: Box, turn: Orientation, change: Change | None
    ) -> tuple[Change | None, Box]:
        """Return a change and a core in the image's voxels, where those are of another size."""
        if not source.steps:
            return change, core
        change = change or Change(None, Grey())
        at, rests = placed(core, source.steps)
        steps, rests = (each[-self.n_axes :] for each in (turn.along(source.steps), turn.towards(rests)))
        return Change((change.field or Field.still(self.tile)).stepped(steps, rests), change.grey), at

    def draw(self, rng: np.random.Generator) -> Patch:
        """Return a random patch, turned at random, with its change still to be done."""
        return self.drawn(rng)()

    def drawn(self, rng: np.random.Generator) -> Callable[[], Patch]:
        """Return what reads a random patch, whenever and wherever it is called: all is drawn by now."""
        source, place = self._where(rng)
        turn = self.turns[int(rng.integers(len(self.turns)))]
        change = draw_change(self.augmentation, self.tile, spacing=self.spacing or (1.0,) * self.n_axes, rng=rng)
        return partial(self.changed, source, place, turn=turn, change=change)

    def with_foreground(self, share: float) -> Patches:
        """Return patches of which this part are centred on a voxel of a class that is not the most frequent one.

        Raises
        ------
        ArgumentError : the regions have voxels of one class only.
        """
        blocks = (
            (number, box.start, each) for number, box, classes in self._labelled() for each in self._apart(classes)
        )
        n_classes, n_sources = len(self.class_values) or self.n_overlapping + 1, len(self.sources)
        return replace(self, foreground=find_foreground(blocks, n_classes=n_classes, n_sources=n_sources, share=share))

    def with_labelled(self) -> Patches:
        """Return patches that all show a label, however few voxels have one.

        Raises
        ------
        ArgumentError : no voxel of the regions is labelled.
        """
        blocks = ((number, box.start, classes) for number, box, classes in self._labelled())
        return replace(self, labelled=find_labelled(blocks, n_sources=len(self.sources)))

    def _where(self, rng: np.random.Generator) -> tuple[Source, Box]:
        """Return a place to draw: centred on the foreground as often as is asked for, else anywhere, or around a label.

        Larger images are drawn from in proportion.
        """
        if self.foreground is not None and rng.random() < self.foreground.share:
            number, voxel = self.foreground.draw(rng)
            return self.sources[number], self.about(self.sources[number], voxel)
        if self.labelled is not None:
            number, voxel = self.labelled.draw(rng)
            return self.sources[number], self.about(self.sources[number], voxel + self._aside(rng))
        voxels = np.array([source.seen.n_voxels for source in self.sources], dtype=np.float64)
        source = self.sources[int(rng.choice(len(self.sources), p=voxels / voxels.sum()))]
        return source, self.place(source, rng)

    def _aside(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return by how much a core may be moved so that its central voxel lies anywhere in it."""
        return np.array([n // 2 - int(rng.integers(n)) for n in self.core])

    def about(self, source: Source, voxel: NDArray[np.int64]) -> Box:
        """Return the core around a voxel of the region, centred on it as far as the region's border lets."""
        start = []
        for at, (first, last), n in zip(voxel.tolist(), self._starts(source), self.core, strict=True):
            start.append(min(max(at - n // 2, first), last))
        return self._core(tuple(start))

    def place(self, source: Source, rng: np.random.Generator) -> Box:
        """Return a core anywhere in the region; where the region is smaller than it, one that holds the region."""
        return self._core(tuple(int(rng.integers(first, last + 1)) for first, last in self._starts(source)))

    def batch(self, n: int, rng: np.random.Generator) -> list[Patch]:
        """Return ``n`` random patches."""
        return [self.draw(rng) for _ in range(n)]

    def class_counts(self) -> NDArray[np.int64]:
        """Return how many voxels of the regions are of each class, read block by block."""
        counts = np.zeros(len(self.class_values), np.int64)
        for _, _, found in self._labelled():
            counts += np.bincount(found[found != IGNORED], minlength=len(counts))
        return counts

    def _labelled(self) -> Iterator[tuple[int, Box, Classes]]:
        """Yield all regions block by block: the number of the source, the box, the classes in it."""
        for number, source in enumerate(self.sources):
            seen = source.seen
            for block in BlockGrid(seen.shape, self.core):
                box = block.core.shift(seen.start)
                yield number, box, self._seen_classes(source, box)

    def _apart(self, classes: Classes) -> list[Classes]:
        """Return classes of which each voxel has one; those of overlapping labels one after the other."""
        return [*label_by_label(classes, self.n_overlapping)] if self.n_overlapping else [classes]

    def _starts(self, source: Source) -> list[tuple[int, int]]:
        """Return the first and the last start of a core along every axis, in the region or around all of it."""
        pairs = zip(source.seen.start, source.seen.stop, self.core, strict=True)
        return [(min(a, b - n), max(a, b - n)) for a, b, n in pairs]

    def _reached(self, box: Box, turn: Orientation, field: Field | None) -> Box:
        """Return what a field looks up for a box that will be turned first."""
        if field is None:
            return box
        across = ((0, 0),) * (box.ndim - self.n_axes)
        turned = tuple(box.shape[axis] for axis in turn.order)
        margins = turn.before((*across, *field.margins(turned[-self.n_axes :])))
        return Box(
            tuple(a - m for a, (m, _) in zip(box.start, margins, strict=True)),
            tuple(b + m for b, (_, m) in zip(box.stop, margins, strict=True)),
        )

    def _classes(self, source: Source, box: Box) -> Classes:
        """Return the classes in a box, IGNORED outside the region and where nobody has labelled."""
        labels, inside = read_mirrored(source.labels, box), box.intersect(source.region)
        if inside == box:
            return self._of_values(labels)
        slices = inside.inside(box)
        classes = self._of_values(labels[slices])
        y = np.full(box.shape, IGNORED, classes.dtype)
        y[slices] = classes
        return y

    def _of_values(self, labels: NDArray[Any]) -> Classes:
        """Return the classes of label values, IGNORED where nobody has labelled; a few are counted, not searched."""
        if self.n_overlapping:
            return labels
        if len(self.class_values) <= _FEW_CLASSES:
            found = np.zeros(labels.shape, np.int16)
            for value in self.class_values[:-1]:
                found += labels > value
        elif labels.dtype.itemsize == 1 and labels.size > len(_BYTES):
            return self._of_values(_BYTES.view(labels.dtype)).take(labels.view(np.uint8))
        else:
            found = np.searchsorted(self.class_values, labels).astype(np.int16)
        if self.ignore is not None:
            found[labels == self.ignore] = IGNORED
        return found

    def _seen_classes(self, source: Source, box: Box) -> Classes:
        """Return the classes in a box of voxels that the network sees."""
        if not source.steps:
            return self._classes(source, box)
        at = [nearest(a, b, step) for a, b, step in zip(box.start, box.stop, source.steps, strict=True)]
        around = Box(tuple(int(i[0]) for i in at), tuple(int(i[-1]) + 1 for i in at))
        return self._classes(source, around)[np.ix_(*(i - i[0] for i in at))]

    def _core(self, start: tuple[int, ...]) -> Box:
        return Box(start, tuple(a + n for a, n in zip(start, self.core, strict=True)))
