"""Metrics of class labels, all from one contingency table: tables of blocks add up to the table of the volume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Figures of one class against the truth, each 0 to 1, or NaN where it would be 0/0.

    Attributes
    ----------
    dice : 2 |P and T| / (|P| + |T|), also called F1 (Dice 1945, doi:10.2307/1932409)
    jaccard : |P and T| / |P or T|, also called IoU (Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x)
    precision : |P and T| / |P|; NaN where the class was never predicted
    recall : |P and T| / |T|; NaN where the class is not in the truth
    n_truth, n_predicted : voxels of the class
    """

    dice: float
    jaccard: float
    precision: float
    recall: float
    n_truth: int
    n_predicted: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object, with null for NaN, which JSON does not know."""
        return _without_nan(asdict(self))


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of all classes.

    A class that is in neither volume has no Dice and no Jaccard (0/0): it is NaN and left out of the means, so that a
    class which happens not to be in a scan neither helps nor hurts. A class in one of the two counts as 0.

    Attributes
    ----------
    classes : one entry per class, in the table's order
    accuracy : voxels with the right class, of all that count
    pixel_error : 1 - accuracy
    mean_dice, mean_jaccard, mean_precision, mean_recall : over the classes that are not NaN; NaN without any
    """

    classes: tuple[ClassFigures, ...]
    accuracy: float
    pixel_error: float
    mean_dice: float
    mean_jaccard: float
    mean_precision: float
    mean_recall: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object, with null for NaN, which JSON does not know."""
        return _without_nan(asdict(self)) | {"classes": [each.to_json() for each in self.classes]}


@dataclass(frozen=True, slots=True, eq=False)
class ContingencyTable:
    """How many voxels of each true class were predicted as each class.

    Attributes
    ----------
    counts : int64, shape (classes, classes), axes (truth, predicted)
    """

    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, n_classes: int) -> ContingencyTable:
        """Return the table of no voxels, to add others to."""
        if n_classes < 1:
            raise ArgumentError(f"a table needs at least 1 class, got {n_classes}; use 1 or more")
        return cls(np.zeros((n_classes, n_classes), dtype=np.int64))

    @classmethod
    def of(
        cls, predicted: NDArray[Any], truth: NDArray[Any], *, values: tuple[int, ...],
        predicted_values: tuple[int, ...] | None = None, ignore: int | None = None,
    ) -> ContingencyTable:  # fmt: skip
        """Return the table of two label arrays of the same shape and any number of axes.

        Parameters
        ----------
        predicted, truth : integers or booleans
        values : what each class is called in the truth, (0, 255) say
        predicted_values : what each class is called in the prediction, if that differs
        ignore : voxels with this value in the truth do not count, whatever was predicted there

        Raises
        ------
        ArgumentError : other dtypes, different shapes, a value twice, or a voxel of none of the classes.
        """
        if predicted.shape != truth.shape:
            raise ArgumentError(
                f"predicted labels and truth must have one shape, got {predicted.shape} and {truth.shape}; "
                "compare labels of the same scan"
            )
        _check_labels(predicted, what="predicted labels")
        _check_labels(truth, what="truth")
        predicted, truth = predicted.ravel(), truth.ravel()
        if ignore is not None:
            counting = truth != ignore
            predicted, truth = predicted[counting], truth[counting]
        predicted_values = values if predicted_values is None else predicted_values
        n = len(values)
        if len(predicted_values) != n:
            raise ArgumentError(
                f"prediction and truth must have as many classes, got {predicted_values} and {values}; name them all"
            )
        rows = _class_of(truth, values, what="truth")
        columns = _class_of(predicted, predicted_values, what="predicted labels")
        return cls(np.bincount(rows * n + columns, minlength=n * n).reshape(n, n).astype(np.int64))

    def __add__(self, other: ContingencyTable) -> ContingencyTable:
        if self.counts.shape != other.counts.shape:
            raise ArgumentError(
                f"tables must be of the same classes to add, got {len(self.counts)} and {len(other.counts)} classes; "
                "count both with the same values"
            )
        return ContingencyTable(self.counts + other.counts)

    def figures(self) -> Figures:
        """Return the figures of every class and of all; NaN where there are no voxels."""
        classes = tuple(self._class_figures())
        total = int(self.counts.sum())
        right = int(np.trace(self.counts))
        return Figures(
            classes, _ratio(right, total), _ratio(total - right, total),
            _mean(each.dice for each in classes), _mean(each.jaccard for each in classes),
            _mean(each.precision for each in classes), _mean(each.recall for each in classes),
        )  # fmt: skip

    def _class_figures(self) -> Iterator[ClassFigures]:
        for at, (truth, predicted) in enumerate(zip(self.counts.sum(1), self.counts.sum(0), strict=True)):
            both, n_truth, n_predicted = int(self.counts[at, at]), int(truth), int(predicted)
            yield ClassFigures(
                _ratio(2 * both, n_truth + n_predicted), _ratio(both, n_truth + n_predicted - both),
                _ratio(both, n_predicted), _ratio(both, n_truth), n_truth, n_predicted,
            )  # fmt: skip


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else nan


def _mean(figures: Iterable[float]) -> float:
    known = [each for each in figures if not isnan(each)]
    return sum(known) / len(known) if known else nan


def _without_nan(document: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and isnan(value) else value for key, value in document.items()}


def _check_labels(labels: NDArray[Any], *, what: str) -> None:
    if labels.dtype.kind not in "iub":
        raise ArgumentError(f"{what} must be integers, got {labels.dtype}; convert them first")


def _class_of(labels: NDArray[Any], values: tuple[int, ...], *, what: str) -> NDArray[np.intp]:
    """Return the position of each label among ``values``; a label that is none of them is refused."""
    if not values or len(set(values)) != len(values):
        raise ArgumentError(f"each class of the {what} needs a value of its own, got {values}; name each once")
    labels = labels.astype(np.uint8) if labels.dtype.kind == "b" else labels
    positions = _looked_up(labels, values) if labels.dtype.itemsize <= 2 else _searched(labels, values)
    strange = labels[positions < 0]
    if strange.size:
        got = np.unique(strange)[:10].tolist()
        raise ArgumentError(f"the {what} must hold the classes {values} alone, got also {got}; translate them")
    return positions


def _looked_up(labels: NDArray[Any], values: tuple[int, ...]) -> NDArray[np.intp]:
    """Return the position of each label of at most 16 bits, or -1; a quarter of a search's time."""
    table = np.full(1 << 8 * labels.dtype.itemsize, -1, dtype=np.intp)
    for value, at in _possible(labels.dtype, values):
        table[value] = at  # a negative value counts from the end, as its bits do
    positions: NDArray[np.intp] = table[labels]
    return positions


def _searched(labels: NDArray[Any], values: tuple[int, ...]) -> NDArray[np.intp]:
    """Return the position of each label, or -1."""
    possible = _possible(labels.dtype, values)
    if not possible:
        return np.full(labels.shape, -1, dtype=np.intp)
    known = np.array([value for value, _ in possible], dtype=labels.dtype)
    nearest = np.minimum(np.searchsorted(known, labels), len(known) - 1)
    positions: NDArray[np.intp] = np.array([at for _, at in possible], dtype=np.intp)[nearest]
    positions[known[nearest] != labels] = -1
    return positions


def _possible(dtype: np.dtype[Any], values: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return ascending the values that the dtype can hold and their positions; no voxel has the others."""
    limits = np.iinfo(dtype)
    return sorted((value, at) for at, value in enumerate(values) if limits.min <= value <= limits.max)
