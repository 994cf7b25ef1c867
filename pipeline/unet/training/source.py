"""Source: an image and its labels, as training reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable, read_mirrored
from pipeline.store.scaling import Windows, of_slices, spread_out
from pipeline.unet.training.orientation import Orientation
from pipeline.unet.training.resampled import Steps, seen_region
from pipeline.unet.training.targets import Target

_BYTES = np.arange(256, dtype=np.uint8)

@dataclass(frozen=True, slots=True)
class Source:
    """An image to learn from.

    Attributes
    ----------
    image : shape (channels, *spatial); ``labels``: integers, shape (*spatial)
    windows : what the network sees of each channel
    region : where labels count, in the image's voxels
    borders : what is added to the weight of each voxel, shape (*spatial); None adds nothing
    steps : voxels of the image per voxel that the network sees, along every spatial axis; empty: as they are
    target : what the image is to become; ``labels`` then only tell which of its voxels count
    """

    image: Sliceable
    labels: Sliceable
    windows: Windows
    region: Box
    borders: Sliceable | None = None
    steps: Steps = ()
    target: Target | None = None

    @property
    def seen(self) -> Box:
        """The region in voxels as the network sees them."""
        return seen_region(self.region, self.steps)

    def intensities(self, box: Box, turn: Orientation | None = None) -> NDArray[np.float32]:
        """Return what the network sees of a box of the image's voxels, mirrored outside it, (channels, *box.shape).

        Parameters
        ----------
        turn : done before intensities become numbers of four times the bytes
        """
        raw, windows = read_mirrored(self.image, box), of_slices(self.windows, box.start[0], box.stop[0])
        spread = spread_out(windows, n_axes=box.ndim)
        if turn is not None:
            raw, spread = turn.apply(raw), tuple(turn.apply(each) if each[0].size > 1 else each for each in spread)
        return scaled(raw, *spread)


def scaled(
    raw: NDArray[Any], offset: NDArray[np.float64], scale: NDArray[np.float64], low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float32]:  # fmt: skip
    """Return ``(raw - offset) * scale`` between limits, computed in float64; bytes with one window are looked up.

    Parameters
    ----------
    raw : (channels, *spatial); the others fit it, as ``spread_out`` makes them
    """
    if raw.dtype.itemsize == 1 and offset.size == len(raw) and raw[0].size > len(_BYTES):
        every, x = _BYTES.view(raw.dtype)[None].repeat(len(raw), axis=0), np.empty(raw.shape, np.float32)
        tables = scaled(every, *(each.reshape(-1, 1) for each in (offset, scale, low, high)))
        for table, voxels, shown in zip(tables, raw.view(np.uint8), x, strict=True):
            table.take(voxels, out=shown, mode="clip")  # straight to its place; there is nothing to clip
        return x
    exact = raw.astype(np.float64, order="C")
    exact -= offset
    exact *= scale
    return np.clip(exact, low, high, out=exact).astype(np.float32)
