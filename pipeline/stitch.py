"""Stitch: the class labels of an image become instances, each object with an id of its own, block by block.

The result is that of the whole volume at once: the same ids whatever blocks, workers and interruptions.

    class labels       records            tables                shards
    block by block --> components,   -->  joined across    -->  components again,  --> pyramid, published
                       planes of ids      faces, numbered       translated
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from time import perf_counter
from typing import Any

from pipeline.compute.levels import build_levels
from pipeline.compute.retries import Retries, RetriesWatch
from pipeline.compute.runner import BlockRecord, Quarantined, RunBlocks, run_serial
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.errors import ArgumentError, QuarantineError, StoreError
from pipeline.geometry.grid import BlockGrid
from pipeline.joining import join
from pipeline.store.arrays import done_shards
from pipeline.store.image import Image, open_image
from pipeline.store.labels import (
    Labels,
    create_labels,
    describe_labels,
    label_location,
    open_labels,
    publish,
    read_labels,
)
from pipeline.store.location import Location, storage_errors
from pipeline.store.pyramid import Downsampling
from pipeline.store.results import Result, check_same_result, is_published, read_result
from pipeline.works.components import ComponentBlocks, FoundValues, InstanceBlocks, Records, ValueBlocks

MADE_BY = "haloseg stitch"
LARGEST_CLASSES = 256
_FOLDER = ".stitching"
_JOINED = "joined.json"


@dataclass(frozen=True, slots=True)
class Stitched:
    """What a run has done; ``n_run`` of the blocks were written now, the others by an earlier run."""

    labels: Labels
    n_instances: int
    n_blocks: int
    n_run: int
    wall_s: float
    peak_rss_bytes: int
    retries: Retries

    @property
    def n_voxels(self) -> int:
        """Voxels of the volume."""
        return prod(self.labels.spatial_shape)

    def to_json(self) -> dict[str, Any]:
        """Return what was done as a JSON object."""
        made = self.labels.provenance or {}
        return {
            "labels": str(self.labels.location), "shape": list(self.labels.spatial_shape),
            "instances": self.n_instances, "classes": made["classes"], "min_voxels": made["min_voxels"],
            "voxels": self.n_voxels, "blocks": self.n_blocks, "blocks_run": self.n_run,
            "blocks_kept": self.n_blocks - self.n_run, "wall_s": self.wall_s, "peak_rss_bytes": self.peak_rss_bytes,
            **self.retries.to_json(),
        }  # fmt: skip


class _Tally:
    """Tells another watcher of blocks, and keeps the most memory that any of them had."""

    def __init__(self, watch: Watcher) -> None:
        self._watch, self.peak_rss_bytes = watch, 0

    def __call__(self, record: BlockRecord) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, record.peak_rss_bytes)
        self._watch.advance(record)


def stitch(
    image: str, *, labels: str, name: str, classes: Sequence[str] = (), min_voxels: int = 1,
    run: RunBlocks = run_serial, watch: Watcher = UNWATCHED,
) -> Stitched:
    """Make ``image/labels/name``, uint64: the connected voxels of each class of ``image/labels/labels``, numbered.

    Voxels are connected through faces (4 neighbours in 2-D, 6 in 3-D), those of two classes never. Ids count from 1 in
    the order of the instances' first voxels, 0 is none. What an earlier, killed run has done is kept.

    Parameters
    ----------
    classes : by name or value; by default all but the first one, or the smallest value of labels without names
    min_voxels : instances of fewer voxels are left out

    Raises
    ------
    InputError : there are no complete class labels of this name, or no such class, or the name is taken.
    QuarantineError : some blocks failed again and again; all others are done, and the same call does those alone.
    """
    begin, again = perf_counter(), RetriesWatch(watch)
    made_of = open_image(Location(str(image)).absolute())
    source = open_labels(label_location(made_of.location, labels))
    made = _planned(made_of, source, name, classes=classes, min_voxels=min_voxels, run=run, watch=again)
    grid = BlockGrid(made.spatial_shape, made.layout.shard)
    records, tally = Records(made.location / _FOLDER), _Tally(again)
    with storage_errors(made.location):
        create_labels(made_of, made)
        done = done_shards(made.location / "0", grid)
        if len(done) < len(grid):
            _fill(source, made, grid, done=done, run=run, tally=tally, watch=again)
        failed = build_levels(
            made.location, made.levels, layout=made.layout, how=Downsampling.MODE, run=run, watch=again
        )
        _complete(failed, made.location)
        made = _published(made_of, made, records)
    assert made.provenance
    return Stitched(
        made, made.provenance["instances"], len(grid), len(grid) - len(done), perf_counter() - begin,
        tally.peak_rss_bytes, again.retries,
    )  # fmt: skip


def check_ahead(labels: Result, *, name: str) -> None:
    """Refuse, before labels are segmented, what could not be stitched afterwards; nothing is written.

    Raises
    ------
    InputError : the network has no classes, or the name is that of something else.
    """
    if not isinstance(labels, Labels):
        raise ArgumentError("instances are made of classes, got a network without; leave out the instances")
    if name == labels.location.name:
        raise ArgumentError(f"instances need a name of their own, got {name} for both; choose another")
    there = read_result(labels.location.parent.parent, name)
    made = (there.provenance or {}) if there else {"made_by": MADE_BY, "labels": labels.location.name}
    if (made.get("made_by"), made.get("labels")) != (MADE_BY, labels.location.name):
        raise StoreError(f"a name stands for one volume of an image, got {name}, which names another; choose another")


def _planned(
    image: Image, source: Labels, name: str, *, classes: Sequence[str], min_voxels: int, run: RunBlocks, watch: Watcher
) -> Labels:
    """Return the volume that a run is to make; nothing is written."""
    if min_voxels < 1:
        raise ArgumentError(f"min_voxels must be at least 1, got {min_voxels}; use 1")
    if (source.provenance or {}).get("made_by") == MADE_BY:
        raise StoreError(f"labels must be of classes to be stitched, got instances at {source.location}; name others")
    location = label_location(image.location, name)
    digest = hashlib.sha256(json.dumps(source.fingerprint).encode()).hexdigest()
    there = read_labels(location)
    known = there if there and there.fingerprint.get("labels") == digest else None
    every = known.provenance["values"] if known and known.provenance else _values(source, run=run, watch=watch)
    chosen = _chosen(source, every, classes)
    ndim = len(source.spatial_shape)
    provenance = {
        "made_by": MADE_BY, "scan": image.scan, "labels": source.location.name,
        "labels_fingerprint": source.fingerprint, "values": every,
        "classes": [source.classes[value] if source.classes else str(value) for value in chosen],
        "min_voxels": min_voxels, "neighbours": 2 * ndim,
        "versions": {package: version(package) for package in ("haloseg", "connected-components-3d", "zarr", "numpy")},
    }  # fmt: skip
    same = {"labels": digest, "classes": chosen, "min_voxels": min_voxels}
    made = Labels(location, source.axes, "uint64", source.layout, source.levels, same, provenance=provenance)
    check_same_result(made)
    return replace(made, provenance=there.provenance) if there else made


def _values(source: Labels, *, run: RunBlocks, watch: Watcher) -> list[int]:
    """Return the values of the classes, ascending; of labels without names they are looked for in all voxels."""
    if source.classes:
        return list(range(len(source.classes)))
    grid, found = BlockGrid(source.spatial_shape, source.layout.shard), set[int]()

    def on_record(record: BlockRecord) -> None:
        assert isinstance(record, FoundValues)
        found.update(record.values)
        if len(found) > LARGEST_CLASSES:
            raise StoreError(
                f"labels must have at most {LARGEST_CLASSES} values to be classes, got more at {source.location}; if "
                "they are instances already, use them as they are"
            )
        watch.advance(record)

    watch.begin("classes", n_blocks=len(grid), n_done=0)
    work = ValueBlocks(source.location / "0", grid, LARGEST_CLASSES)
    _complete(run(work, range(len(grid)), on_record=on_record), source.location)
    return sorted(found)


def _chosen(source: Labels, every: list[int], classes: Sequence[str]) -> list[int]:
    """Return the values of the classes that are asked for, ascending; by default all but the first."""
    if not classes:
        if every[1:] or every == [0] or source.classes:
            return every[1:]
        raise ArgumentError(f"labels must have 2 values, one of which is no object, got {every[0]} alone; name classes")
    names = source.classes or tuple(map(str, every))
    by_name = {str(value): value for value in every} | dict(zip(names, every, strict=True))
    if unknown := [each for each in classes if each not in by_name]:
        raise ArgumentError(f"classes of {source.location} are {', '.join(names)}, got {unknown[0]}; name some of them")
    chosen = sorted({by_name[each] for each in classes})
    if len(chosen) < len(classes):
        raise ArgumentError(f"classes must be named once, got {','.join(classes)}; leave out what is there twice")
    return chosen


def _fill(
    source: Labels, made: Labels, grid: BlockGrid, *, done: set[int], run: RunBlocks, tally: _Tally, watch: Watcher
) -> None:
    """Write the shards that are missing at full resolution: find the components, join them, and translate them."""
    records = Records(made.location / _FOLDER)
    joined, values = records.folder / _JOINED, tuple(made.fingerprint["classes"])
    work = ComponentBlocks(source.location / "0", grid, values, records)
    if not joined.exists():
        recorded = records.recorded()
        watch.begin("components", n_blocks=len(grid), n_done=len(recorded))
        if missing := [index for index in range(len(grid)) if index not in recorded]:
            _complete(run(work, missing, on_record=tally), made.location)
        n_instances = join(records, grid, min_voxels=made.fingerprint["min_voxels"], watch=watch)
        joined.write_bytes(json.dumps({"instances": n_instances}).encode())
    watch.begin("instances", n_blocks=len(grid), n_done=len(done))
    missing = [index for index in range(len(grid)) if index not in done]
    _complete(run(InstanceBlocks(work, made.location / "0"), missing, on_record=tally), made.location)


def _published(image: Image, made: Labels, records: Records) -> Labels:
    """List a complete volume in its image, say how many instances it has, and remove the records."""
    if told := (records.folder / _JOINED).read_json():
        made = replace(made, provenance={**(made.provenance or {}), **told})
        describe_labels(image, made)
    if not is_published(made) or told:
        publish(image, made)
    records.folder.delete()
    return made


def _complete(failed: tuple[Quarantined, ...], location: Location) -> None:
    """Refuse to go on where blocks failed."""
    if failed:
        which = ", ".join(str(each.index) for each in failed[:10])
        raise QuarantineError(
            f"every block must succeed, got {len(failed)} that failed again and again in {location} (blocks {which}), "
            f"the first with: {failed[0].cause}; mend the cause and run the same command again: it does those alone",
            {each.index: each.cause for each in failed},
        )
