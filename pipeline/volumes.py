"""Volumes: integer labels of any origin, a label volume or a scan file, to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable
from pipeline.labels.whole import as_labels
from pipeline.scans.backend import open_scan
from pipeline.store.labels import open_labels, read_labels
from pipeline.store.location import Location

BLOCK = {2: (2048, 2048), 3: (128, 256, 256)}


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


def check_same_shape(predicted: tuple[int, ...], truth: tuple[int, ...]) -> None:
    """Refuse to compare volumes of two shapes."""
    if predicted != truth:
        raise ScanError(
            f"predicted labels and truth must have one shape, got {predicted} and {truth}; compare labels of the same "
            "scan"
        )


def nothing_counts(truth: str, *, ignore: int | None) -> ScanError:
    """Return the error of a truth of which all is to be ignored."""
    return ScanError(f"the truth must have voxels that count, got {ignore} in all of {truth}; ignore another value")
