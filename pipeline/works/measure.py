"""The work of measuring: what each block of an image adds to the statistics of the whole, and of each slice."""

from __future__ import annotations

import io
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.runner import BlockRecord
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.store.location import Location, storage_errors
from pipeline.store.moments import Moments
from pipeline.store.reading import open_voxels
from pipeline.store.statistics import Histogram


@dataclass(frozen=True, slots=True)
class MeasureBlocks:
    """The work of measuring blocks that are stored already; see BlockWork."""

    uses_device: ClassVar[bool] = False
    source: Location
    grid: BlockGrid
    notes: Notes

    def setup(self) -> Any:  # noqa: ANN401
        """Open the array."""
        return open_voxels(self.source)

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Measure one block."""
        core, begin = self.grid.block(index).core, perf_counter()
        with storage_errors(self.source):
            voxels = np.asarray(state[(slice(None), *core.slices)])
            read = perf_counter()
            self.notes.put(index, voxels, core)
        return BlockRecord(index, core.n_voxels, read - begin, 0.0, perf_counter() - read)


@dataclass(frozen=True, slots=True)
class Notes:
    """What was measured of each block, in a file of its own, until all of it is added up."""

    folder: Location

    def put(self, index: int, voxels: NDArray[Any], core: Box) -> None:
        """Keep the histogram of each channel of a block, (channels, *core.shape), and of a volume its moments."""
        stream = io.BytesIO()
        parts: dict[str, Any] = {"dtype": np.zeros(0, voxels.dtype)}
        for channel, h in enumerate(map(Histogram.of, voxels)):
            parts[f"keys{channel}"], parts[f"counts{channel}"] = h.keys, h.counts
            parts[f"sums{channel}"] = np.array([h.minimum, h.maximum, h.total, h.spread])
        if core.ndim == 3:
            moments = Moments.of(voxels, start=core.start[0])
            place = np.array([moments.start, moments.count])
            parts |= {"place": place, "total": moments.total, "spread": moments.spread}
        np.savez_compressed(stream, **parts)
        self._file(index).write_bytes(stream.getvalue())

    def measured(self) -> set[int]:
        """Return the blocks that there are notes of."""
        return {int(key[:-4]) for key in self.folder.files() if key.endswith(".npz") and key[:-4].isdigit()}

    def of(self, index: int, *, n_channels: int) -> tuple[tuple[Histogram, ...], Moments | None]:
        """Return the histogram of each channel of a block, and of a volume its moments."""
        with np.load(io.BytesIO(self._file(index).read_bytes()), allow_pickle=False) as parts:
            histograms = tuple(
                Histogram(parts["dtype"].dtype, parts[f"keys{c}"], parts[f"counts{c}"], *map(float, parts[f"sums{c}"]))
                for c in range(n_channels)
            )
            if "place" not in parts:
                return histograms, None
            start, count = map(int, parts["place"])
            return histograms, Moments(start, count, parts["total"], parts["spread"])

    def _file(self, index: int) -> Location:
        return self.folder / f"{index}.npz"
