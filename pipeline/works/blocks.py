"""The work of segmenting by blocks: where results go, and one block by overlapping tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord, peak_rss_bytes
from pipeline.config import EngineName, Precision, Tta
from pipeline.errors import RunError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.store.arrays import open_array, shard_location, write_shard
from pipeline.store.image import open_image
from pipeline.store.location import Location, storage_errors
from pipeline.store.reading import open_voxels
from pipeline.store.scaling import Windows
from pipeline.unet.device import pick_device
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.model import Model, load_model, networks_of, unets_of
from pipeline.unet.predict import Predictor
from pipeline.unet.turns import Mean, engines_of, mean_of


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go, and what makes them; see ``Plan``.

    Attributes
    ----------
    labels : None where the network has no classes
    reals : what is written in float32: probabilities, or values of a network without classes; None: nothing
    """

    image: Location
    model: str
    model_sha256: str
    labels: Location | None
    reals: Location | None
    grid: BlockGrid
    device: str
    engine: EngineName
    precision: Precision
    tta: Tta = Tta.NONE

    def opened(self) -> Opened:
        """Open image, model and outputs, on a worker that has the device; freed memory is kept from now on."""
        keep_freed_memory()
        pick_device(self.device)
        image, model = open_image(self.image), loaded(self.model, self.model_sha256)
        windows = model.windows(image)
        labels, reals = (open_array(each) if each else None for each in (self.labels, self.reals))
        return Opened(open_voxels(self.image / "0"), model, windows, labels, reals)

    def is_done(self, opened: Opened, block: Block) -> bool:
        """Whether every output of a block exists."""
        outputs = ((opened.labels, self.labels), (opened.reals, self.reals))
        return all(shard_location(array, block.core, location=at).exists() for array, at in outputs if at)

    def write(
        self, opened: Opened, core: Box, classes: NDArray[np.uint8] | None, reals: NDArray[np.float32] | None
    ) -> None:
        """Write a block's shards, last the ledger's: the labels, or else the values. What is in the ledger stays."""
        ledger = self.labels or self.reals
        assert ledger is not None
        with storage_errors(ledger):
            for array, at, voxels in ((opened.reals, self.reals, reals), (opened.labels, self.labels, classes)):
                done = at is ledger and shard_location(array, core, location=at).exists()
                if at is not None and voxels is not None and not done:
                    write_shard(array, core, voxels, location=at)


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
    reals: Any
    predictor: Any = None
    part_shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentBlocks:
    """The work of segmenting one block by overlapping tiles; see BlockWork."""

    uses_device: ClassVar[bool] = True
    outputs: Outputs
    tile_shape: tuple[int, ...]

    def setup(self) -> Opened:
        """Open image and outputs, and put the network on its device."""
        out = self.outputs
        opened = out.opened()
        dims = opened.model.settings.dims
        opened.predictor = Predictor(
            self._network(opened.model), opened.model.rule,
            windows=opened.windows, device=out.device, tile_shape=self.tile_shape[-dims:],
            n_slices=prod(self.tile_shape[:-dims]), on_tile=beat, target_windows=opened.model.target_windows,
        )  # fmt: skip
        return opened

    def _network(self, model: Model) -> Mean:
        out = self.outputs
        if out.engine is EngineName.REFERENCE:
            return mean_of(networks_of(model, out.device), out.tta)
        engines = engines_of(unets_of(model, out.device), out.tta, device=out.device, precision=out.precision)
        return Mean(engines, model.settings)

    def run(self, state: Opened, index: int) -> BlockRecord:
        """Segment one block: read its tile, run the network, write its shard."""
        block = self.outputs.grid.block(index)
        begin, classes, reals = perf_counter(), None, None
        voxels = read_mirrored(state.image, block.tile)
        read = perf_counter()
        if state.labels is None:
            reals = state.predictor.values(voxels, block.core)
        elif state.reals is None:
            classes = state.predictor.segment(voxels, block.core)
        else:
            classes, reals = state.predictor.segment_with_probabilities(voxels, block.core)
        computed = perf_counter()
        self.outputs.write(state, block.core, classes, reals)
        written = perf_counter()
        return BlockRecord(
            index, block.core.n_voxels, read - begin, computed - read, written - computed, peak_rss_bytes(),
            n_voxels_read=block.tile.clip(self.outputs.grid.shape).n_voxels,
        )  # fmt: skip
