"""Targets: images that a network is to make of others, such as the clean ones of noisy ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable, read_mirrored
from pipeline.store.statistics import ChannelStatistics

UNKNOWN = 1


@dataclass(frozen=True, slots=True)
class Target:
    """What an image is to become.

    Attributes
    ----------
    array : shape (channels, *spatial)
    windows : (offset, scale) of each channel; the network learns ``(intensity - offset) * scale``
    spans : of each channel, its largest less its smallest intensity: what the error is told in proportion to
    """

    array: Sliceable
    windows: tuple[tuple[float, float], ...]
    spans: tuple[float, ...]

    def values(self, box: Box) -> NDArray[np.float32]:
        """Return what the network is to make of a box of voxels, mirrored outside, (channels, *box.shape)."""
        raw = read_mirrored(self.array, box)
        offset, scale = np.array(self.windows).T.reshape(2, -1, *(1,) * box.ndim)
        values: NDArray[np.float32] = ((raw.astype(np.float64) - offset) * scale).astype(np.float32)
        return values

    @property
    def scaled_spans(self) -> tuple[float, ...]:
        """The spans as the network sees them; one for a channel that is constant."""
        return tuple(span * scale or 1.0 for span, (_, scale) in zip(self.spans, self.windows, strict=True))


@dataclass(frozen=True, slots=True)
class Known:
    """Which voxels of a target count, as labels, uint8 (*spatial): 0, or UNKNOWN where a channel is ``ignore``.

    Attributes
    ----------
    target : shape (channels, *spatial)
    ignore : intensity of voxels that nobody knows; None: all count
    """

    target: Sliceable
    ignore: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(self.target.shape[1:])

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.uint8]:
        """Return the labels under the slices."""
        if self.ignore is None:
            shape = (len(range(*part.indices(n))) for part, n in zip(index, self.shape, strict=True))
            return np.zeros(tuple(shape), np.uint8)
        voxels: NDArray[Any] = np.asarray(self.target[(slice(None), *index)])
        return np.where((voxels == self.ignore).any(axis=0), np.uint8(UNKNOWN), np.uint8(0))


def common_windows(images: Sequence[Sequence[ChannelStatistics]]) -> tuple[tuple[float, float], ...]:
    """Return (offset, scale) of each channel that bring all images together to mean 0 and standard deviation 1.

    One for all, since a network cannot tell by which of them its values are to be brought back. By the stored
    statistics of each image, added up (Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115).
    """
    windows = []
    for channel in zip(*images, strict=True):
        n = sum(each.count for each in channel)
        mean = sum(each.count * each.mean for each in channel) / n
        variance = sum(each.count * (each.std**2 + (each.mean - mean) ** 2) for each in channel) / n
        windows.append((mean, 1 / sqrt(variance) if variance > 0 else 1.0))
    return tuple(windows)
