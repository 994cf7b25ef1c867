"""Overlapping: several label volumes of an image as one of codes, since a voxel may have any number of labels.

    code    bits 0 to 14: which labels the voxel has    bits 15 to 29: of which nobody knows

Patches are turned, cut and warped as codes, and told apart where they are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.mirror import Sliceable

MOST_LABELS = 15
UNKNOWN = -100  # where nobody knows of any label


@dataclass(frozen=True, slots=True)
class Overlapping:
    """Labels as codes, int32; UNKNOWN where no label is known.

    Attributes
    ----------
    labels : each int8 (*spatial): 1 where a voxel has the label, 0 where not, -1 where nobody knows
    """

    labels: tuple[Sliceable, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.labels[0].shape

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.int32]:
        """Return the codes under the slices."""
        found = [np.asarray(label[index]) for label in self.labels]
        codes = np.zeros(found[0].shape, np.int32)
        for number, each in enumerate(found):
            codes |= (each == 1).astype(np.int32) << number
            codes |= (each < 0).astype(np.int32) << (MOST_LABELS + number)
        codes[np.logical_and.reduce([each < 0 for each in found])] = UNKNOWN
        return codes


def label_by_label(codes: NDArray[np.signedinteger[Any]], n_labels: int) -> list[NDArray[np.int16]]:
    """Return where voxels have no label, 0, and where each, its number from 1; -1 elsewhere."""
    has = [(codes >= 0) & (codes >> number & 1 == 1) for number in range(n_labels)]
    none = (codes == 0).astype(np.int16) - 1
    return [none, *(np.where(each, np.int16(number), np.int16(-1)) for number, each in enumerate(has, start=1))]


def first_of(codes: NDArray[np.signedinteger[Any]]) -> NDArray[np.int64]:
    """Return the first label of each voxel, from 1, to be drawn; 0 for none, UNKNOWN where no label is known."""
    lowest = (codes & -codes) & (2**MOST_LABELS - 1)
    return np.where(codes < 0, UNKNOWN, np.ceil(np.log2(lowest + 1)).astype(np.int64))
