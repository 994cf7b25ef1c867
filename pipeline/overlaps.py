"""Overlaps: the probabilities of labels that a voxel may have any number of, each label against its own truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.grid import BlockGrid
from pipeline.labels.metrics import ClassFigures, ContingencyTable
from pipeline.store.arrays import read_attributes
from pipeline.store.location import Location
from pipeline.store.probabilities import Probabilities, open_probabilities
from pipeline.volumes import BLOCK, Volume, check_same_shape, nothing_counts, open_volume

_THRESHOLD = 0.5
_UNKNOWN = 2  # beside 0 and 1, where a voxel does not have a label and where it has


@dataclass(frozen=True, slots=True)
class LabelEvaluated:
    """Figures of one label.

    Attributes
    ----------
    n_voxels, n_ignored : that count, and that do not; None where none were to be ignored
    """

    label: str
    n_voxels: int
    n_ignored: int | None
    figures: ClassFigures

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object; what is 0/0 is null."""
        ignored = {} if self.n_ignored is None else {"voxels_ignored": self.n_ignored}
        return {"label": self.label} | self.figures.to_json() | {"voxels": self.n_voxels} | ignored


@dataclass(frozen=True, slots=True)
class OverlappingEvaluated:
    """Figures of labels that overlap; a voxel has each whose probability exceeds the threshold."""

    threshold: float
    labels: tuple[LabelEvaluated, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return {"threshold": self.threshold, "labels": [each.to_json() for each in self.labels]}


def holds_probabilities(path: str) -> bool:
    """Whether probabilities of ours lie here."""
    return bool(read_attributes(Location(str(path))).get("haloseg", {}).get("kind") == "probabilities")


def evaluate_overlapping(
    predicted: str, truths: Sequence[str], *, channels: Sequence[str] = (), threshold: float | None = None,
    ignore: int | None = None, watch: Watcher = UNWATCHED,
) -> OverlappingEvaluated:  # fmt: skip
    """Compare labels of ``IMAGE.zarr/probabilities/NAME`` with a truth of each: where it is not zero is the label.

    Parameters
    ----------
    truths : ``IMAGE.zarr/labels/NAME`` or scan files of integers, of the image's shape
    channels : names of the labels, in the order of the truths; all of them unless told
    threshold : which a probability must exceed, 0.5 unless told
    ignore : voxels with this value in the truth of a label do not count for it

    Raises
    ------
    InputError : they cannot be compared.
    """
    made = open_probabilities(predicted)
    threshold = _THRESHOLD if threshold is None else threshold
    if not 0 <= threshold < 1:
        raise ArgumentError(f"a threshold must be at least 0 and under 1, got {threshold}; use 0.5")
    asked = _asked(made, channels, n_truths=len(truths))
    shape, volumes = made.spatial_shape, [open_volume(path) for path in truths]
    for truth in volumes:
        check_same_shape(shape, truth.shape)
    grid = BlockGrid(shape, BLOCK[len(shape)])
    watch.begin("evaluate", n_blocks=len(grid) * len(asked), n_done=0)
    labels = list[LabelEvaluated]()
    for name, truth in zip(asked, volumes, strict=True):
        table = _table(made, name, truth, grid, threshold=threshold, ignore=ignore, watch=watch)
        n_voxels = int(table.counts.sum())
        if not n_voxels:
            raise nothing_counts(truth.path, ignore=ignore)
        n_ignored = None if ignore is None else prod(shape) - n_voxels
        labels.append(LabelEvaluated(name, n_voxels, n_ignored, table.figures().classes[1]))
    return OverlappingEvaluated(threshold, tuple(labels))


def _table(
    made: Probabilities, name: str, truth: Volume, grid: BlockGrid, *, threshold: float, ignore: int | None,
    watch: Watcher,
) -> ContingencyTable:  # fmt: skip
    """Return how many voxels have the label, 1, and have it not, 0, in the truth and as predicted."""
    array, channel, table = made.array, made.channels.index(name), ContingencyTable.empty(2)
    for block in grid:
        labels = truth.read(block.core)
        (likely,) = np.asarray(array[slice(channel, channel + 1), *block.core.slices])
        known = (labels != 0).astype(np.uint8)
        if ignore is not None:
            known[labels == ignore] = _UNKNOWN
        table += ContingencyTable.of(likely > threshold, known, values=(0, 1), ignore=_UNKNOWN)
        watch.advance(BlockRecord(block.index, block.core.n_voxels, 0.0, 0.0, 0.0))
    return table


def _asked(made: Probabilities, names: Sequence[str], *, n_truths: int) -> tuple[str, ...]:
    """Return the labels of these names, or all; refuses other names, and another number of truths."""
    if not made.overlap:
        raise StoreError(
            f"labels that are compared one by one must overlap, got those of classes ({', '.join(made.channels)}) at "
            f"{made.location}; compare {made.location.parent.parent / 'labels' / made.location.name} instead"
        )
    if strange := [name for name in names if name not in made.channels]:
        raise ArgumentError(
            f"a channel must be one of {', '.join(made.channels)}, got {', '.join(strange)} for {made.location}; name "
            "one of those"
        )
    asked = tuple(names) or made.channels
    if len(asked) != n_truths:
        raise ArgumentError(
            f"each label needs a truth, in the same order, got {n_truths} for {', '.join(asked)}; name as many, or "
            "fewer labels with --channel"
        )
    return asked
