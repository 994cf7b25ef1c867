"""Provenance: what a run makes its volume from, and what must stay the same for another run to go on in it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from pipeline.config import Precision, Scheme, Tta
from pipeline.store.arrays import Layout
from pipeline.store.image import Image
from pipeline.store.labels import Labels, label_location
from pipeline.store.location import Location
from pipeline.store.predictions import Prediction, prediction_location
from pipeline.store.results import Result
from pipeline.store.scaling import Scaling
from pipeline.unet.model import Model
from pipeline.unet.settings import Head


def result_of(image: Image, model: Model, path: str, *, name: str, layout: Layout, scheme: Scheme) -> Result:
    """Return the volume that a run is to make: labels, or what a network without classes predicts; nothing is written.

    Parameters
    ----------
    path : of the model
    """
    axes = image.axes.removeprefix("c")
    same = fingerprint(image, model.digest, scheme.precision, tta=scheme.tta, scaling=model.scaling)
    made = provenance(image, model, path, scheme)
    if model.settings.head is Head.LINEAR:
        location = prediction_location(image.location, name)
        return Prediction(location, axes, model.settings.n_classes, layout, image.levels, same, made)
    location = label_location(image.location, name)
    return Labels(location, axes, "uint8", layout, image.levels, same, model.classes, model.class_values, made)


def fingerprint(
    image: Image, model_sha256: str, precision: Precision, *, tta: Tta, scaling: Scaling
) -> dict[str, Any]:
    """Return what must be the same for two runs to be one: labels that have it are of this image and this model.

    Statistics of slices are part of it where the model's scaling goes by them: they may have been added since.
    """
    content = [image.spatial_shape, image.dtype, [each.to_json() for each in image.statistics]]
    content += [image.slices_sha256] if scaling.is_slicewise and image.has_slices else []
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    turned = {} if tta is Tta.NONE else {"tta": tta.value}  # as those are that were made before there was one
    return {"image": digest, "model": model_sha256, "precision": precision.value} | turned


def differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Return in which settings two fingerprints differ, "model" where not in these alone; empty if in nothing."""
    keys = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)}
    return " and ".join(sorted(keys)) if keys <= {"precision", "tta"} else "model"


def provenance(image: Image, model: Model, path: str, scheme: Scheme) -> dict[str, Any]:
    """Return who made a volume from what; nothing that differs between two runs of the same command."""
    several = {"networks": model.n_networks} if model.n_networks > 1 else {}  # as it was before there were ensembles
    return {
        "made_by": "haloseg segment", "scan": image.scan,
        "model": Location(str(path)).name, "model_path": path, "model_sha256": model.digest,
        "network": model.settings.to_json(), **several, "normalisation": model.normalisation.value,
        "limits": model.limits,
        "engine": scheme.taken.value, "precision": scheme.precision.value, "tta": scheme.tta.value,
        "tile_rule": {"stride": model.rule.stride, "halo": model.rule.halo, "trim": model.rule.trim},
        "versions": {package: version(package) for package in ("haloseg", "torch", "zarr", "numpy")},
    }  # fmt: skip
