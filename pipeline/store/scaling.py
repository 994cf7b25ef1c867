"""Scaling: how the intensities of an image become a network's numbers, fixed before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError
from pipeline.geometry.mirror import mirror_index
from pipeline.store.moments import SliceStatistics
from pipeline.store.statistics import ChannelStatistics, Normalisation

Limits = tuple[tuple[float, float], ...]
USUAL_PERCENTILES = (1.0, 99.0)
_TAKES_LIMITS = (Normalisation.WINDOW, Normalisation.PERCENTILE)


class Window(NamedTuple):
    """What a network sees of a channel: ``(intensity - offset) * scale``, at least ``low`` and at most ``high``.

    A pair (offset, scale) is a window without limits.
    """

    offset: float
    scale: float
    low: float = -inf
    high: float = inf


@dataclass(frozen=True, slots=True, eq=False)
class SliceWindows:
    """What a network sees of each channel in each slice of a volume, without limits.

    Attributes
    ----------
    offset, scale : float64 (channels, planes)
    """

    offset: NDArray[np.float64] = field(repr=False)
    scale: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, slices: SliceStatistics) -> SliceWindows:
        """Return the windows that bring each slice to mean 0 and deviation 1; a constant one to 0."""
        return cls(slices.mean, 1 / np.where(slices.std > 0, slices.std, 1.0))

    def __len__(self) -> int:
        """Return the number of channels."""
        return len(self.offset)

    def between(self, start: int, stop: int) -> SliceWindows:
        """Return those of the slices ``start`` to ``stop``; see ``of_slices``."""
        at = mirror_index(start, stop, self.offset.shape[1])
        return SliceWindows(self.offset[:, at], self.scale[:, at])


Windows = tuple[Window, ...] | SliceWindows


def of_slices(windows: Windows, start: int, stop: int) -> Windows:
    """Return what is seen of the slices ``start`` to ``stop``, mirrored outside the volume as their voxels are."""
    return windows.between(start, stop) if isinstance(windows, SliceWindows) else windows


def spread_out(windows: Windows, *, n_axes: int) -> tuple[NDArray[np.float64], ...]:
    """Return offset, scale, low and high, float64, each of a shape that fits voxels (channels, *n_axes).

    Windows of slices are those of the voxels' own slices, along the first of the axes.
    """
    if isinstance(windows, SliceWindows):
        if n_axes != 3:
            raise ArgumentError(f"windows of slices need voxels of 3 axes, got {n_axes}; give the slices' axis, too")
        fitting = (*windows.offset.shape, *(1,) * (n_axes - 1))
        limits = (np.full((1,) * len(fitting), end) for end in (-inf, inf))
        return windows.offset.reshape(fitting), windows.scale.reshape(fitting), *limits
    columns = np.array([Window(*window) for window in windows], np.float64).T
    return tuple(column.reshape(-1, *(1,) * n_axes) for column in columns)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How intensities are brought to the network's scale.

    Attributes
    ----------
    normalisation : by which rule
    limits : of WINDOW, what becomes 0 and 1 in the image's own units, one pair for each channel or one for all; of
        PERCENTILE, the two percentiles that do, (1, 99) if empty; of others none
    """

    normalisation: Normalisation = Normalisation.ZSCORE
    limits: Limits = ()

    def __post_init__(self) -> None:
        how = self.normalisation
        if self.limits and how not in _TAKES_LIMITS:
            raise ArgumentError(
                f"limits belong to {' and '.join(_TAKES_LIMITS)}, got {self.limits} for {how}; leave them out"
            )
        if not self.limits and how is Normalisation.WINDOW:
            raise ArgumentError(
                "normalisation window needs its limits in the image's units, got none; set window = [-160, 240], say"
            )
        for low, high in self.limits:
            if not -inf < low < high < inf:
                raise ArgumentError(
                    f"limits must be two numbers, the lower one first, got {low:g} and {high:g}; correct them"
                )
        if how is Normalisation.PERCENTILE and not all(low >= 0 and high <= 100 for low, high in self.limits):
            raise ArgumentError(f"percentiles must be from 0 to 100, got {self.limits[0]}; use 1 and 99")

    @classmethod
    def of(cls, normalisation: Normalisation, *, window: Limits = (), percentiles: tuple[float, ...] = ()) -> Scaling:
        """Return what a recipe's settings say.

        Raises
        ------
        ArgumentError : they do not belong together, or are no limits.
        """
        for name, limits, how in (
            ("window", window, Normalisation.WINDOW), ("percentiles", percentiles, Normalisation.PERCENTILE)
        ):  # fmt: skip
            if limits and normalisation is not how:
                raise ArgumentError(
                    f"{name} needs normalisation = {how}, got {normalisation}; set that, or leave {name} out"
                )
        every: tuple[tuple[float, ...], ...] = (percentiles,) if percentiles else window
        if odd := [pair for pair in every if len(pair) != 2]:
            raise ArgumentError(f"limits must be two numbers, the lower one first, got {odd[0]}; give two")
        return cls(normalisation, tuple((low, high) for low, high in every))

    @property
    def is_slicewise(self) -> bool:
        """Whether each slice of a volume is seen by its own statistics."""
        return self.normalisation is Normalisation.ZSCORE_SLICEWISE

    def check_dims(self, dims: int) -> None:
        """Refuse networks that see more than one slice at a time, if each is seen by its own statistics."""
        if self.is_slicewise and dims != 2:
            raise ArgumentError(
                f"normalisation {self.normalisation} needs a network that sees slices one by one, got a {dims}-D one; "
                "use zscore, or a 2-D network"
            )

    def windows(self, statistics: Sequence[ChannelStatistics], *, dtype: str) -> tuple[Window, ...]:
        """Return what the network sees of each channel of an image, alike in all its slices.

        Parameters
        ----------
        dtype : of the image

        Raises
        ------
        ArgumentError : the image has no such range, percentiles or channels.
        """
        if self.normalisation is Normalisation.WINDOW:
            if len(self.limits) not in {1, len(statistics)}:
                raise ArgumentError(
                    f"a window needs one pair of limits, or one for each of {len(statistics)} channels, got "
                    f"{len(self.limits)}; give {len(statistics)}"
                )
            pairs = self.limits * (len(statistics) if len(self.limits) == 1 else 1)
            return tuple(_between(low, high)._replace(low=0.0, high=1.0) for low, high in pairs)
        if self.normalisation is Normalisation.DTYPE:
            return (_between(*_range_of(np.dtype(dtype))),) * len(statistics)
        return tuple(self._measured(each) for each in statistics)

    def _measured(self, channel: ChannelStatistics) -> Window:
        """Return the window that a channel's own statistics give it."""
        if self.normalisation is Normalisation.NONE:
            return Window(0.0, 1.0)
        if self.normalisation in (Normalisation.ZSCORE, Normalisation.ZSCORE_SLICEWISE):  # a picture is one slice
            return Window(channel.mean, _inverse(channel.std))
        if self.normalisation is Normalisation.RANGE:
            return _between(channel.minimum, channel.maximum)
        known = {0.0: channel.minimum, 100.0: channel.maximum} | dict(channel.percentiles)
        low, high = self.limits[0] if self.limits else USUAL_PERCENTILES
        if missing := {low, high} - set(known):
            raise ArgumentError(
                f"percentiles must be those that ingest has stored, {', '.join(f'{p:g}' for p in sorted(known))}, got "
                f"{min(missing):g}; take two of them, or ingest again where this version stores more"
            )
        return _between(known[low], known[high])


class Measured(Protocol):
    """An image whose intensities were measured."""

    def windows(self, scaling: Scaling, /) -> Windows:
        """Return what a network sees of each channel."""
        ...


def _between(low: float, high: float) -> Window:
    """Return the window in which ``low`` becomes 0 and ``high`` 1; scale 1 where they are the same."""
    return Window(low, _inverse(high - low))


def _inverse(width: float) -> float:
    return 1.0 / width if width > 0 else 1.0


def _range_of(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "b":
        return 0.0, 1.0
    if dtype.kind not in "iu":
        raise ArgumentError(
            f"normalisation dtype needs integers, got {dtype}; use range, or window with limits"
        )
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
