"""Label volumes, ``IMAGE.zarr/labels/NAME``: their own ledger while they are made, listed once they are complete."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from pipeline.errors import ArgumentError, StoreError
from pipeline.store.arrays import Layout, check_same_fingerprint, create_group, open_array, read_attributes, sweep
from pipeline.store.image import FORMAT, Image, levels_from_json
from pipeline.store.location import Location
from pipeline.store.ngff import VERSION, Level, multiscales
from pipeline.store.pyramid import create_levels

REPORT_DUE = "due"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Okabe and Ito's colours, which colour-blind people can tell apart
_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the red, green and blue that a label has wherever it is shown; label 0 is left clear."""
    return _COLOURS[(label - 1) % len(_COLOURS)]


@dataclass(frozen=True, slots=True)
class Labels:
    """A label volume; its arrays have the image's spatial shape.

    Attributes
    ----------
    axes : "yx" or "zyx"
    classes : names in the order of their values; empty where the values are not classes (instances, unknown)
    class_values : what each class is called in the labels that the model learned from; as long as ``classes``
    provenance : what the labels were made from and with
    fingerprint : what must be the same for a run to go on in this volume
    certificate : how far the labels are from the reference on sampled boxes, once they are complete
    report_due : the run that published them has not reported them yet, or was killed before it could
    """

    location: Location
    axes: str
    dtype: str
    layout: Layout
    levels: tuple[Level, ...]
    fingerprint: dict[str, Any]
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    provenance: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    report_due: bool = False

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes at full resolution."""
        return self.levels[0].shape

    @property
    def array(self) -> zarr.Array[Any]:
        """The labels at full resolution, shape (*spatial)."""
        return open_array(self.location / "0")


def check_name(name: str) -> None:
    """Refuse names that are no folder names on every store."""
    if not _NAME.fullmatch(name) or name == "zarr.json":
        raise ArgumentError(f"a label name has letters, digits, '_', '-' and '.', got {name!r}; use such as cells-1")


def label_location(image: Location, name: str) -> Location:
    """Return where the label volume ``name`` of an image lies."""
    check_name(name)
    return image / "labels" / name


def same_layout(image: Image, stride: tuple[int, ...]) -> Layout:
    """Return the image's layout with shards rounded up so that a core is a multiple of chunk and stride."""
    steps = [int(np.lcm(c, s)) for c, s in zip(image.layout.chunk, stride, strict=True)]
    shard = tuple(-(-n // step) * step for n, step in zip(image.layout.shard, steps, strict=True))
    return Layout(image.layout.chunk, shard)


def create_labels(image: Image, labels: Labels) -> None:
    """Make the arrays of a label volume, or go on with the one that is there, if it is of the same run.

    Raises
    ------
    StoreError : the volume there is of another run; the message says which setting differs.
    """
    check_same_run(labels)
    if not read_attributes(labels.location):
        describe_labels(image, labels)
    create_levels(
        labels.location, labels.levels, front=(), dtype=np.dtype(labels.dtype), layout=labels.layout, axes=labels.axes
    )


def check_same_run(labels: Labels) -> None:
    """Refuse to mix two runs in one label volume."""
    there = read_labels(labels.location)
    if there is None:
        return
    was, now = ((each.provenance or {}).get("made_by") for each in (there, labels))
    if was and now and was != now:
        raise StoreError(
            f"labels {labels.location.name} must come from one run, got {now} where those of {was} are, in "
            f"{labels.location}; choose another name"
        )
    check_same_fingerprint(there.fingerprint, labels.fingerprint, what="labels", location=labels.location)


def publish(image: Image, labels: Labels) -> None:
    """List a complete label volume in its image: the commit point. Leftovers of killed writers are removed first."""
    sweep(labels.location)
    if labels.certificate or labels.report_due:
        describe_labels(image, labels)
    parent = labels.location.parent
    names = published(parent)
    if labels.location.name not in names:
        create_group(parent, {"ome": {"version": VERSION, "labels": sorted([*names, labels.location.name])}})


def describe_labels(image: Image, labels: Labels) -> None:
    """Write what is known about a label volume; its arrays stay as they are."""
    create_group(labels.location, _attributes(image, labels))


def published(parent: Location) -> list[str]:
    """Return the names of the complete label volumes in a ``labels`` folder."""
    names: list[str] = read_attributes(parent).get("ome", {}).get("labels", [])
    return names


def read_labels(location: Location) -> Labels | None:
    """Return the label volume here, complete or not; None where no haloseg label volume is."""
    about = read_attributes(location).get("haloseg", {})
    if about.get("kind") != "labels":
        return None
    if about["format"] > FORMAT:
        raise StoreError(f"label format must be at most {FORMAT}, got {about['format']} in {location}; update haloseg")
    return Labels(
        location, about["axes"], about["dtype"], Layout(tuple(about["chunk"]), tuple(about["shard"])),
        levels_from_json(about["levels"]), about["fingerprint"], tuple(about["classes"]), tuple(about["class_values"]),
        about["provenance"], about.get("certificate"), about.get("report") == REPORT_DUE,
    )  # fmt: skip


def open_labels(path: str | Location) -> Labels:
    """Return the complete label volume at ``IMAGE.zarr/labels/NAME``.

    Raises
    ------
    StoreError : there are no labels, or the run that makes them did not finish.
    """
    location = path if isinstance(path, Location) else Location(str(path))
    labels = read_labels(location)
    if labels is None:
        have = ", ".join(published(location.parent)) or "none"
        raise StoreError(f"labels must exist, got none at {location}; the image has: {have}")
    if location.name not in published(location.parent):
        raise StoreError(f"labels must be complete, got an unfinished run at {location}; run the same command again")
    return labels


def _attributes(image: Image, labels: Labels) -> dict[str, Any]:
    unit = "micrometer" if image.voxel_size_um else None
    kind = multiscales(labels.location.name, labels.levels, axes=labels.axes, unit=unit, kind="mode")
    about: dict[str, Any] = {"source": {"image": "../../"}}
    if labels.classes:
        about["colors"] = [
            {"label-value": value, "rgba": [*colour_of(value), 255] if value else [0, 0, 0, 0]}
            for value in range(len(labels.classes))
        ]
        about["properties"] = [{"label-value": value, "class": name} for value, name in enumerate(labels.classes)]
    ours = {
        "format": FORMAT, "kind": "labels", "axes": labels.axes, "dtype": labels.dtype,
        "chunk": list(labels.layout.chunk), "shard": list(labels.layout.shard),
        "levels": [level.to_json() for level in labels.levels], "fingerprint": labels.fingerprint,
        "classes": list(labels.classes), "class_values": list(labels.class_values), "provenance": labels.provenance,
        "certificate": labels.certificate,
    }  # fmt: skip
    if labels.report_due:
        ours["report"] = REPORT_DUE
    return {"ome": {"version": VERSION, "multiscales": kind, "image-label": about}, "haloseg": ours}
