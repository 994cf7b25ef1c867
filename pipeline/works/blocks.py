"""The work of segmenting by blocks: where results go, and one block by overlapping tiles."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord
from pipeline.config import EngineName, Precision
from pipeline.errors import RunError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.store.arrays import open_array, shard_location, write_shard
from pipeline.store.image import open_image
from pipeline.store.location import Location, storage_errors
from pipeline.store.reading import open_voxels
from pipeline.unet.engine import keep_freed_memory, make_engine
from pipeline.unet.model import Model, build, build_unet, load_model
from pipeline.unet.numbers import Windows
from pipeline.unet.predict import Predictor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go, and what makes them; see ``Plan``."""

    image: Location
    model: str
    model_sha256: str
    labels: Location
    probabilities: Location | None
    grid: BlockGrid
    device: str
    engine: EngineName
    precision: Precision

    def opened(self) -> Opened:
        """Open image, model and outputs; freed memory is kept from now on."""
        keep_freed_memory()
        image, model = open_image(self.image), loaded(self.model, self.model_sha256)
        windows = model.scaling.windows(image.statistics, dtype=image.dtype)
        probabilities = open_array(self.probabilities) if self.probabilities else None
        return Opened(open_voxels(self.image / "0"), model, windows, open_array(self.labels), probabilities)

    def is_done(self, opened: Opened, block: Block) -> bool:
        """Whether every output of a block exists."""
        outputs = [(opened.labels, self.labels)]
        if opened.probabilities is not None and self.probabilities is not None:
            outputs.append((opened.probabilities, self.probabilities))
        return all(shard_location(array, block.core, location=at).exists() for array, at in outputs)

    def write(
        self, opened: Opened, core: Box, classes: NDArray[np.uint8], likely: NDArray[np.float32] | None
    ) -> None:
        """Write a block's shards, that of the labels last, since it is the ledger; one that is there stays."""
        with storage_errors(self.labels):
            if likely is not None and opened.probabilities is not None and self.probabilities is not None:
                write_shard(opened.probabilities, core, likely, location=self.probabilities)
            if not shard_location(opened.labels, core, location=self.labels).exists():
                write_shard(opened.labels, core, classes, location=self.labels)


@lru_cache(maxsize=4)
def loaded(path: str, sha256: str) -> Model:
    """Return the model of this digest, which a worker loads once, however many scans it is used for."""
    model = load_model(path)
    if model.digest != sha256:
        raise RunError(
            f"the model must stay the same while it is used, got another file at {path}; "
            "put the old one back, or segment to another name"
        )
    return model


@dataclass(slots=True)
class Opened:
    """What a worker holds open: arrays, the model, and what runs it; ``part_shape`` shrinks if the device is full."""

    image: Any
    model: Model
    windows: Windows
    labels: Any
    probabilities: Any
    predictor: Any = None
    part_shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentBlocks:
    """The work of segmenting one block by overlapping tiles; see BlockWork."""

    outputs: Outputs
    tile_shape: tuple[int, ...]

    def setup(self) -> Opened:
        """Open image and outputs, and put the network on its device."""
        out = self.outputs
        opened = out.opened()
        dims, fused = opened.model.settings.dims, out.engine is not EngineName.REFERENCE
        opened.predictor = Predictor(
            make_engine(build_unet(opened.model, out.device), device=out.device, precision=out.precision)
            if fused else build(opened.model, out.device), opened.model.rule,
            windows=opened.windows, device=out.device, tile_shape=self.tile_shape[-dims:],
            n_slices=prod(self.tile_shape[:-dims]), on_tile=beat,
        )  # fmt: skip
        return opened

    def run(self, state: Opened, index: int) -> BlockRecord:
        """Segment one block: read its tile, run the network, write its shard."""
        block = self.outputs.grid.block(index)
        begin, likely = perf_counter(), None
        voxels = read_mirrored(state.image, block.tile)
        read = perf_counter()
        if state.probabilities is None:
            classes = state.predictor.segment(voxels, block.core.shape)
        else:
            classes, likely = state.predictor.segment_with_probabilities(voxels, block.core.shape)
        computed = perf_counter()
        self.outputs.write(state, block.core, classes, likely)
        written = perf_counter()
        return BlockRecord(
            index, block.core.n_voxels, read - begin, computed - read, written - computed, peak_rss_bytes(),
            n_voxels_read=block.tile.clip(self.outputs.grid.shape).n_voxels,
        )  # fmt: skip


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
