"""Source: an image and its labels, as training reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import Sliceable, read_mirrored
from pipeline.store.scaling import Windows, of_slices, spread_out
from pipeline.unet.training.resampled import Steps, seen_region
from pipeline.unet.training.targets import Target


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

    def intensities(self, box: Box) -> NDArray[np.float32]:
        """Return what the network sees of a box of the image's voxels, mirrored outside it, (channels, *box.shape)."""
        raw = read_mirrored(self.image, box)
        windows = of_slices(self.windows, box.start[0], box.stop[0])
        offset, scale, low, high = spread_out(windows, n_axes=box.ndim)
        x: NDArray[np.float32] = np.clip((raw.astype(np.float64) - offset) * scale, low, high).astype(np.float32)
        return x
