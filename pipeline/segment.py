"""Segment: an image and a model become a label volume, block by block; what an earlier, killed run has done is kept."""

from __future__ import annotations

import glob
import resource
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from pipeline.compute.levels import build_levels
from pipeline.compute.runner import BlockRecord, RunBlocks
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.errors import QuarantineError, RunError
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.ingest import identity, ingest
from pipeline.plan import Plan, check_fit, given_tile
from pipeline.scans.backend import open_scan
from pipeline.store.arrays import open_array, shard_location, write_shard
from pipeline.store.image import open_image, read_image
from pipeline.store.labels import Labels, check_name, create_labels, publish
from pipeline.store.location import Location, storage_errors
from pipeline.store.probabilities import create_probabilities, publish_probabilities
from pipeline.store.pyramid import Downsampling
from pipeline.unet.model import build, load_model
from pipeline.unet.predict import Predictor


@dataclass(frozen=True, slots=True)
class Segmented:
    """What a run has done; seconds are summed over the workers, ``wall_s`` is what the user waited."""

    labels: Labels
    n_voxels: int
    n_blocks: int
    n_run: int
    wall_s: float
    read_s: float
    compute_s: float
    write_s: float
    peak_rss_bytes: int

    @property
    def voxels_per_s(self) -> float:
        """Voxels segmented by this run per second that the user waited."""
        return self.n_voxels * self.n_run / self.n_blocks / self.wall_s


@dataclass(frozen=True, slots=True)
class SegmentBlocks:
    """The work of segmenting one block: read its tile, run the network, write its shard; see BlockWork."""

    image: Location
    model: str
    model_sha256: str
    labels: Location
    probabilities: Location | None
    grid: BlockGrid
    tile_shape: tuple[int, ...]
    device: str

    def setup(self) -> Any:  # noqa: ANN401
        """Open image and outputs, and put the network on its device."""
        image, model = open_image(self.image), load_model(self.model)
        if model.digest != self.model_sha256:
            raise RunError(
                f"the model must stay the same while it is used, got another file at {self.model}; "
                "put the old one back, or segment to another name"
            )
        windows = tuple(each.window(model.normalisation) for each in image.statistics)
        predictor = Predictor(
            build(model, self.device), model.rule, windows=windows, device=self.device,
            tile_shape=self.tile_shape[-model.settings.dims :],
            n_slices=prod(self.tile_shape[: -model.settings.dims]),
        )
        probabilities = open_array(self.probabilities) if self.probabilities else None
        return image.array, predictor, open_array(self.labels), probabilities

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Segment one block; the label shard is written last, since it is the ledger."""
        image, predictor, labels, probabilities = state
        block = self.grid.block(index)
        begin = perf_counter()
        voxels = read_mirrored(image, block.tile)
        read = perf_counter()
        if probabilities is None:
            classes = predictor.segment(voxels, block.core.shape)
        else:
            classes, likely = predictor.segment_with_probabilities(voxels, block.core.shape)
        computed = perf_counter()
        with storage_errors(self.labels):
            if probabilities is not None:
                write_shard(probabilities, block.core, likely, location=self.probabilities or self.labels)
            if not shard_location(labels, block.core, location=self.labels).exists():
                write_shard(labels, block.core, classes, location=self.labels)
        written = perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return BlockRecord(index, block.core.n_voxels, read - begin, computed - read, written - computed, peak)


def segment(plan: Plan, *, run: RunBlocks, watch: Watcher = UNWATCHED) -> Segmented:
    """Make the label volume of a plan: whole, with its pyramid, and listed in the image once it is complete.

    Raises
    ------
    QuarantineError : some blocks failed again and again; all others are done, and the same call does those alone.
    StorageError : the disk is full; the same call goes on from what is done.
    """
    begin, labels, likely = perf_counter(), plan.labels, plan.probabilities
    records: list[float] = [0, 0.0, 0.0, 0.0, 0]

    with storage_errors(labels.location):
        if likely:
            create_probabilities(plan.image, likely)
        create_labels(plan.image, labels)
        done = plan.done()
        watch.begin("segment", n_blocks=len(plan.grid), n_done=len(done))
        work = SegmentBlocks(
            plan.image.location, plan.model_path, plan.model.digest, labels.location / "0",
            likely.location / "0" if likely else None, plan.grid, plan.tile_shape, plan.device,
        )  # fmt: skip

        def on_record(record: BlockRecord) -> None:
            for at, value in enumerate((1, record.read_s, record.compute_s, record.write_s)):
                records[at] += value
            records[4] = max(records[4], record.peak_rss_bytes)
            watch.advance(record)

        missing = (index for index in range(len(plan.grid)) if index not in done)
        failed = run(work, missing, on_record=on_record) if len(done) < len(plan.grid) else ()
        failed = failed or build_levels(
            labels.location, labels.levels, layout=labels.layout, how=Downsampling.MODE, run=run, watch=watch
        )
        if failed:
            which = ", ".join(str(each.index) for each in failed[:10])
            raise QuarantineError(
                f"every block must succeed, got {len(failed)} that failed again and again (blocks {which}), the first "
                f"with: {failed[0].cause}; mend the cause and run the same command again: it does those alone"
            )
        if likely:
            publish_probabilities(plan.image, likely)
        publish(labels)
    n_run, read_s, compute_s, write_s, peak = records
    return Segmented(
        labels, prod(plan.grid.shape), len(plan.grid), int(n_run), perf_counter() - begin, read_s, compute_s, write_s,
        int(peak),
    )  # fmt: skip


def as_image(
    path: str, *, model: str, name: str, tile: tuple[int, ...] | None = None, watch: Watcher = UNWATCHED
) -> str:
    """Return the path of the image at ``path``; a scan is ingested beside itself first, if it can be segmented then.

    ``scan.tif`` becomes ``scan.zarr``; what is a Zarr of another maker, ``x.zarr``, becomes ``x.haloseg.zarr``. An
    image of this scan that lies there already is taken as it is, whatever its chunks and voxel size.
    """
    if read_image(Location(path)) is not None:
        return path
    check_name(name)
    network, scan = load_model(model), open_scan(path)
    spatial = [d for d in scan.dims if d != "c"]
    check_fit(network, n_spatial=len(spatial), n_channels=scan.sizes.get("c", 1), path=model)
    if tile:
        given_tile(network, tile)
    beside = _beside(path)
    there = read_image(beside)
    if there is not None and there.statistics and identity(path, scan).items() <= there.scan.items():
        return str(beside)
    return str(ingest(path, str(beside), watch=watch).location)


def _beside(path: str) -> Location:
    """Return where a scan's image goes; that of a glob beside the folder in which it looks."""
    file = Location(path.partition("::")[0].rstrip("/"))
    while glob.has_magic(file.name):
        file = file.parent
    stem, dot, ending = file.name.rpartition(".")
    if ending == "zarr":
        stem += ".haloseg"
    elif not dot or Path(file.url).is_dir():
        stem = file.name
    return file.parent / f"{stem}.zarr"
