"""Published probabilities, ``IMAGE.zarr/probabilities/NAME``: float32, one channel per output of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.store.arrays import Layout, check_same_fingerprint, create_group, read_attributes, sweep
from pipeline.store.image import FORMAT, Image
from pipeline.store.location import Location
from pipeline.store.ngff import VERSION, multiscales
from pipeline.store.pyramid import create_levels


@dataclass(frozen=True, slots=True)
class Probabilities:
    """An OME-Zarr image of one level, shape (n_outputs, *spatial), spec codecs only so that every reader opens it.

    ``fingerprint`` is that of the labels: what must be the same for a run to go on in this volume.
    """

    location: Location
    layout: Layout
    n_outputs: int
    fingerprint: dict[str, Any]


def create_probabilities(image: Image, probabilities: Probabilities) -> None:
    """Make the array, or go on with the one that is there, if it is of the same run."""
    check_same_probabilities(probabilities)
    if not read_attributes(probabilities.location):
        create_group(probabilities.location, {"haloseg": _ours(probabilities)})
    create_levels(
        probabilities.location, image.levels[:1], front=(probabilities.n_outputs,), dtype=np.dtype(np.float32),
        layout=probabilities.layout, axes=image.axes,
    )


def check_same_probabilities(probabilities: Probabilities) -> None:
    """Refuse to mix two runs in one volume."""
    if there := read_attributes(probabilities.location):
        was = there.get("haloseg", {}).get("fingerprint", {})
        check_same_fingerprint(was, probabilities.fingerprint, what="probabilities", location=probabilities.location)


def publish_probabilities(image: Image, probabilities: Probabilities) -> None:
    """Declare the probabilities complete, so that any OME-Zarr reader opens them."""
    sweep(probabilities.location)
    unit = "micrometer" if image.voxel_size_um else None
    document = multiscales(
        probabilities.location.name, image.levels[:1], axes=image.axes, unit=unit, kind="probabilities"
    )
    ome = {"version": VERSION, "multiscales": document}
    create_group(probabilities.location, {"ome": ome, "haloseg": _ours(probabilities)})


def _ours(probabilities: Probabilities) -> dict[str, Any]:
    return {"format": FORMAT, "kind": "probabilities", "fingerprint": probabilities.fingerprint}
