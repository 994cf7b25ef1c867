"""The levels of a pyramid as blocks of work, each level from the one above it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, ClassVar

from pipeline.compute.runner import BlockRecord, Quarantined, RunBlocks
from pipeline.compute.watch import Watcher
from pipeline.geometry.grid import BlockGrid
from pipeline.store.arrays import Layout, done_shards, open_array, write_shard
from pipeline.store.location import Location, storage_errors
from pipeline.store.ngff import Level, halved_axes
from pipeline.store.pyramid import Downsampling, read_downsampled
from pipeline.store.reading import open_voxels


@dataclass(frozen=True, slots=True)
class LevelBlocks:
    """The work of making one level: one block reads the voxels under one shard, and writes the shard; see BlockWork."""

    uses_device: ClassVar[bool] = False
    source: Location
    target: Location
    grid: BlockGrid
    factors: tuple[int, ...]
    how: Downsampling

    def setup(self) -> Any:  # noqa: ANN401
        """Open both levels."""
        return open_voxels(self.source), open_array(self.target)

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Make one shard."""
        source, target = state
        core = self.grid.block(index).core
        begin = perf_counter()
        depth = target.chunks[target.ndim - core.ndim]
        try:
            voxels = read_downsampled(source, core, factors=self.factors, how=self.how, depth=depth)
        except ValueError as error:
            raise ValueError(
                f"{self.source} is damaged above voxels {core.start} to {core.stop} of the next level ({error}); "
                "delete those shards and run the same command again"
            ) from error
        middle = perf_counter()
        with storage_errors(self.target):
            write_shard(target, core, voxels, location=self.target)
        return BlockRecord(index, core.n_voxels, middle - begin, 0.0, perf_counter() - middle)


def build_levels(
    location: Location, levels: tuple[Level, ...], *, layout: Layout, how: Downsampling, run: RunBlocks, watch: Watcher
) -> tuple[Quarantined, ...]:
    """Make every shard that is missing below full resolution; stops at a level of which some blocks failed."""
    for upper, lower in pairwise(levels):
        grid = BlockGrid(lower.shape, layout.shard)
        done = done_shards(location / lower.path, grid)
        work = LevelBlocks(location / upper.path, location / lower.path, grid, halved_axes(upper), how)
        missing = [index for index in range(len(grid)) if index not in done]
        watch.begin(f"pyramid level {lower.path}", n_blocks=len(grid), n_done=len(grid) - len(missing))
        if missing and (failed := run(work, missing, on_record=watch.advance)):
            return failed
    return ()
