"""ColumnPredictor: a column's classes or values, rows as they come, as one pass over the whole scan would give them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.store.scaling import Windows, of_slices
from pipeline.unet.engine import Engine
from pipeline.unet.numbers import Pairs, batched, exactly, normalised
from pipeline.unet.readout import Readout
from pipeline.unet.streaming import Stream
from pipeline.unet.transfer import Leaving, staged


class DeviceFullError(Exception):
    """A device had not the memory for a column of this width."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a column that are done.

    Attributes
    ----------
    box : where in the scan
    classes : uint8, shape ``box.shape``; None for a linear head
    reals : float32, shape (n_classes, *box.shape): probabilities where they were asked for, values of a linear head
    """

    box: Box
    classes: NDArray[np.uint8] | None
    reals: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Rows on their way from the device."""

    box: Box
    classes: Leaving | None
    reals: Leaving | None

    def arrived(self) -> Rows:
        """Return the rows once they are on the host."""
        classes = self.classes.arrived()[0] if self.classes else None
        return Rows(self.box, classes, self.reals.arrived() if self.reals else None)


class ColumnPredictor:
    """Runs a network over columns; neither columns nor slabs change the result.

        host     |give 1|give 2|take 1|give 3|take 2|...
        device          |--- 1 ---|--- 2 ---|--- 3 ---|       always has the next slab at hand

    Parameters
    ----------
    engines : their first axis is the streamed one; of several, with the same settings, the probabilities are averaged
    windows : of each channel of the scan; the network sees ``(intensity - offset) * scale`` within limits, in float32
    slab : rows that enter at once
    target_windows : of a linear head, as the model has them
    n_ahead : slabs that the device is given before the results of an earlier one are taken; by default 1 for a GPU
    """

    def __init__(
        self, *engines: Engine, windows: Windows, slab: int, target_windows: Pairs = (), n_ahead: int | None = None
    ) -> None:
        engine = engines[0]
        settings = engine.settings
        if len(windows) != settings.image_channels:
            raise ArgumentError(
                f"a predictor needs {settings.image_channels} windows, got {len(windows)}; give the model's own"
            )
        self.engines, self.engine, self.windows, self.slab = engines, engine, windows, slab
        self.readout = Readout(settings.head, target_windows)
        self._n_ahead = int(engine.device.type == "cuda") if n_ahead is None else n_ahead

    def staged(self, raw: NDArray[Any]) -> Tensor:
        """Return voxels as ``run`` takes them; meant for the thread that has read them."""
        return staged(raw, device=self.engine.device)

    def stream(self, core: Box) -> tuple[Stream, list[Box]]:
        """Return the stream for a core of the scan, and the boxes that must be read for it, in order.

        A core of one axis more than the network's is run slice by slice, and read with the neighbours that it sees.
        """
        slices = core.ndim - self.engine.dims
        axis, *across = (slices + each for each in self.engine.order)
        stream = Stream(*self.engines, cross=tuple((core.start[a], core.stop[a]) for a in across), slab=self.slab)
        boxes = []
        for rows in stream.slabs(core.start[axis], core.stop[axis]):
            spans = dict(zip((axis, *across), (rows, *stream.cross), strict=True))
            spans |= {at: self._with_neighbours(core) for at in range(slices)}
            boxes.append(Box(tuple(spans[at][0] for at in range(core.ndim)),
                             tuple(spans[at][1] for at in range(core.ndim))))
        return stream, boxes

    def run(
        self, core: Box, stream: Stream, slabs: Iterator[Tensor], *, probabilities: bool
    ) -> Iterator[Rows]:
        """Yield the core's rows, each once and in order.

        Parameters
        ----------
        slabs : voxels of the boxes that ``stream`` named, mirrored outside the scan, shape (channels, *box.shape), as
            ``staged`` gives them

        Raises
        ------
        DeviceFullError : a narrower core may fit.
        """
        slices = core.ndim - self.engine.dims
        axis = slices + self.engine.order[0]
        windows = of_slices(self.windows, *self._with_neighbours(core))
        outputs = stream.run(
            core.start[axis], core.stop[axis], lambda _low, _high: self._entering(next(slabs), windows),
            n_batch=core.shape[0] if slices else 1,
        )  # fmt: skip
        given = deque[_Leaving]()
        while (rows := self._given(core, outputs, probabilities=probabilities)) is not None:
            given.append(rows)
            del rows
            if len(given) > self._n_ahead:
                yield given.popleft().arrived()
        while given:
            yield given.popleft().arrived()

    def _given(
        self, core: Box, outputs: Iterator[tuple[int, Tensor]], *, probabilities: bool
    ) -> _Leaving | None:
        """Give the device the next rows to do; None if there are no more."""
        slices, readout = core.ndim - self.engine.dims, self.readout
        axis = slices + self.engine.order[0]
        try:
            with torch.inference_mode(), exactly(tf32=self.engine.tf32):
                row, logits = next(outputs, (0, None))
                if logits is None:
                    return None
                best = readout.classes(logits)[:, None] if readout.has_classes else None
                classes = None if best is None else self._leaving(best, slices)
                with_reals = probabilities or not readout.has_classes
                reals = self._leaving(readout.reals(logits), slices) if with_reals else None
        except torch.OutOfMemoryError as error:
            raise DeviceFullError from error
        start, stop = list(core.start), list(core.stop)
        start[axis], stop[axis] = row, row + logits.shape[2]
        return _Leaving(Box(tuple(start), tuple(stop)), classes, reals)

    def _with_neighbours(self, core: Box) -> tuple[int, int]:
        """Return the slices of a volume that are seen for those of a core."""
        n = self.engine.settings.neighbours
        return core.start[0] - n, core.stop[0] + n

    def _entering(self, voxels: Tensor, windows: Windows) -> Tensor:
        """Return voxels (channels, *image's axes) as the engine takes them: (batch, channels, *its axes)."""
        x = normalised(voxels, windows, device=self.engine.device).to(self.engine.dtype)
        x = batched(x, dims=self.engine.dims, neighbours=self.engine.settings.neighbours)
        x = x.permute(0, 1, *(2 + axis for axis in self.engine.order))
        return x.contiguous(memory_format=self.engine.memory_format)

    def _leaving(self, y: Tensor, slices: int) -> Leaving:
        """Return (batch, channels, *engine's axes) as (channels, *image's axes), on its way to the host."""
        back = sorted(range(self.engine.dims), key=lambda at: self.engine.order[at])
        y = y.permute(0, 1, *(2 + at for at in back))
        return Leaving.of(y.transpose(0, 1) if slices else y[0])
