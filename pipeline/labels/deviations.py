"""Deviations: how far values are from the truth: MAE, RMSE and PSNR, from sums that add up block by block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DeviationFigures:
    """Figures over all voxels and channels.

    Attributes
    ----------
    mae, rmse : mean absolute error, and root of the mean squared one, in the truth's intensities
    psnr_db : peak signal-to-noise ratio, 10 log10(1 / mean squared error), the error of each channel in proportion to
        the truth's span in it, largest less smallest; None where nothing differs, or the truth is constant
    """

    mae: float
    rmse: float
    psnr_db: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Deviations:
    """Sums over the voxels of blocks, float64 of shape (channels,); those of two blocks add up to those of both."""

    n: int
    absolute: NDArray[np.float64]
    squared: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[Any], truth: NDArray[Any]) -> Deviations:
        """Return the sums of a block; both of shape (channels, *spatial), any integers or floats."""
        want = truth.astype(np.float64).reshape(len(truth), -1)
        far = np.abs(values.astype(np.float64).reshape(len(values), -1) - want)
        return cls(want.shape[1], far.sum(1), np.square(far).sum(1), want.min(1), want.max(1))

    def __add__(self, other: Deviations) -> Deviations:
        """Return the sums of both blocks."""
        return Deviations(
            self.n + other.n, self.absolute + other.absolute, self.squared + other.squared,
            np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest),
        )  # fmt: skip

    def figures(self) -> DeviationFigures:
        """Return what they say of all voxels together."""
        mae, mse, span = self.absolute / self.n, self.squared / self.n, self.highest - self.lowest
        decided = bool(mse.any()) and bool(span.all())
        psnr = -10 * math.log10((mse / np.square(span)).mean()) if decided else None
        return DeviationFigures(float(mae.mean()), math.sqrt(mse.mean()), psnr)
