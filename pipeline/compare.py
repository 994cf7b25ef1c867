"""Compare: values against the truth, such as a prediction against the clean image, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import add
from typing import Any

import numpy as np
import xarray as xr

from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import Watcher
from pipeline.errors import ScanError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.labels.deviations import DeviationFigures, Deviations
from pipeline.scans.backend import open_scan
from pipeline.store.image import open_image, read_image
from pipeline.store.labels import read_labels
from pipeline.store.location import Location
from pipeline.store.predictions import read_prediction
from pipeline.store.results import complete
from pipeline.volumes import nothing_counts

_BLOCK = {2: (2048, 2048), 3: (64, 256, 256)}


@dataclass(frozen=True, slots=True)
class Compared:
    """Figures of values against the truth.

    Attributes
    ----------
    n_voxels, n_ignored : that count, and that do not; None where none were to be ignored
    """

    n_voxels: int
    figures: DeviationFigures
    n_ignored: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object; what is 0/0 is null."""
        ignored = {} if self.n_ignored is None else {"voxels_ignored": self.n_ignored}
        return {"voxels": self.n_voxels} | ignored | self.figures.to_json()


@dataclass(frozen=True, slots=True)
class Values:
    """Intensities of any origin, to be read box by box, channels first."""

    array: Any
    shape: tuple[int, ...]
    n_channels: int

    def read(self, box: Box) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the values of a box, shape (channels, *box.shape)."""
        front = (slice(None),) * (len(self.array.shape) - box.ndim)
        return np.asarray(self.array[front + box.slices]).reshape(self.n_channels, *box.shape)


def holds_values(path: str) -> bool:
    """Whether intensities lie here, not labels: a prediction, an image of ours, or a scan of floats or channels."""
    return not is_labels(path) and (not may_be_labels(path) or open_scan(path).dtype.kind == "f")


def may_be_labels(path: str) -> bool:
    """Whether a scan lies here that has one value per voxel, floats perhaps, and is no volume of ours."""
    location = Location(str(path))
    ours = read_prediction(location) is not None or read_image(location) is not None
    return not ours and "c" not in open_scan(path).dims


def is_labels(path: str) -> bool:
    """Whether a label volume of ours lies here."""
    return read_labels(Location(str(path))) is not None


def compare(predicted: str, truth: str, *, ignore: int | None, watch: Watcher) -> Compared:
    """Compare the values of two volumes of the same shape and channels, each a prediction, an image, or a scan.

    Voxels where a channel of the truth is ``ignore`` do not count.

    Raises
    ------
    InputError : the volumes cannot be compared.
    """
    if is_labels(truth):
        raise ScanError(f"values must be compared with values, got labels at {truth}; give the target image")
    ours, theirs = open_values(predicted), open_values(truth)
    if (ours.n_channels, ours.shape) != (theirs.n_channels, theirs.shape):
        raise ScanError(
            f"predicted values and truth must have one shape, got {ours.n_channels} x {ours.shape} and "
            f"{theirs.n_channels} x {theirs.shape}; compare values of the same scan"
        )
    grid, parts = BlockGrid(ours.shape, _BLOCK[len(ours.shape)]), list[Deviations]()
    watch.begin("evaluate", n_blocks=len(grid), n_done=0)
    for block in grid:
        values, want = ours.read(block.core), theirs.read(block.core)
        if ignore is not None:
            counting = (want != ignore).all(axis=0)
            values, want = values[:, counting], want[:, counting]
        if want.size:
            parts.append(Deviations.of(values, want))
        watch.advance(BlockRecord(block.index, block.core.n_voxels, 0.0, 0.0, 0.0))
    if not parts:
        raise nothing_counts(truth, ignore=ignore)
    total = reduce(add, parts)
    return Compared(total.n, total.figures(), None if ignore is None else prod(ours.shape) - total.n)


def open_values(path: str) -> Values:
    """Return the intensities at a path.

    Raises
    ------
    InputError : nothing that can be read lies there, or it is not complete.
    """
    location = Location(str(path))
    if (made := read_prediction(location)) is not None:
        complete(made)
        return Values(made.array, made.spatial_shape, made.n_channels)
    if read_image(location) is not None:
        image = open_image(location)
        return Values(image.array, image.spatial_shape, image.n_channels)
    scan: xr.DataArray = open_scan(path)
    if scan.dtype.kind not in "iufb":
        raise ScanError(f"values must be real numbers, got {scan.dtype} in {path}; convert them first")
    return Values(scan, tuple(scan.sizes[d] for d in scan.dims if d != "c"), scan.sizes.get("c", 1))
