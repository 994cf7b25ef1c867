"""Slices: where mean and deviation of each plane of a volume are kept, measured once, at ingest.

    IMAGE.zarr/slices     float64, (2, channels, planes): means, then standard deviations

They are an array of their own, since a volume has up to a hundred thousand planes, and metadata are read by everyone.
The image's metadata hold the SHA-256 of the array's content: it is complete, and whole, where that is there.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import StoreError
from pipeline.geometry.box import Box
from pipeline.store.arrays import Layout, create_array, open_array, write_shard
from pipeline.store.location import Location
from pipeline.store.moments import SliceStatistics

AXES = ("statistic", "c", "z")


def write_slices(location: Location, slices: SliceStatistics) -> None:
    """Write the statistics here; they count once the image's metadata hold their digest."""
    both = np.stack([slices.mean, slices.std])
    n = both.shape[-1:]
    create_array(location, shape=both.shape, dtype=np.float64, layout=Layout(n, n), axes=AXES)
    write_shard(open_array(location), Box.whole(n), both, location=location)


def read_slices(location: Location, *, sha256: str) -> SliceStatistics:
    """Return the statistics here.

    Raises
    ------
    StoreError : they are not those of this digest.
    """
    found = SliceStatistics(*np.asarray(open_array(location)[:], np.float64))
    if found.sha256 != sha256:
        raise StoreError(f"statistics of slices must be those of the image, got others at {location}; copy it anew")
    return found
