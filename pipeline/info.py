"""Info: what lies at a path, a scan, an image, labels or a prediction."""

from __future__ import annotations

from typing import Any

from pipeline.copying import spatial_of
from pipeline.scans.backend import PARTIAL, open_scan
from pipeline.store.image import Image, read_image
from pipeline.store.labels import Labels, published, read_labels
from pipeline.store.location import Location
from pipeline.store.predictions import Prediction, published_predictions, read_prediction
from pipeline.store.probabilities import Probabilities, is_complete, read_probabilities
from pipeline.store.results import is_published


def info(path: str) -> dict[str, Any]:
    """Return a JSON document of what lies at a path: kind, shape, axes, dtype, voxel size, and more by kind.

    Raises
    ------
    ScanError : nothing that can be read lies there.
    """
    location = Location(str(path))
    if (image := read_image(location)) is not None:
        return _image(image)
    if (labels := read_labels(location)) is not None:
        return _labels(labels)
    if (prediction := read_prediction(location)) is not None:
        return _prediction(prediction)
    if (probabilities := read_probabilities(location)) is not None:
        return _probabilities(probabilities)
    scan = open_scan(path)
    known = scan.attrs.get(PARTIAL)
    size = [known.get(axis) for axis in spatial_of(scan)] if known else scan.attrs.get("voxel_size_um")
    return {
        "path": str(path), "kind": "scan", "format": scan.attrs.get("format"), "axes": "".join(map(str, scan.dims)),
        "shape": list(scan.shape), "dtype": str(scan.dtype), "voxel_size_um": list(size) if size else None,
    }  # fmt: skip


def _image(image: Image) -> dict[str, Any]:
    return {
        "path": str(image.location), "kind": "image", "complete": bool(image.statistics), "axes": image.axes,
        "shape": [image.n_channels, *image.spatial_shape], "dtype": image.dtype,
        "voxel_size_um": list(image.voxel_size_um) if image.voxel_size_um else None,
        "chunk": list(image.layout.chunk), "shard": list(image.layout.shard),
        "scan": image.scan.get("name"), "labels": published(image.location / "labels"),
        "predictions": published_predictions(image.location / "predictions"),
        "levels": [{"path": level.path, "shape": list(level.shape)} for level in image.levels],
        "statistics": [each.to_json() for each in image.statistics],
        **({"slices_measured": bool(image.slices_sha256)} if image.has_slices else {}),
    }  # fmt: skip


def _labels(labels: Labels) -> dict[str, Any]:
    made = labels.provenance or {}
    return {
        "path": str(labels.location), "kind": "labels",
        "complete": labels.location.name in published(labels.location.parent), "axes": labels.axes,
        "shape": list(labels.spatial_shape), "dtype": labels.dtype, "classes": list(labels.classes),
        "chunk": list(labels.layout.chunk), "shard": list(labels.layout.shard),
        "made_by": made.get("made_by"), "model": made.get("model"),
        **({"instances": made["instances"]} if "instances" in made else {}),
        "levels": [{"path": level.path, "shape": list(level.shape)} for level in labels.levels],
    }  # fmt: skip


def _prediction(prediction: Prediction) -> dict[str, Any]:
    made = prediction.provenance or {}
    return {
        "path": str(prediction.location), "kind": "prediction", "complete": is_published(prediction),
        "axes": f"c{prediction.axes}", "shape": [prediction.n_channels, *prediction.spatial_shape],
        "dtype": prediction.dtype,
        "chunk": list(prediction.layout.chunk), "shard": list(prediction.layout.shard),
        "made_by": made.get("made_by"), "model": made.get("model"),
        "levels": [{"path": level.path, "shape": list(level.shape)} for level in prediction.levels],
    }  # fmt: skip


def _probabilities(probabilities: Probabilities) -> dict[str, Any]:
    axes = "c" + "zyx"[-len(probabilities.spatial_shape) :]
    return {
        "path": str(probabilities.location), "kind": "probabilities", "complete": is_complete(probabilities),
        "axes": axes, "shape": list(probabilities.array.shape), "dtype": "float32",
        "channels": list(probabilities.channels), "overlap": probabilities.overlap,
        "chunk": list(probabilities.layout.chunk), "shard": list(probabilities.layout.shard),
    }  # fmt: skip
