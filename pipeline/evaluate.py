"""Evaluate: predicted labels, or values, against the truth, block by block, from tables that add up."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pipeline.compare import Compared, compare, holds_values, is_labels, may_be_labels
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.errors import ArgumentError, InputError
from pipeline.geometry.grid import BlockGrid
from pipeline.labels.metrics import ContingencyTable, Figures
from pipeline.overlaps import evaluate_overlapping, holds_probabilities
from pipeline.volumes import BLOCK, Volume, check_same_shape, nothing_counts, open_volume

_LARGEST_CLASSES = 256


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Figures of predicted classes against the truth.

    Attributes
    ----------
    classes : names, in the order of the figures
    values : what each class is called in the truth
    n_voxels, n_ignored : that count, and that do not; None where none were to be ignored
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    n_voxels: int
    figures: Figures
    n_ignored: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object; what is 0/0 is null."""
        document = self.figures.to_json()
        named = zip(self.classes, self.values, document.pop("classes"), strict=True)
        per_class = [{"class": name, "value": value} | each for name, value, each in named]
        ignored = {} if self.n_ignored is None else {"voxels_ignored": self.n_ignored}
        return {"voxels": self.n_voxels} | ignored | document | {"classes": per_class}


def evaluate(
    predicted: str, truth: str, *, ignore: int | None = None, watch: Watcher = UNWATCHED
) -> Evaluated | Compared:
    """Compare two volumes of the same shape, each ``IMAGE.zarr/labels/NAME`` or a scan file of integers: by classes.

    Predictions, images, and scans of floats or with channels are compared by their values, but floats with a label
    volume by classes.

    Where the predicted labels know what their classes were called in training (0 and 255, say), a truth that is
    written in those values is translated.

    Parameters
    ----------
    ignore : voxels with this value in the truth, or in a channel of it, do not count, whatever was predicted there

    Raises
    ------
    InputError : the volumes cannot be compared.
    """
    are_labels = is_labels(predicted) or (is_labels(truth) and may_be_labels(predicted))
    if not are_labels and (holds_values(predicted) or holds_values(truth)):
        return compare(predicted, truth, ignore=ignore, watch=watch)
    ours, theirs = open_volume(predicted), open_volume(truth)
    check_same_shape(ours.shape, theirs.shape)
    grid = BlockGrid(ours.shape, BLOCK[len(ours.shape)])
    values, names = _classes(ours, theirs, grid, ignore=ignore)
    ours_values = tuple(range(len(values))) if ours.classes else values
    watch.begin("evaluate", n_blocks=len(grid), n_done=0)
    table = ContingencyTable.empty(len(values))
    for block in grid:
        table = table + ContingencyTable.of(
            ours.read(block.core), theirs.read(block.core), values=values, predicted_values=ours_values, ignore=ignore
        )
        watch.advance(BlockRecord(block.index, block.core.n_voxels, 0.0, 0.0, 0.0))
    n_voxels = int(table.counts.sum())
    return Evaluated(
        names, values, n_voxels, table.figures(), None if ignore is None else prod(ours.shape) - n_voxels
    )


def _classes(
    ours: Volume, theirs: Volume, grid: BlockGrid, *, ignore: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the values of the classes in the truth, and their names."""
    found = _values(theirs, grid, truth=theirs, ignore=ignore)
    if not found:
        raise nothing_counts(theirs.path, ignore=ignore)
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
    both = tuple(sorted(found | _values(ours, grid, truth=theirs, ignore=ignore)))
    return both, tuple(map(str, both))


def _values(volume: Volume, grid: BlockGrid, *, truth: Volume, ignore: int | None) -> set[int]:
    """Return all values that a label volume has where it counts; refuses those that are no classes but instances."""
    found: set[int] = set()
    for block in grid:
        labels = volume.read(block.core)
        if ignore is not None:
            labels = labels[(labels if volume is truth else truth.read(block.core)) != ignore]
        found |= set(map(int, np.unique(labels)))
        if len(found) > _LARGEST_CLASSES:
            raise InputError(
                f"evaluate compares at most {_LARGEST_CLASSES} classes, got more values in {volume.path}; give class "
                "labels, not instances"
            )
    return found


def command(args: Namespace, *, watch: Watcher) -> dict[str, Any]:
    """Compare as the command line asks."""
    if holds_probabilities(args.predicted) and (args.channel or not holds_values(args.truths[0])):
        return evaluate_overlapping(
            args.predicted, args.truths, channels=args.channel, threshold=args.threshold, ignore=args.ignore,
            watch=watch,
        ).to_json()  # fmt: skip
    if len(args.truths) > 1 or args.channel or args.threshold is not None:
        raise ArgumentError(
            "several truths, --channel and --threshold need probabilities of labels that overlap, got none at "
            f"{args.predicted}; give IMAGE/probabilities/NAME, which segment --probabilities writes"
        )
    return evaluate(args.predicted, args.truths[0], ignore=args.ignore, watch=watch).to_json()
