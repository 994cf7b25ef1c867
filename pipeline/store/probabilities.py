"""Published probabilities, ``IMAGE.zarr/probabilities/NAME``: float32, one channel per output of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from pipeline.errors import StoreError
from pipeline.store.arrays import Layout, check_same_fingerprint, create_group, open_array, read_attributes, sweep
from pipeline.store.image import FORMAT, Image
from pipeline.store.location import Location
from pipeline.store.ngff import VERSION, multiscales
from pipeline.store.pyramid import create_levels


@dataclass(frozen=True, slots=True)
class Probabilities:
    """An OME-Zarr image of one level, shape (channels, *spatial), spec codecs only so that every reader opens it.

    Attributes
    ----------
    channels : names of the classes or labels, one per output of the network; none where an older haloseg made them
    overlap : a voxel may have any number of the labels, each with a probability of its own; else they add up to one
    fingerprint : that of the labels: what must be the same for a run to go on in this volume
    """

    location: Location
    layout: Layout
    channels: tuple[str, ...]
    overlap: bool
    fingerprint: dict[str, Any]

    @property
    def array(self) -> zarr.Array[Any]:
        """The probabilities, float32 (channels, *spatial)."""
        return open_array(self.location / "0")

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes."""
        return tuple(self.array.shape[1:])


def create_probabilities(image: Image, probabilities: Probabilities) -> None:
    """Make the array, or go on with the one that is there, if it is of the same run."""
    check_same_probabilities(probabilities)
    if not read_attributes(probabilities.location):
        create_group(probabilities.location, {"haloseg": _ours(probabilities)})
    create_levels(
        probabilities.location, image.levels[:1], front=(len(probabilities.channels),), dtype=np.dtype(np.float32),
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


def read_probabilities(location: Location) -> Probabilities | None:
    """Return the probabilities here, complete or not; None where none of haloseg are."""
    about = read_attributes(location).get("haloseg", {})
    if about.get("kind") != "probabilities":
        return None
    if about["format"] > FORMAT:
        raise StoreError(
            f"probability format must be at most {FORMAT}, got {about['format']} in {location}; update haloseg"
        )
    array = open_array(location / "0")
    layout = Layout(tuple(array.chunks[1:]), tuple((array.shards or array.chunks)[1:]))
    channels = tuple(about.get("channels", ()))
    return Probabilities(location, layout, channels, about.get("overlap", False), about["fingerprint"])


def open_probabilities(path: str) -> Probabilities:
    """Return the complete probabilities at ``IMAGE.zarr/probabilities/NAME``.

    Raises
    ------
    StoreError : there are none, or the run that makes them did not finish, or an older haloseg named no channels.
    """
    made = read_probabilities(location := Location(str(path)))
    if made is None:
        raise StoreError(f"probabilities must exist, got none at {path}; segment with --probabilities first")
    if not is_complete(made):
        raise StoreError(
            f"probabilities must be complete, got an unfinished run at {path}; run the same command again"
        )
    if not made.channels:
        raise StoreError(
            f"probabilities must name their channels, got those of an older haloseg at {location}; run the same "
            "segment again, which names them"
        )
    return made


def is_complete(probabilities: Probabilities) -> bool:
    """Whether the run that makes them has finished."""
    return "ome" in read_attributes(probabilities.location)


def _ours(probabilities: Probabilities) -> dict[str, Any]:
    return {
        "format": FORMAT, "kind": "probabilities", "channels": list(probabilities.channels),
        "overlap": probabilities.overlap, "fingerprint": probabilities.fingerprint,
    }  # fmt: skip
