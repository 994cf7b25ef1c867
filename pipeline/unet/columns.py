"""Columns: what streaming a network over a scan costs, in arithmetic and in memory, and the columns that cost least.

A column is a box of whole shards, streamed along one axis. Its cross-section is computed at once where the budget
allows; else in parts, one after another, from voxels that are read once and kept. Wide columns waste less on halos,
short ones keep more workers busy: the choice is the least time of the slowest worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

from pipeline.config import ONE_PASS, Passes
from pipeline.errors import ArgumentError, BudgetError
from pipeline.geometry.grid import BlockGrid
from pipeline.unet.cost import stream_bytes, weight_bytes
from pipeline.unet.families import chain_of
from pipeline.unet.layers import Chain, multiply_adds, spans
from pipeline.unet.schedule import cross_made, rows_made, schedule_of
from pipeline.unet.settings import UNetSettings

# Bytes of the largest layer's slab: smaller ones fall out of the processor's caches late. Of a GPU the host needs 2 to
# 7 ms for the calls of one, while it reads and writes others; at half this size or less the GPU takes 5 to 15 ms for
# it, and was idle for 29 % of a run (measured, H200).
SLAB_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
# Slabs of one stride, whose deepest level is a single row, take this share longer than long ones (measured, 2-D, 3-D).
THIN_SLAB = {2: 0.16, 3: 0.05}
# Multiplications that take as long as a layer's call itself does, with a slab of no voxels (measured: no fewer; of a
# GPU the host's 0.1 ms at 22 to 160 x 10^12 a second, H200).
CALL_MULTIPLY_ADDS = {"cpu": 200_000, "cuda": 3_000_000_000}
LONGEST = 16
SLABS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Columns:
    """How a scan is streamed.

    Attributes
    ----------
    axis : the streamed one, of the image's spatial axes
    slab : rows that enter the network at once
    blocks : shards of a column along each of the image's spatial axes
    part_shape : voxels of the core that are computed at once across the column, along the image's spatial axes; along
        the streamed one the whole column
    """

    axis: int
    slab: int
    blocks: tuple[int, ...]
    part_shape: tuple[int, ...]

    def grid(self, shards: BlockGrid) -> BlockGrid:
        """Return the columns of a scan cut into these shards."""
        return BlockGrid(shards.shape, tuple(c * n for c, n in zip(shards.core_shape, self.blocks, strict=True)))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan of columns takes: multiplications of all layers, and bytes of one worker.

    ``slowest`` is the time of the busiest worker, in multiplications of long slabs, the calls of the layers included.
    """

    multiply_adds: int
    peak_bytes: int
    n_columns: int
    slowest: float


@dataclass(frozen=True, slots=True)
class Streaming:
    """The scan and the network that columns are chosen for.

    Attributes
    ----------
    shards : the label volume's, over the image's spatial axes
    chunk_shape : of the image, along the same axes
    voxel_bytes : of the image, all channels
    output_bytes : of the results, per voxel
    itemsize : bytes of an activation
    passes : whose probabilities are averaged, each a stream of its own beside the others
    """

    settings: UNetSettings
    shards: BlockGrid
    chunk_shape: tuple[int, ...]
    voxel_bytes: int
    output_bytes: int
    itemsize: int
    device: str
    passes: Passes = ONE_PASS

    @property
    def n_slice_axes(self) -> int:
        """Axes in front of the network's: one where a 2-D network runs over the slices of a volume."""
        return len(self.shards.shape) - self.settings.dims

    def choose(
        self, *, budget_bytes: int, n_workers: int, slab: int | None = None, blocks: tuple[int, ...] | None = None
    ) -> tuple[Columns, Cost]:
        """Return the columns that take the slowest of the workers least time, and what they cost.

        Parameters
        ----------
        slab, blocks : taken as they are where they are given

        Raises
        ------
        ArgumentError : the slab is no multiple of the stride, or the blocks are not one number per axis.
        BudgetError : not even the narrowest columns fit.
        """
        self._check(slab, blocks)
        best: tuple[tuple[float, int], Columns, Cost] | None = None
        least = 0
        for columns, peak in self._fitting(budget_bytes, slab, blocks):
            least = min(least or peak, peak)
            if peak <= budget_bytes:
                cost = self.cost(columns, n_workers=n_workers)
                rank = (cost.slowest, cost.peak_bytes)
                if best is None or rank < best[0]:
                    best = rank, columns, cost
        if best is None:
            raise BudgetError(
                f"the narrowest columns need {least:,} bytes, got a budget of {max(0, budget_bytes):,}; raise --budget"
            )
        return best[1], best[2]

    def _check(self, slab: int | None, blocks: tuple[int, ...] | None) -> None:
        if slab is not None:
            self.settings.check_slab(slab)
        if blocks is not None and (len(blocks) != len(self.shards.shape) or min(blocks) < 1):
            raise ArgumentError(
                f"a column needs {len(self.shards.shape)} numbers of shards, at least 1, got {blocks}; "
                "give one per axis"
            )

    def _fitting(
        self, budget_bytes: int, slab: int | None, blocks: tuple[int, ...] | None
    ) -> Iterator[tuple[Columns, int]]:
        """Yield columns of every axis and of shards in all proportions, and their bytes; parts only where needed."""
        counts = self.shards.grid_shape
        for axis in range(self.n_slice_axes, len(counts)):
            choices = [
                [b] if blocks else _shares(n, most=LONGEST if at == axis else n)
                for at, (n, b) in enumerate(zip(counts, blocks or counts, strict=True))
            ]
            for many in product(*choices):
                for part in self._parts(self._core(many), axis):
                    every = [Columns(axis, rows, many, part) for rows in self._slabs(part, axis, slab)]
                    peaks = [self.peak_bytes(columns) for columns in every]
                    yield from zip(every, peaks, strict=True)
                    if min(peaks) <= budget_bytes or any(n > 1 for at, n in enumerate(many) if at != axis):
                        break

    def _core(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        every = zip(self.shards.core_shape, blocks, self.shards.shape, strict=True)
        return tuple(min(c * n, size) for c, n, size in every)

    def _parts(self, core: tuple[int, ...], axis: int) -> Iterator[tuple[int, ...]]:
        """Yield the column's cross-section, slice by slice for a 2-D network, then halves of it, and so on."""
        slices = self.n_slice_axes
        strides = (*(1,) * slices, *self.settings.strides)
        part = (*(1,) * slices, *core[slices:])
        yield part
        cross = [at for at in range(slices, len(core)) if at != axis]
        while wide := [at for at in cross if part[at] > strides[at]]:
            at = max(wide, key=lambda each: part[each])
            part = (*part[:at], -(-part[at] // (2 * strides[at])) * strides[at], *part[at + 1 :])
            yield part

    def _slabs(self, part: tuple[int, ...], axis: int, given: int | None) -> list[int]:
        """Return the stride, twice it and so on, up to a slab of the first level of the right size."""
        if given:
            return [given]
        cross = prod(n for at, n in enumerate(part) if at != axis)
        stride = self.settings.stride
        most = SLAB_BYTES[self.device] // (cross * self.settings.width * self.itemsize * stride)
        most = max(1, min(most, -(-part[axis] // stride)))
        return [stride << doubled for doubled in range(most.bit_length())]

    def cost(self, columns: Columns, *, n_workers: int) -> Cost:
        """Return arithmetic and memory of all columns."""
        total, n_columns, times = 0, 0, list[tuple[float, int]]()
        slow = 1 + THIN_SLAB[self.settings.dims] * (self.settings.stride / columns.slab) ** 2
        for shape, n in self._kinds(columns):
            made = self._column_multiply_adds(columns, shape)
            times.append((slow * made + CALL_MULTIPLY_ADDS[self.device] * self._calls(columns, shape), n))
            total, n_columns = total + n * made, n_columns + n
        return Cost(total, self.peak_bytes(columns), n_columns, _makespan(times, n_workers))

    def multiply_adds_per_row(self, columns: Columns) -> float:
        """Return the multiplications for one row of a part of a column, once the stream is under way."""
        part = tuple(min(n, most) for n, most in zip(self._core(columns.blocks), columns.part_shape, strict=True))
        few, more = (
            self._column_multiply_adds(columns, (*part[: columns.axis], n * columns.slab, *part[columns.axis + 1 :]))
            for n in (64, 128)
        )  # fmt: skip
        return (more - few) / (64 * columns.slab)

    def voxels_read(self, columns: Columns) -> int:
        """Return the voxels that all columns read from the store, whole chunks along the streamed axis."""
        grid, total = columns.grid(self.shards), 1
        chain, beside = chain_of(self.settings), self.settings.neighbours
        for at, (size, core, chunk) in enumerate(zip(grid.shape, grid.core_shape, self.chunk_shape, strict=True)):
            read, along = 0, at - self.n_slice_axes
            for start in range(0, size, core):
                low, high = start, min(size, start + core)
                reached = spans(chain, (low, high), along)[0] if along >= 0 else (low - beside, high + beside)
                low, high = (min(max(0, each), size) for each in reached)
                if at == columns.axis:
                    low, high = low // chunk * chunk, min(size, -(-high // chunk) * chunk)
                read += high - low
            total *= read
        return total

    def _kinds(self, columns: Columns) -> list[tuple[tuple[int, ...], int]]:
        """Return (shape, how many) of the columns of each size: those inside, and those at the far ends."""
        grid = columns.grid(self.shards)
        axes = [
            [(core, size // core)] * (size >= core) + [(size % core, 1)] * (size % core > 0)
            for size, core in zip(grid.shape, grid.core_shape, strict=True)
        ]
        return [(tuple(n for n, _ in kind), prod(m for _, m in kind)) for kind in product(*axes)]

    def _calls(self, columns: Columns, shape: tuple[int, ...]) -> int:
        """Return how often the layers of one column of this shape are called."""
        of = zip(shape, columns.part_shape, strict=True)
        return self.passes.n * len(chain_of(self.settings)) * prod(
            ceil(size / (columns.slab if at == columns.axis else part)) for at, (size, part) in enumerate(of)
        )

    def _column_multiply_adds(self, columns: Columns, shape: tuple[int, ...]) -> int:
        """Return the multiplications of one column of this shape, warm-up and part-filled slabs included."""
        chain = chain_of(self.settings)
        lengths = []
        for along, (size, part) in enumerate(zip(shape, columns.part_shape, strict=True), start=-self.n_slice_axes):
            if along < 0:
                lengths.append([size] * len(chain))
            elif along == columns.axis - self.n_slice_axes:
                lengths.append(rows_made(chain, size, columns.slab, along))
            else:
                cuts = [min(part, size - start) for start in range(0, size, part)]
                lengths.append([sum(each) for each in zip(*(cross_made(chain, n, along) for n in cuts), strict=True)])
        made = zip(chain, zip(*lengths, strict=True), strict=True)
        once: int = sum(multiply_adds(layer, self.settings) * prod(extent) for layer, extent in made)
        return self.passes.n * once

    def peak_bytes(self, columns: Columns) -> int:
        """Return the bytes of one worker: line buffers, waiting skips, the layer at work, voxels and results."""
        slices, axis = self.n_slice_axes, columns.axis
        part = columns.part_shape
        order = (axis - slices, *(at for at in range(self.settings.dims) if at != axis - slices))
        chain = chain_of(self.settings)
        cross = tuple((0, part[slices + at]) for at in order[1:])
        schedule = schedule_of(chain, cross, in_channels=self.settings.in_channels, order=order, slab=columns.slab)
        network = stream_bytes(schedule, itemsize=self.itemsize, n_streams=self.passes.n)
        weights = weight_bytes(chain, itemsize=self.itemsize, passes=self.passes)
        return network + weights + self._buffer_bytes(columns, chain)

    def _buffer_bytes(self, columns: Columns, chain: Chain) -> int:
        """Return the bytes of voxels that were read and of results that are not written yet."""
        core, axis = self._core(columns.blocks), columns.axis
        halo = [-spans(chain, (0, 1), at)[0][0] for at in range(self.settings.dims)]
        halo = [self.settings.neighbours] * self.n_slice_axes + halo
        area = prod(n + 2 * h for at, (n, h) in enumerate(zip(core, halo, strict=True)) if at != axis)
        in_parts = columns.part_shape[:axis] + columns.part_shape[axis + 1 :] != core[:axis] + core[axis + 1 :]
        chunk = self.chunk_shape[axis]
        rows = core[axis] + 2 * halo[axis] if in_parts else (2 + ceil(halo[axis] / chunk)) * chunk
        part = zip(columns.part_shape, halo, strict=True)
        slab_area = prod(n + 2 * h for at, (n, h) in enumerate(part) if at != axis)
        ahead = (SLABS_AHEAD + 2) * columns.slab * slab_area * (self.voxel_bytes + 4 * self.settings.image_channels)
        n_written = core[axis] if in_parts else 2 * self.shards.core_shape[axis]
        written = n_written * prod(n for at, n in enumerate(core) if at != axis) * self.output_bytes
        return rows * area * self.voxel_bytes + ahead + written


def _shares(n: int, *, most: int) -> list[int]:
    """Return how many of n shards a column may take: all, a half, a third and so on, each at most ``most``."""
    every = {ceil(n / pieces) for pieces in range(1, n + 1)}
    fit = sorted(m for m in every if m <= most)
    if len(fit) > 8:
        fit = sorted({fit[round(at * (len(fit) - 1) / 7)] for at in range(8)})
    return fit


def _makespan(kinds: list[tuple[float, int]], n_workers: int) -> float:
    """Return the work of the busiest of the workers, each column going to the one that is free first."""
    total, largest = sum(n * each for each, n in kinds), max(each for each, _ in kinds)
    if sum(n for _, n in kinds) > 64 * n_workers:
        return total / n_workers + largest / 2
    loads = [0.0] * n_workers
    for each, n in sorted(kinds, reverse=True):
        for _ in range(n):
            heapq.heapreplace(loads, loads[0] + each)
    return max(loads)
