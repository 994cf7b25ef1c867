"""Predictions, ``IMAGE.zarr/predictions/NAME``: float32 images that networks without classes make of an image.

An OME-Zarr image of its own, with a pyramid of means. Its shards are their own ledger while it is made; it is listed in
``predictions/zarr.json`` once it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from pipeline.errors import StoreError
from pipeline.store.arrays import Layout, check_same_fingerprint, create_group, open_array, read_attributes, sweep
from pipeline.store.image import FORMAT, Image, levels_from_json
from pipeline.store.labels import REPORT_DUE, check_name
from pipeline.store.location import Location
from pipeline.store.ngff import VERSION, Level, multiscales
from pipeline.store.pyramid import create_levels


@dataclass(frozen=True, slots=True)
class Prediction:
    """A volume of values; its arrays have the shape (n_channels, *spatial), spatial as the image's.

    Attributes
    ----------
    axes : the spatial ones, "yx" or "zyx"
    provenance : what it was made from and with
    fingerprint : what must be the same for a run to go on in this volume
    certificate : how far it is from the reference on sampled boxes, once it is complete
    report_due : see Labels
    """

    location: Location
    axes: str
    n_channels: int
    layout: Layout
    levels: tuple[Level, ...]
    fingerprint: dict[str, Any]
    provenance: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    report_due: bool = False

    @property
    def dtype(self) -> str:
        """Type of one value."""
        return "float32"

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes at full resolution."""
        return self.levels[0].shape

    @property
    def array(self) -> zarr.Array[Any]:
        """The values at full resolution, shape (n_channels, *spatial)."""
        return open_array(self.location / "0")


def prediction_location(image: Location, name: str) -> Location:
    """Return where the prediction ``name`` of an image lies."""
    check_name(name)
    return image / "predictions" / name


def create_prediction(prediction: Prediction) -> None:
    """Make the arrays of a prediction, or go on with the one that is there, if it is of the same run."""
    check_same_prediction(prediction)
    if not read_attributes(prediction.location):
        create_group(prediction.location, {"haloseg": _ours(prediction)})
    create_levels(
        prediction.location, prediction.levels, front=(prediction.n_channels,), dtype=np.dtype(prediction.dtype),
        layout=prediction.layout, axes=f"c{prediction.axes}",
    )  # fmt: skip


def check_same_prediction(prediction: Prediction) -> None:
    """Refuse to mix two runs in one volume."""
    there = read_prediction(prediction.location)
    if there is not None:
        check_same_fingerprint(
            there.fingerprint, prediction.fingerprint, what="prediction", location=prediction.location
        )


def publish_prediction(image: Image, prediction: Prediction) -> None:
    """List a complete prediction in its image: the commit point. Leftovers of killed writers are removed first."""
    sweep(prediction.location)
    describe_prediction(image, prediction)
    name, parent = prediction.location.name, prediction.location.parent
    names = published_predictions(parent)
    if name not in names:
        create_group(parent, {"haloseg": {"predictions": sorted([*names, name])}})


def describe_prediction(image: Image, prediction: Prediction) -> None:
    """Write what is known about a complete prediction; its arrays stay as they are."""
    unit = "micrometer" if image.voxel_size_um else None
    name, axes = prediction.location.name, f"c{prediction.axes}"
    kind = multiscales(name, prediction.levels, axes=axes, unit=unit, kind="mean")
    ome = {"version": VERSION, "multiscales": kind}
    create_group(prediction.location, {"ome": ome, "haloseg": _ours(prediction)})


def published_predictions(parent: Location) -> list[str]:
    """Return the names of the complete predictions in a ``predictions`` folder."""
    names: list[str] = read_attributes(parent).get("haloseg", {}).get("predictions", [])
    return names


def read_prediction(location: Location) -> Prediction | None:
    """Return the prediction here, complete or not; None where none of haloseg is."""
    about = read_attributes(location).get("haloseg", {})
    if about.get("kind") != "prediction":
        return None
    if about["format"] > FORMAT:
        raise StoreError(
            f"prediction format must be at most {FORMAT}, got {about['format']} in {location}; update haloseg"
        )
    return Prediction(
        location, about["axes"], about["n_channels"], Layout(tuple(about["chunk"]), tuple(about["shard"])),
        levels_from_json(about["levels"]), about["fingerprint"], about["provenance"], about["certificate"],
        about.get("report") == REPORT_DUE,
    )  # fmt: skip


def _ours(prediction: Prediction) -> dict[str, Any]:
    ours = {
        "format": FORMAT, "kind": "prediction", "axes": prediction.axes, "dtype": prediction.dtype,
        "n_channels": prediction.n_channels, "chunk": list(prediction.layout.chunk),
        "shard": list(prediction.layout.shard), "levels": [level.to_json() for level in prediction.levels],
        "fingerprint": prediction.fingerprint, "provenance": prediction.provenance,
        "certificate": prediction.certificate,
    }  # fmt: skip
    if prediction.report_due:
        ours["report"] = REPORT_DUE
    return ours
