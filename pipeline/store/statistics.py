"""Intensity statistics of a scan from a streaming histogram: exact for integers of up to 16 bits, mergeable, bounded.

Other dtypes are counted in bins that keep the 20 leading bits of a float32 (sign, exponent and 11 of 23 bits of
mantissa), ordered as numbers, so that the range need not be known beforehand: percentiles are then within 0.05 % of
their own value. Minimum and maximum are exact, mean and standard deviation are
summed without cancellation (Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115) for every dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import fsum, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError, ScanError

PERCENTILES = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 25.0, 50.0, 75.0, 95.0, 97.0, 98.0, 99.0, 99.5, 99.8, 99.9)
_KEPT_BITS = 20


class Normalisation(StrEnum):
    """How intensities are brought to the network's scale; fixed per scan before the first block."""

    ZSCORE = "zscore"  # mean 0, standard deviation 1
    PERCENTILE = "percentile"  # 1st to 99th percentile, or two others, become 0 to 1
    RANGE = "range"  # minimum to maximum become 0 to 1
    NONE = "none"  # intensities as they are
    DTYPE = "dtype"  # the range of the integers that the image is stored in becomes 0 to 1
    WINDOW = "window"  # given limits, in Hounsfield units, say, become 0 and 1; what is outside is clamped to them
    ZSCORE_SLICEWISE = "zscore-slicewise"  # the z-score of each slice by itself, for 2-D networks


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Statistics of one channel of a scan, in the scan's own intensity units."""

    count: int
    minimum: float
    maximum: float
    mean: float
    std: float
    percentiles: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as a JSON object."""
        return {
            "count": self.count, "min": self.minimum, "max": self.maximum, "mean": self.mean, "std": self.std,
            "percentiles": {f"{p:g}": v for p, v in self.percentiles},
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ChannelStatistics:
        """Return the statistics that ``to_json`` wrote."""
        percentiles = tuple((float(p), float(v)) for p, v in document["percentiles"].items())
        return cls(
            int(document["count"]), float(document["min"]), float(document["max"]), float(document["mean"]),
            float(document["std"]), percentiles,
        )


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of one channel of one block; histograms add up to the whole scan's in any order.

    Attributes
    ----------
    keys : uint32, ascending bin numbers; counts : int64 of the same length
    total, spread : sum of the intensities, and sum of their squared distances from the block's own mean
    """

    dtype: np.dtype[Any]
    keys: NDArray[np.uint32]
    counts: NDArray[np.int64]
    minimum: float
    maximum: float
    total: float
    spread: float

    @classmethod
    def of(cls, voxels: NDArray[Any]) -> Histogram:
        """Return the histogram of an array of any shape; what is no number of float32 is refused."""
        flat = voxels.ravel()
        if flat.dtype.kind == "f" and not (np.abs(flat) <= np.finfo(np.float32).max).all():
            raise ScanError(
                "intensities must be finite numbers that fit float32, got NaN, infinity or beyond 3.4e38; "
                "replace them before ingest"
            )
        keys, counts = _counted(_keys(flat), dtype=flat.dtype)
        # where every intensity has a bin of its own, the bins tell all, several times as fast as the voxels do
        values = keys.astype(np.float64) + _lowest(flat.dtype) if _is_exact(flat.dtype) else flat.astype(np.float64)
        n = counts if _is_exact(flat.dtype) else np.int64(1)
        total = float((n * values).sum())
        return cls(
            flat.dtype, keys, counts, float(values.min()), float(values.max()), total,
            float((n * np.square(values - total / flat.size)).sum()),
        )


class _Channel:
    """The sum of one channel's histograms so far."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.counts = np.zeros(_n_bins(dtype), dtype=np.int64)
        self.parts: list[tuple[int, float, float]] = []
        self.minimum, self.maximum = np.inf, -np.inf

    def add(self, h: Histogram) -> None:
        """Add the histogram of one more block."""
        self.counts[h.keys] += h.counts
        self.minimum, self.maximum = min(self.minimum, h.minimum), max(self.maximum, h.maximum)
        self.parts.append((int(h.counts.sum()), h.total, h.spread))

    def statistics(self) -> ChannelStatistics:
        """Return the statistics of all blocks."""
        n = int(self.counts.sum())
        mean = fsum(total for _, total, _ in self.parts) / n
        variance = fsum(spread + m * (total / m - mean) ** 2 for m, total, spread in self.parts) / n
        points = tuple(
            (p, _percentile(self.counts, self.dtype, p, self.minimum, self.maximum)) for p in PERCENTILES
        )
        return ChannelStatistics(n, self.minimum, self.maximum, mean, sqrt(variance), points)


def merge(blocks: Iterable[tuple[Histogram, ...]]) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel from the histograms of all blocks, each read once.

    The same for every order of integer scans, to 1e-15 for float ones.
    """
    channels: tuple[_Channel, ...] = ()
    for histograms in blocks:
        channels = channels or tuple(_Channel(h.dtype) for h in histograms)
        for channel, h in zip(channels, histograms, strict=True):
            channel.add(h)
    if not channels:
        raise ArgumentError("statistics need at least one block, got none; ingest the scan first")
    return tuple(channel.statistics() for channel in channels)


def _counted(keys: NDArray[Any], *, dtype: np.dtype[Any]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the bins that occur, ascending, and how often; counting is many times faster than sorting.

    Bytes are counted in pairs: NumPy takes as long for each number, whatever its size.
    """
    if keys.dtype == np.uint8 and keys.size > _n_bins(dtype):
        pairs = np.bincount(keys[: keys.size // 2 * 2].view(np.uint16), minlength=1 << 16).reshape(256, 256)
        every = np.bincount(keys[keys.size // 2 * 2 :], minlength=256) + pairs.sum(0) + pairs.sum(1)
    else:
        every = np.bincount(keys, minlength=_n_bins(dtype))
    found = np.flatnonzero(every).astype(np.uint32)
    return found, every[found].astype(np.int64)


def _is_exact(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iub" and dtype.itemsize <= 2


def _n_bins(dtype: np.dtype[Any]) -> int:
    return 1 << (16 if _is_exact(dtype) else _KEPT_BITS)


def _lowest(dtype: np.dtype[Any]) -> int:
    """Return the intensity of the first bin, of a type whose intensities have a bin each."""
    return np.iinfo(np.int16).min if dtype.kind == "i" else 0


def _keys(flat: NDArray[Any]) -> NDArray[Any]:
    """Return bin numbers that are ordered as the intensities are."""
    if _is_exact(flat.dtype):
        return flat if flat.dtype.kind != "i" else flat.astype(np.int32) - _lowest(flat.dtype)
    bits = flat.astype(np.float32).view(np.uint32)
    negative = (bits >> np.uint32(31)).astype(bool)
    ordered = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(32 - _KEPT_BITS)).astype(np.uint32)


def _value(key: int, dtype: np.dtype[Any]) -> float:
    """Return the intensity in the middle of a bin."""
    if _is_exact(dtype):
        return float(key + _lowest(dtype))
    ordered = np.uint32((key << (32 - _KEPT_BITS)) + (1 << (31 - _KEPT_BITS)))
    negative = not ordered >> np.uint32(31)
    bits = ~ordered if negative else ordered & np.uint32((1 << 31) - 1)
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def _percentile(counts: NDArray[np.int64], dtype: np.dtype[Any], p: float, minimum: float, maximum: float) -> float:
    """Return the smallest intensity that at least ``p`` percent of the voxels do not exceed."""
    below = np.cumsum(counts)
    key = int(np.searchsorted(below, p / 100.0 * below[-1]))
    return min(max(_value(key, dtype), minimum), maximum)
