"""The work of segmenting by columns: each is read, computed and written as a stream, all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.ahead import WriteBehind, read_ahead
from pipeline.compute.clock import StageClock
from pipeline.compute.metrics import Meter, meter
from pipeline.compute.runner import BlockRecord, peak_rss_bytes
from pipeline.config import Precision, Tta
from pipeline.errors import BudgetError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.geometry.rows import MirroredRows
from pipeline.unet.column import ColumnPredictor, DeviceFullError, Rows
from pipeline.unet.columns import SLABS_AHEAD, Columns
from pipeline.unet.device import peak_device_bytes
from pipeline.unet.engine import Engine
from pipeline.unet.model import unets_of
from pipeline.unet.turns import engines_of
from pipeline.works.blocks import Opened, Outputs, loaded

log = logging.getLogger("haloseg")


@dataclass(frozen=True, slots=True)
class SegmentColumns:
    """The work of segmenting one column of blocks as a stream; see BlockWork and ``unet.streaming``.

    Each shard is written as soon as its rows are complete, and is its own ledger entry: a column that is taken up again
    computes from the first missing shard on. A column whose cross-section is computed in parts writes at its end.
    """

    uses_device: ClassVar[bool] = True
    outputs: Outputs
    columns: Columns

    def setup(self) -> Opened:
        """Open image and outputs, and put the network on its device."""
        out = self.outputs
        opened = out.opened()
        slices = len(out.grid.shape) - opened.model.settings.dims
        engines = _engines(out.model, out.model_sha256, out.device, out.precision, out.tta, self.columns.axis - slices)
        opened.predictor = ColumnPredictor(
            *engines, windows=opened.windows, slab=self.columns.slab, target_windows=opened.model.target_windows
        )
        opened.part_shape = self.columns.part_shape
        return opened

    def run(self, state: Opened, index: int) -> BlockRecord:
        """Segment what is missing of one column."""
        clock, n_read = StageClock(), 0
        column = self.columns.grid(self.outputs.grid).block(index).core
        missing = [block for block in self.outputs.grid.within(column) if not self.outputs.is_done(state, block)]
        for stretch in self._stretches(missing):
            while True:
                todo = [block for block in stretch if not self.outputs.is_done(state, block)]
                try:
                    n_read += self._run_stretch(state, column, todo, clock)
                except DeviceFullError:
                    state.part_shape = self.smaller(state.part_shape)
                else:
                    break
        return BlockRecord(
            index, sum(block.core.n_voxels for block in missing), clock.read_s, clock.compute_s, clock.write_s,
            peak_rss_bytes(), wait_s=clock.wait_s, n_blocks=len(missing), n_voxels_read=n_read,
            device_bytes=peak_device_bytes(self.outputs.device),
        )  # fmt: skip

    def _stretches(self, missing: list[Block]) -> Iterator[list[Block]]:
        """Yield missing blocks whose rows follow one another: each such stretch is one stream."""
        axis, stretch = self.columns.axis, list[Block]()
        for block in sorted(missing, key=lambda each: each.core.start[axis]):
            if stretch and block.core.start[axis] > stretch[-1].core.stop[axis]:
                yield stretch
                stretch = []
            stretch.append(block)
        if stretch:
            yield stretch

    def _run_stretch(self, state: Opened, column: Box, blocks: list[Block], clock: StageClock) -> int:
        """Stream a stretch of a column; returns the voxels read."""
        axis = self.columns.axis
        start, stop = list(column.start), list(column.stop)
        start[axis], stop[axis] = blocks[0].core.start[axis], blocks[-1].core.stop[axis]
        core = Box(tuple(start), tuple(stop))
        parts = parts_of(core, state.part_shape)
        predictor: ColumnPredictor = state.predictor
        _, entering = predictor.stream(core)
        rows = MirroredRows(
            state.image, axis=axis, column=_hull(entering), step=state.image.chunks[1 + axis], keep_all=len(parts) > 1
        )
        n_reals = predictor.engine.settings.n_classes if state.reals is not None else 0
        counted = meter()
        with WriteBehind[_Sheet](lambda sheet: self._write(state, sheet, counted), clock=clock) as behind:
            sheets = _Sheets(
                blocks, axis=axis, core=core, has_classes=state.labels is not None, n_reals=n_reals, put=behind.put
            )
            for part in parts:
                stream, boxes = predictor.stream(part)
                voxels = (predictor.staged(_taken(rows, box, axis)) for box in boxes)
                with read_ahead(voxels, n_ahead=SLABS_AHEAD, clock=clock) as slabs:
                    for done in predictor.run(part, stream, slabs, probabilities=n_reals > 0):
                        sheets.put(done)
                        if counted is not None:
                            counted.spent(clock)
        return rows.n_voxels_read

    def smaller(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """Return a cross-section of half the width, for all that follows: a device's memory ran out."""
        cross = [at for at in range(len(part)) if at != self.columns.axis]
        widest = max(cross, key=lambda at: part[at])
        if part[widest] == 1:
            raise BudgetError(
                "the device needs memory for the narrowest column, got out of memory; free it or use --device cpu"
            )
        smaller = (*part[:widest], -(-part[widest] // 2), *part[widest + 1 :])
        log.warning("out of device memory: parts of %s voxels from now on, same result", smaller)
        return smaller

    def _write(self, state: Opened, sheet: _Sheet, counted: Meter | None) -> None:
        for block in sheet.blocks:
            inside = block.core.inside(sheet.box)
            classes = None if sheet.classes is None else sheet.classes[inside]
            reals = None if sheet.reals is None else sheet.reals[(slice(None), *inside)]
            self.outputs.write(state, block.core, classes, reals)
            if counted is not None:
                counted.wrote(n_voxels=block.core.n_voxels)


@lru_cache(maxsize=1)
def _engines(
    path: str, sha256: str, device: str, precision: Precision, tta: Tta, first: int
) -> tuple[Engine, ...]:
    """Return the engines of a model, which a worker makes once, however many scans it is used for."""
    networks = unets_of(loaded(path, sha256), "cpu")
    return engines_of(networks, tta, device=device, precision=precision, first=first)


@dataclass(slots=True)
class _Sheet:
    """The shards of a column that have the same rows, as their results come in."""

    box: Box
    blocks: list[Block]
    classes: NDArray[np.uint8] | None
    reals: NDArray[np.float32] | None
    n_left: int


class _Sheets:
    """Collects rows until all voxels of a sheet are there, and hands it on."""

    def __init__(
        self, blocks: list[Block], *, axis: int, core: Box, has_classes: bool, n_reals: int,
        put: Callable[[_Sheet], None],
    ) -> None:
        self._axis, self._core, self._put = axis, core, put
        self._has_classes, self._n_reals = has_classes, n_reals
        self._blocks: dict[tuple[int, int], list[Block]] = {}
        for block in blocks:
            self._blocks.setdefault((block.core.start[axis], block.core.stop[axis]), []).append(block)
        self._sheets: dict[tuple[int, int], _Sheet] = {}

    def put(self, rows: Rows) -> None:
        """Take rows that are done."""
        axis = self._axis
        first, last = rows.box.start[axis], rows.box.stop[axis]
        for low, high in [each for each in self._blocks if each[0] < last and first < each[1]]:
            sheet = self._sheets.get((low, high)) or self._new(low, high)
            part = rows.box.intersect(sheet.box)
            source, target = part.inside(rows.box), part.inside(sheet.box)
            if sheet.classes is not None and rows.classes is not None:
                sheet.classes[target] = rows.classes[source]
            if sheet.reals is not None and rows.reals is not None:
                sheet.reals[(slice(None), *target)] = rows.reals[(slice(None), *source)]
            sheet.n_left -= part.n_voxels
            if not sheet.n_left:
                del self._blocks[low, high], self._sheets[low, high]
                self._put(sheet)

    def _new(self, low: int, high: int) -> _Sheet:
        start, stop = list(self._core.start), list(self._core.stop)
        start[self._axis], stop[self._axis] = low, high
        box = Box(tuple(start), tuple(stop))
        classes = np.empty(box.shape, np.uint8) if self._has_classes else None
        reals = np.empty((self._n_reals, *box.shape), np.float32) if self._n_reals else None
        sheet = _Sheet(box, self._blocks[low, high], classes, reals, box.n_voxels)
        self._sheets[low, high] = sheet
        return sheet


def _taken(rows: MirroredRows, box: Box, axis: int) -> NDArray[Any]:
    """Return the voxels of a box out of the rows of the column in which it lies."""
    voxels = rows(box.start[axis], box.stop[axis])
    whole = rows.column
    inside = [
        slice(None) if at == axis else slice(a - w, b - w)
        for at, (a, b, w) in enumerate(zip(box.start, box.stop, whole.start, strict=True))
    ]
    return voxels[(slice(None), *inside)]


def _hull(boxes: list[Box]) -> Box:
    """Return the smallest box around boxes."""
    return Box(
        tuple(min(each) for each in zip(*(box.start for box in boxes), strict=True)),
        tuple(max(each) for each in zip(*(box.stop for box in boxes), strict=True)),
    )


def parts_of(core: Box, part_shape: tuple[int, ...]) -> list[Box]:
    """Return the parts of a box, of so many voxels at most, that are computed one after another."""
    most = tuple(min(a, b) for a, b in zip(part_shape, core.shape, strict=True))
    return [each.core.shift(core.start) for each in BlockGrid(core.shape, most)]
