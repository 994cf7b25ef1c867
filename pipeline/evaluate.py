"""Evaluate: predicted labels, or values, against the truth, block by block, from tables that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compare import Compared, compare, holds_values, is_labels, may_be_labels
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.errors import InputError, ScanError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import Sliceable
from pipeline.labels.metrics import ContingencyTable, Figures
from pipeline.labels.whole import as_labels
from pipeline.scans.backend import open_scan
from pipeline.store.labels import open_labels, read_labels
from pipeline.store.location import Location

_BLOCK = {2: (2048, 2048), 3: (128, 256, 256)}
_LARGEST_CLASSES = 256


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Figures of predicted classes against the truth.

    Attributes
    ----------
    classes : names, in the order of the figures
    values : what each class is called in the truth
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    n_voxels: int
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object; what is 0/0 is null."""
        document = self.figures.to_json()
        named = zip(self.classes, self.values, document.pop("classes"), strict=True)
        per_class = [{"class": name, "value": value} | each for name, value, each in named]
        return {"voxels": self.n_voxels} | document | {"classes": per_class}


@dataclass(frozen=True, slots=True)
class Volume:
    """Integer labels of any origin, to be sliced; ``classes`` and ``class_values`` where they are known."""

    array: Sliceable
    path: str
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes."""
        return tuple(self.array.shape)

    def read(self, box: Box) -> NDArray[Any]:
        """Return the labels of a box.

        Raises
        ------
        ScanError : they are stored as floats, and one is no whole number.
        """
        voxels = np.asarray(self.array[box.slices])
        return as_labels(voxels, axes="zyx"[-box.ndim :], start=box.start, path=self.path)


def evaluate(predicted: str, truth: str, *, watch: Watcher = UNWATCHED) -> Evaluated | Compared:
    """Compare two volumes of the same shape, each ``IMAGE.zarr/labels/NAME`` or a scan file of integers: by classes.

    Predictions, images, and scans of floats or with channels are compared by their values, but floats with a label
    volume by classes.

    Where the predicted labels know what their classes were called in training (0 and 255, say), a truth that is
    written in those values is translated.

    Raises
    ------
    InputError : the volumes cannot be compared.
    """
    are_labels = is_labels(predicted) or (is_labels(truth) and may_be_labels(predicted))
    if not are_labels and (holds_values(predicted) or holds_values(truth)):
        return compare(predicted, truth, watch=watch)
    ours, theirs = open_volume(predicted), open_volume(truth)
    if ours.shape != theirs.shape:
        raise ScanError(
            f"predicted labels and truth must have one shape, got {ours.shape} and {theirs.shape}; "
            "compare labels of the same scan"
        )
    grid = BlockGrid(ours.shape, _BLOCK[len(ours.shape)])
    values, names = _classes(ours, theirs, grid)
    ours_values = tuple(range(len(values))) if ours.classes else values
    watch.begin("evaluate", n_blocks=len(grid), n_done=0)
    table = ContingencyTable.empty(len(values))
    for block in grid:
        table = table + ContingencyTable.of(
            ours.read(block.core), theirs.read(block.core), values=values, predicted_values=ours_values
        )
        watch.advance(BlockRecord(block.index, block.core.n_voxels, 0.0, 0.0, 0.0))
    return Evaluated(names, values, int(table.counts.sum()), table.figures())


def open_volume(path: str) -> Volume:
    """Return the integer labels at ``IMAGE.zarr/labels/NAME`` or in a scan file."""
    location = Location(str(path))
    if read_labels(location) is not None:
        labels = open_labels(location)
        return Volume(labels.array, path, labels.classes, labels.class_values)
    scan = open_scan(path)
    if "c" in scan.dims:
        axes = "".join(map(str, scan.dims))
        raise ScanError(f"labels must have one value per voxel, got axes {axes} in {path}; save one channel")
    return Volume(scan, path)


def _classes(ours: Volume, theirs: Volume, grid: BlockGrid) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the values of the classes in the truth, and their names."""
    found = _values(theirs, grid)
    indices = tuple(range(len(ours.classes)))
    if ours.classes:
        # labels that name their own classes are written in indices, whatever their model's classes were called
        for values in (indices,) if theirs.classes else (ours.class_values, indices):
            if found <= set(values):
                return tuple(values), ours.classes
        raise InputError(
            f"the truth must hold the classes {ours.class_values} or {indices}, got {sorted(found)[:10]} in "
            f"{theirs.path}; translate its values"
        )
    both = tuple(sorted(found | _values(ours, grid)))
    return both, tuple(map(str, both))


def _values(volume: Volume, grid: BlockGrid) -> set[int]:
    """Return all values of a label volume; refuses those that are no classes but instances."""
    found: set[int] = set()
    for block in grid:
        found |= set(map(int, np.unique(volume.read(block.core))))
        if len(found) > _LARGEST_CLASSES:
            raise InputError(
                f"evaluate compares at most {_LARGEST_CLASSES} classes, got more values in {volume.path}; give class "
                "labels, not instances"
            )
    return found
