"""ColumnPredictor: a column's classes or values, rows as they come, as one pass over the whole scan would give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Precision
from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.store.scaling import Windows, of_slices
from pipeline.unet.engine import Engine
from pipeline.unet.numbers import Pairs, exactly, normalised
from pipeline.unet.readout import Readout
from pipeline.unet.streaming import Stream


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


class ColumnPredictor:
    """Runs a network over columns; neither columns nor slabs change the result.

    Parameters
    ----------
    engine : its first axis is the streamed one
    windows : of each channel of the scan; the network sees ``(intensity - offset) * scale`` within limits, in float32
    slab : rows that enter at once
    target_windows : of a linear head, as the model has them
    """

    def __init__(
        self, engine: Engine, *, windows: Windows, slab: int, precision: Precision, target_windows: Pairs = ()
    ) -> None:
        settings = engine.settings
        if len(windows) != settings.in_channels:
            raise ArgumentError(
                f"a predictor needs {settings.in_channels} windows, got {len(windows)}; give the model's own"
            )
        self.engine, self.windows, self.slab, self.precision = engine, windows, slab, precision
        self.readout = Readout(settings.head, target_windows)

    def stream(self, core: Box) -> tuple[Stream, list[Box]]:
        """Return the stream for a core of the scan, and the boxes that must be read for it, in order.

        A core of one axis more than the network's is run slice by slice.
        """
        slices = core.ndim - self.engine.dims
        axis, *across = (slices + each for each in self.engine.order)
        stream = Stream(self.engine, cross=tuple((core.start[a], core.stop[a]) for a in across), slab=self.slab)
        boxes = []
        for rows in stream.slabs(core.start[axis], core.stop[axis]):
            spans = dict(zip((axis, *across), (rows, *stream.cross), strict=True))
            spans |= {at: (core.start[at], core.stop[at]) for at in range(slices)}
            boxes.append(Box(tuple(spans[at][0] for at in range(core.ndim)),
                             tuple(spans[at][1] for at in range(core.ndim))))
        return stream, boxes

    def run(
        self, core: Box, stream: Stream, slabs: Iterator[NDArray[Any]], *, probabilities: bool
    ) -> Iterator[Rows]:
        """Yield the core's rows, each once and in order.

        Parameters
        ----------
        slabs : voxels of the boxes that ``stream`` named, mirrored outside the scan, shape (channels, *box.shape)

        Raises
        ------
        DeviceFullError : a narrower core may fit.
        """
        slices = core.ndim - self.engine.dims
        axis = slices + self.engine.order[0]
        readout, windows = self.readout, of_slices(self.windows, core.start[0], core.stop[0])
        with_reals = probabilities or not readout.has_classes
        outputs = stream.run(
            core.start[axis], core.stop[axis], lambda _low, _high: self._entering(next(slabs), windows, slices),
            n_batch=core.shape[0] if slices else 1,
        )  # fmt: skip
        while True:
            try:
                with torch.inference_mode(), exactly(tf32=self.precision is Precision.TF32):
                    row, logits = next(outputs, (0, None))
                    if logits is None:
                        return
                    best = readout.classes(logits)[:, None] if readout.has_classes else None
                    classes = None if best is None else self._leaving(best, slices)[0]
                    reals = self._leaving(readout.reals(logits), slices) if with_reals else None
            except torch.OutOfMemoryError as error:
                raise DeviceFullError from error
            start, stop = list(core.start), list(core.stop)
            start[axis], stop[axis] = row, row + logits.shape[2]
            yield Rows(Box(tuple(start), tuple(stop)), classes, reals)

    def _entering(self, raw: NDArray[Any], windows: Windows, slices: int) -> Tensor:
        """Return voxels (channels, *image's axes) as the engine takes them: (batch, channels, *its axes)."""
        x = normalised(raw, windows, device=self.engine.device).to(self.engine.dtype)
        x = x.transpose(0, 1) if slices else x[None]
        x = x.permute(0, 1, *(2 + axis for axis in self.engine.order))
        return x.contiguous(memory_format=self.engine.memory_format)

    def _leaving(self, y: Tensor, slices: int) -> NDArray[Any]:
        """Return (batch, channels, *engine's axes) as (channels, *image's axes) on the CPU."""
        back = sorted(range(self.engine.dims), key=lambda at: self.engine.order[at])
        y = y.permute(0, 1, *(2 + at for at in back))
        out: NDArray[Any] = (y.transpose(0, 1) if slices else y[0]).cpu().numpy()
        return out
