"""Segment: an image and a model become a label volume, or what a network without classes predicts, block by block.

What an earlier, killed run has done is kept.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from pipeline.compute.levels import build_levels
from pipeline.compute.retries import Retries, RetriesWatch
from pipeline.compute.runner import BlockRecord, Quarantined, RunBlocks, run_serial
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.config import Scheme
from pipeline.errors import QuarantineError, StoreError
from pipeline.identity import identity
from pipeline.ingest import ingest, measure
from pipeline.plan import USUAL, Plan, check_fit, given_tile
from pipeline.scans.backend import open_scan
from pipeline.store.image import read_image
from pipeline.store.labels import Labels, check_name
from pipeline.store.location import Location, storage_errors
from pipeline.store.probabilities import create_probabilities, publish_probabilities
from pipeline.store.results import Result, create_result, downsampling, is_published, publish_result, read_result
from pipeline.unet.model import load_model
from pipeline.verify import certify

_NOT_IN_NAMES = re.compile(r"[^\w.+-]")


@dataclass(frozen=True, slots=True)
class Segmented:
    """What a run has done; seconds are summed over the workers, ``wall_s`` is what the user waited.

    ``n_run`` blocks of ``n_voxels_run`` voxels were done now, the others by an earlier run.
    """

    result: Result
    n_voxels: int
    n_blocks: int
    n_run: int
    n_voxels_run: int
    n_voxels_read: int
    wall_s: float
    read_s: float
    wait_s: float
    compute_s: float
    write_s: float
    peak_rss_bytes: int
    certificate: dict[str, Any] | None
    retries: Retries

    @property
    def labels(self) -> Labels:
        """The result of a network that has classes."""
        assert isinstance(self.result, Labels)
        return self.result

    @property
    def voxels_per_s(self) -> float:
        """Voxels segmented by this run per second that the user waited."""
        return self.n_voxels_run / self.wall_s

    @property
    def read_amplification(self) -> float:
        """Voxels read per voxel segmented."""
        return self.n_voxels_read / max(1, self.n_voxels_run)

    @property
    def stages(self) -> tuple[tuple[str, float], ...]:
        """Seconds by stage, summed over the workers."""
        return ("read", self.read_s), ("wait", self.wait_s), ("compute", self.compute_s), ("write", self.write_s)

    @property
    def idle_share(self) -> float:
        """Share of its time that the device waited for voxels or for room for results."""
        return self.wait_s / max(1e-9, self.wait_s + self.compute_s)

    def to_json(self) -> dict[str, Any]:
        """Return what was done as a JSON object."""
        return {
            "voxels": self.n_voxels, "blocks": self.n_blocks, "blocks_run": self.n_run,
            "blocks_kept": self.n_blocks - self.n_run, "wall_s": self.wall_s, "voxels_per_s": self.voxels_per_s,
            "read_amplification": self.read_amplification, "idle_share": self.idle_share,
            **{f"{stage}_s": seconds for stage, seconds in self.stages},
            "peak_rss_bytes": self.peak_rss_bytes, "certificate": self.certificate, **self.retries.to_json(),
        }  # fmt: skip


class _Tally:
    """Adds up the records of a run."""

    def __init__(self, watch: Watcher) -> None:
        self._watch = watch
        self.n_voxels_read = self.peak_rss_bytes = 0
        self.read_s = self.wait_s = self.compute_s = self.write_s = 0.0

    def __call__(self, record: BlockRecord) -> None:
        self.n_voxels_read += record.n_voxels_read
        self.read_s += record.read_s
        self.wait_s += record.wait_s
        self.compute_s += record.compute_s
        self.write_s += record.write_s
        self.peak_rss_bytes = max(self.peak_rss_bytes, record.peak_rss_bytes)
        self._watch.advance(record)


def segment(plan: Plan, *, run: RunBlocks, watch: Watcher = UNWATCHED) -> Segmented:
    """Make the volume of a plan: whole, with its pyramid, and listed in the image once it is complete.

    Raises
    ------
    QuarantineError : some blocks failed again and again; all others are done, and the same call does those alone.
    StorageError : the disk is full; the same call goes on from what is done.
    """
    begin, result, likely = perf_counter(), plan.result, plan.probabilities
    watch = again = RetriesWatch(watch)
    tally = _Tally(watch)
    with storage_errors(result.location):
        if likely:
            create_probabilities(plan.image, likely)
        create_result(plan.image, result)
        done = plan.done()
        watch.begin("segment", n_blocks=len(plan.grid), n_done=len(done))
        failed = _run(plan, done, run=run, tally=tally) if len(done) < len(plan.grid) else ()
        failed = failed or build_levels(
            result.location, result.levels, layout=result.layout, how=downsampling(result), run=run, watch=watch
        )
        if failed:
            which = ", ".join(str(each.index) for each in failed[:10])
            raise QuarantineError(
                f"every block must succeed, got {len(failed)} that failed again and again (blocks {which}), the first "
                f"with: {failed[0].cause}; mend the cause and run the same command again: it does those alone",
                {each.index: each.cause for each in failed}, retries=again.retries.told,
            )
        if likely:
            publish_probabilities(plan.image, likely)
        certificate = _published(plan, run=run, watch=watch)
    n_voxels, n_kept = prod(plan.grid.shape), sum(plan.grid.block(index).core.n_voxels for index in done)
    return Segmented(
        result, n_voxels, len(plan.grid), len(plan.grid) - len(done), n_voxels - n_kept, tally.n_voxels_read,
        perf_counter() - begin, tally.read_s, tally.wait_s, tally.compute_s, tally.write_s, tally.peak_rss_bytes,
        certificate, again.retries,
    )  # fmt: skip


def _published(plan: Plan, *, run: RunBlocks, watch: Watcher) -> dict[str, Any] | None:
    """Publish a complete volume with a certificate of how exact it is, which is made once; returns it."""
    there = read_result(plan.image.location, plan.result.location.name)
    if there is not None and is_published(there):
        return there.certificate
    certificate = certify(plan, run=run, watch=watch)
    document = certificate.to_json() if certificate else None
    publish_result(plan.image, replace(plan.result, certificate=document))
    return document


def _run(plan: Plan, done: set[int], *, run: RunBlocks, tally: _Tally) -> tuple[Quarantined, ...]:
    """Run what is missing; returns the blocks that failed again and again.

    Of a column that fails, each block is tried alone, so that no good one is lost with a bad one.
    """
    if plan.columns is None:
        return run(plan.work(), (index for index in range(len(plan.grid)) if index not in done), on_record=tally)
    columns = plan.columns.grid(plan.grid)
    unfinished = (
        column.index for column in columns
        if any(block.index not in done for block in plan.grid.within(column.core))
    )  # fmt: skip
    failed = run(plan.work(), unfinished, on_record=tally)
    if not failed or len(columns) == len(plan.grid):
        return failed
    done = plan.done()
    left = [
        block.index for each in failed for block in plan.grid.within(columns.block(each.index).core)
        if block.index not in done
    ]  # fmt: skip
    return run(plan.work(blocks=(1,) * len(plan.grid.shape)), left, on_record=tally)


def as_image(
    path: str, *, model: str, name: str, scheme: Scheme = USUAL, run: RunBlocks = run_serial,
    watch: Watcher = UNWATCHED,
) -> str:
    """Return the path of the image at ``path``; a scan is ingested beside itself first, if it can be segmented then.

    ``scan.tif`` becomes ``scan.zarr``; what is a Zarr of another maker, ``x.zarr``, becomes ``x.haloseg.zarr``. An
    image of this scan that lies there already is taken as it is, whatever its chunks and voxel size, unless the model
    goes by statistics of slices, which an older haloseg did not measure: these are added.
    """
    if read_image(Location(path)) is not None:
        return path
    check_name(name)
    _check_outside_images(path)
    network, scan = load_model(model), open_scan(path)
    spatial = [d for d in scan.dims if d != "c"]
    check_fit(network, n_spatial=len(spatial), n_channels=scan.sizes.get("c", 1), path=model)
    if scheme.tile:
        given_tile(network, scheme.tile)
    if scheme.slab:
        network.unet.check_slab(scheme.slab)
    beside = image_beside(path)
    there = read_image(beside)
    if there is not None and there.statistics and identity(path, scan).items() <= there.scan.items():
        if there.lacks_slices and network.scaling.is_slicewise:
            measure(there, run=run, watch=watch)
        return str(beside)
    return str(ingest(path, str(beside), run=run, watch=watch).location)


def _check_outside_images(path: str) -> None:
    """Refuse what lies in an image, its labels or a level of it: an image made of that would lie in there as well."""
    above = Location(path.partition("::")[0]).absolute()
    for _ in ("0", "NAME", "labels"):
        above = above.parent
        if not above.is_local and above.parent.url.endswith(":/"):  # a bucket
            return
        if read_image(above) is not None:
            raise StoreError(f"a scan must not lie in an image, got {path} in {above}; name the image instead")


def image_of(path: str) -> str:
    """Return where the image of a scan is or will be; an image is its own."""
    return path if read_image(Location(path)) is not None else str(image_beside(path))


def image_beside(path: str) -> Location:
    """Return where a scan's image goes: ``scan.zarr``, ``x.haloseg.zarr`` of a Zarr, or beside a glob's folder.

    Of what is named in a file or folder, ``x::NAME``, it is ``x.NAME.zarr``, so that each has an image of its own.
    """
    place, _, inner = path.partition("::")
    file = Location(place.rstrip("/"))
    while glob.has_magic(file.name) and not file.exists():  # what exists is a name, brackets or not
        file = file.parent
    stem = file.name if Path(file.url).is_dir() else stem_of(file.name)
    if file.name.endswith(".zarr"):
        stem = f"{stem_of(file.name)}.haloseg"
    named = _NOT_IN_NAMES.sub("-", inner.strip().strip("/"))
    return file.parent / f"{stem}{named and f'.{named}'}.zarr"


def stem_of(name: str) -> str:
    """Return a file's name without its ending, of which .nii.gz is one."""
    if name.lower().endswith(".nii.gz"):
        return name[: -len(".nii.gz")]
    return name.rpartition(".")[0] or name
