"""Copying: the voxels of a scan go into an array, shard by shard; what can be read only whole is read once.

A page that is one compressed strip, or a picture, reaches over many shards. These are copied one after another, in one
process, which keeps what it has decoded:

    |--- shard ---|--- shard ---|--- shard ---|    one group: a piece of work
    |============ strip or picture ===========|
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from time import perf_counter
from typing import Any, ClassVar
from weakref import finalize

import numpy as np
import xarray as xr

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord, Quarantined, RunBlocks
from pipeline.compute.watch import Watcher
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.identity import unchanged
from pipeline.labels.whole import as_labels
from pipeline.scans.backend import open_scan
from pipeline.scans.cache import DECODED
from pipeline.store.arrays import done_shards, open_array, shard_location, write_shard
from pipeline.store.location import Location, storage_errors
from pipeline.works.measure import Notes


@dataclass(frozen=True)
class _Opened:
    """What a worker holds open; what was decoded of the scan is let go of with it."""

    scan: xr.DataArray
    target: Any


@dataclass(frozen=True, slots=True)
class IngestBlocks:
    """The work of copying a scan into an array, the shards of a group that are missing; see BlockWork.

    Attributes
    ----------
    grid : the groups; see ``groups_of``
    shards : one block per shard of the array
    notes : where each shard's part of the statistics is left, before the shard; None for labels
    stamps : those of the scan, compared after each reading; None where they are of many files, which are compared at
        the end
    """

    uses_device: ClassVar[bool] = False
    scan: str
    target: Location
    grid: BlockGrid
    shards: BlockGrid
    notes: Notes | None
    stamps: dict[str, Any] | None = None

    def setup(self) -> Any:  # noqa: ANN401
        """Open the scan and the array."""
        with unchanged(self.scan, self.stamps):
            opened = _Opened(open_scan(self.scan), open_array(self.target))
        finalize(opened, DECODED.forget)
        return opened

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Copy what is missing of one group."""
        target = state.target
        n_voxels, n_blocks, read_s, begin = 0, 0, 0.0, perf_counter()
        for block in self.shards.within(self.grid.block(index).core):
            if not shard_location(target, block.core, location=self.target).exists():
                beat()
                read_s += self._copy(state, block)
                n_voxels, n_blocks = n_voxels + block.core.n_voxels, n_blocks + 1
        if self.grid.core_shape != self.shards.core_shape:
            DECODED.forget()  # no other group shares what this one has read whole
        return BlockRecord(index, n_voxels, read_s, 0.0, perf_counter() - begin - read_s, n_blocks=n_blocks)

    def _copy(self, state: Any, block: Block) -> float:  # noqa: ANN401
        """Copy one shard; returns the seconds of reading."""
        scan, target = state.scan, state.target
        core, begin = block.core, perf_counter()
        region = dict(zip(spatial_of(scan), core.slices, strict=True))
        with unchanged(self.scan, self.stamps):
            voxels = np.asarray(scan.isel(region))
            if voxels.dtype != target.dtype:  # booleans, or floats that are labels
                voxels = as_labels(voxels, axes="".join(map(str, scan.dims)), start=core.start, path=self.scan)
        voxels = voxels.reshape(target.shape[: target.ndim - core.ndim] + core.shape)
        read_s = perf_counter() - begin
        with storage_errors(self.target):
            if self.notes is not None:
                self.notes.put(block.index, voxels, core)
            write_shard(target, core, voxels, location=self.target)
        return read_s


def copy(work: IngestBlocks, *, run: RunBlocks, watch: Watcher) -> tuple[Quarantined, ...]:
    """Copy the shards that are missing; returns those that failed again and again.

    Of a group that fails, each shard is tried alone, so that no good one is lost with a bad one.
    """
    done = done_shards(work.target, work.shards)
    watch.begin("ingest", n_blocks=len(work.shards), n_done=len(done))
    todo = [group.index for group in work.grid if any(n not in done for n in _numbers(work, group))]
    failed = run(work, todo, on_record=watch.advance) if todo else ()
    if not failed or len(work.grid) == len(work.shards):
        return failed
    done = done_shards(work.target, work.shards)
    left = [n for each in failed for n in _numbers(work, work.grid.block(each.index)) if n not in done]
    return run(replace(work, grid=work.shards), left, on_record=watch.advance)


def _numbers(work: IngestBlocks, group: Block) -> list[int]:
    return [block.index for block in work.shards.within(group.core)]


def groups_of(scan: xr.DataArray, shards: BlockGrid) -> BlockGrid:
    """Return the shards of a scan in groups that share what can be read only whole; most are of one shard."""
    whole: dict[str, int] = scan.encoding.get("preferred_chunks", {})
    sizes = (whole.get(axis, 1) for axis in spatial_of(scan))
    return BlockGrid(
        shards.shape, tuple(core * ceil(size / core) for core, size in zip(shards.core_shape, sizes, strict=True))
    )


def spatial_of(array: xr.DataArray) -> tuple[str, ...]:
    """Return the names of the axes without the channels."""
    return tuple(str(d) for d in array.dims if d != "c")
