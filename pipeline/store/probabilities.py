"""Published probabilities, ``IMAGE.zarr/probabilities/NAME``: float32, one channel per output of the network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.store.arrays import Layout, create_group, sweep
from pipeline.store.image import Image
from pipeline.store.location import Location
from pipeline.store.ngff import VERSION, multiscales
from pipeline.store.pyramid import create_levels


@dataclass(frozen=True, slots=True)
class Probabilities:
    """An OME-Zarr image of one level, shape (n_outputs, *spatial), spec codecs only so that every reader opens it."""

    location: Location
    layout: Layout
    n_outputs: int


def create_probabilities(image: Image, probabilities: Probabilities) -> None:
    """Make the array, or go on with the one that is there."""
    create_levels(
        probabilities.location, image.levels[:1], front=(probabilities.n_outputs,), dtype=np.dtype(np.float32),
        layout=probabilities.layout, axes=image.axes,
    )


def publish_probabilities(image: Image, probabilities: Probabilities) -> None:
    """Declare the probabilities complete, so that any OME-Zarr reader opens them."""
    sweep(probabilities.location)
    unit = "micrometer" if image.voxel_size_um else None
    document = multiscales(
        probabilities.location.name, image.levels[:1], axes=image.axes, unit=unit, kind="probabilities"
    )
    create_group(probabilities.location, {"ome": {"version": VERSION, "multiscales": document}})
