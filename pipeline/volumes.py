"""Volumes: integer labels of any origin, a label volume or a scan file, to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.geometry.mirror import Sliceable
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

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        """Return the labels under the slices."""
        return np.asarray(self.array[index])


def open_volume(path: str) -> Volume:
    """Return the integer labels at ``IMAGE.zarr/labels/NAME`` or in a scan file."""
    location = Location(str(path))
    if read_labels(location) is not None:
        labels = open_labels(location)
        return Volume(labels.array, path, labels.classes, labels.class_values)
    scan = open_scan(path)
    if scan.dtype.kind not in "iub" or "c" in scan.dims:
        raise ScanError(
            f"labels must be integers without channels, got {scan.dtype} with axes {''.join(map(str, scan.dims))} in "
            f"{path}; convert them first"
        )
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
