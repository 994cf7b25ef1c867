"""The work of certifying: sampled boxes of a result computed again by the reference, over a larger window."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from time import perf_counter
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.metrics import count_wrong_box
from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord, peak_rss_bytes
from pipeline.config import Precision
from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.geometry.tiles import TileRule
from pipeline.unet.column import ColumnPredictor, DeviceFullError
from pipeline.unet.model import networks_of
from pipeline.unet.numbers import Pairs
from pipeline.unet.predict import Predictor
from pipeline.unet.settings import Head
from pipeline.unet.turns import mean_of
from pipeline.works.blocks import Opened, SegmentBlocks
from pipeline.works.columns import SegmentColumns, parts_of

TOLERANCE = 1e-5
VALUE_TOLERANCE = 1e-4  # rounding in float32 came to 2e-5 standard deviations, bfloat16 to 1e-2


@dataclass(frozen=True, slots=True)
class Certified(BlockRecord):
    """What one box came to.

    Attributes
    ----------
    max_difference : of the probabilities, between the run's engine and the reference, in two digits
    n_flipped : voxels whose stored class is not the reference's
    n_flipped_decided : of them those where the reference's best two probabilities are further apart than rounding
    """

    max_difference: float = 0.0
    n_flipped: int = 0
    n_flipped_decided: int = 0

    @property
    def is_right(self) -> bool:
        """Whether the stored classes are the reference's but for rounding in float32."""
        return not self.n_flipped_decided


@dataclass(frozen=True, slots=True)
class CertifiedValues(BlockRecord):
    """What one box of a prediction came to.

    Attributes
    ----------
    max_difference, max_difference_std : of the stored values from the reference, in two digits: in the target's
        intensities, and in standard deviations of the target
    n_beyond : voxels where it is beyond rounding; see ``beyond_rounding``
    """

    max_difference: float = 0.0
    max_difference_std: float = 0.0
    n_beyond: int = 0

    @property
    def is_right(self) -> bool:
        """Whether the stored values are the reference's but for rounding in float32."""
        return not self.n_beyond


@dataclass(frozen=True, slots=True)
class CertifyBoxes:
    """Compares boxes of a label volume, or of a prediction, with the reference; see BlockWork.

        |hhhhhhhhh|ccccc|hhhhhhhhh|       what the run's engine sees: the halo that it needs
        |s|hhhhhhhhh|ccccc|hhhhhhhhh|s|   what the reference sees: one stride more on each side

    Attributes
    ----------
    segmenting : the work that made the volume
    boxes : start on multiples of the stride
    tile_shape : of the reference, along the network's axes
    rule : over the image's axes
    """

    uses_device: ClassVar[bool] = True
    segmenting: SegmentColumns | SegmentBlocks
    boxes: tuple[Box, ...]
    tile_shape: tuple[int, ...]
    rule: TileRule

    def setup(self) -> tuple[Opened, Predictor]:
        """Open what the run has opened, and the reference."""
        opened, out = self.segmenting.setup(), self.segmenting.outputs
        reference = Predictor(
            mean_of(networks_of(opened.model, out.device), out.tta), opened.model.rule, windows=opened.windows,
            tile_shape=self.tile_shape, device=out.device, on_tile=beat,
            target_windows=opened.model.target_windows,
        )  # fmt: skip
        return opened, reference

    def run(self, state: tuple[Opened, Predictor], index: int) -> Certified | CertifiedValues:
        """Compare one box; one in float32 that is wrong beyond rounding counts for the alert."""
        found = self._compared(state, index)
        if self.segmenting.outputs.precision is Precision.FLOAT32 and not found.is_right:
            count_wrong_box()
        return found

    def _compared(self, state: tuple[Opened, Predictor], index: int) -> Certified | CertifiedValues:
        opened, reference = state
        core, begin = self.boxes[index], perf_counter()
        strides, slices = zip(self.rule.stride, self.rule.halo, strict=True), self.rule.ndim - reference.rule.ndim
        wider = tuple(s if h and axis >= slices else 0 for axis, (s, h) in enumerate(strides))
        wide = core.round_up(self.rule.stride).grow(wider)
        voxels = read_mirrored(opened.image, wide.grow(self.rule.halo))
        inside = core.inside(wide)
        if opened.labels is None:
            values = reference.values(voxels, wide)[(slice(None), *inside)]
            return self._of_values(opened, values, index, begin)
        classes, likely = reference.segment_with_probabilities(voxels, wide)
        expected, got = likely[(slice(None), *inside)], self._by_engine(opened, core)
        ordered = np.sort(expected, axis=0)
        margin = ordered[-1] - ordered[-2] if len(ordered) > 1 else np.ones(core.shape)
        if reference.network.settings.head is Head.SIGMOID:
            margin = np.minimum(margin, 2 * np.abs(ordered[-1] - 0.5))
        flipped = np.asarray(opened.labels[core.slices]) != classes[inside]
        return Certified(
            index, core.n_voxels, 0.0, perf_counter() - begin, 0.0, peak_rss_bytes(), n_blocks=1,
            max_difference=two_digits(float(np.abs(got - expected).max())), n_flipped=int(flipped.sum()),
            n_flipped_decided=int((flipped & (margin > 2 * TOLERANCE)).sum()),
        )  # fmt: skip

    def _of_values(
        self, opened: Opened, expected: NDArray[np.float32], index: int, begin: float
    ) -> CertifiedValues:
        """Compare the stored values of one box."""
        core, windows = self.boxes[index], opened.model.target_windows
        stored = np.asarray(opened.reals[(slice(None), *core.slices)])
        far = np.abs(stored.astype(np.float64) - expected)
        in_std = far * np.array([scale for _, scale in windows]).reshape(-1, *(1,) * core.ndim)
        return CertifiedValues(
            index, core.n_voxels, 0.0, perf_counter() - begin, 0.0, peak_rss_bytes(), n_blocks=1,
            max_difference=two_digits(float(far.max())), max_difference_std=two_digits(float(in_std.max())),
            n_beyond=int(beyond_rounding(stored, expected, windows).any(axis=0).sum()),
        )  # fmt: skip

    def _by_engine(self, opened: Opened, core: Box) -> NDArray[np.float32]:
        """Return the probabilities of a box, (n_classes, *core.shape), as the run computes them."""
        if isinstance(self.segmenting, SegmentColumns):
            while True:
                try:
                    return self._streamed(opened, core)
                except DeviceFullError:
                    (part, *_) = parts_of(core, opened.part_shape)
                    opened.part_shape = self.segmenting.smaller(part.shape)
        tile = core.round_up(self.rule.stride).grow(self.rule.halo)
        _, probabilities = opened.predictor.segment_with_probabilities(read_mirrored(opened.image, tile), core)
        return np.asarray(probabilities)

    def _streamed(self, opened: Opened, core: Box) -> NDArray[np.float32]:
        """Return the probabilities of a box by streams through its parts, which are a column's or smaller."""
        predictor: ColumnPredictor = opened.predictor
        likely = np.empty((predictor.engine.settings.n_classes, *core.shape), np.float32)
        for part in parts_of(core, opened.part_shape):
            stream, boxes = predictor.stream(part)
            slabs = (predictor.staged(read_mirrored(opened.image, box)) for box in boxes)
            for rows in predictor.run(part, stream, slabs, probabilities=True):
                beat()
                likely[(slice(None), *rows.box.inside(core))] = rows.reals
        return likely


def beyond_rounding(
    stored: NDArray[np.float32], expected: NDArray[np.float32], windows: Pairs
) -> NDArray[np.bool_]:
    """Return which values differ by more than rounding in float32 explains; all of shape (channels, *spatial).

    That is VALUE_TOLERANCE of the target's standard deviation, or of the value's distance from its mean where this is
    larger, and one step of float32 at the value.
    """
    offset, scale = np.array(windows).T.reshape(2, -1, *(1,) * (expected.ndim - 1))
    most = VALUE_TOLERANCE * np.maximum(1 / scale, np.abs(expected - offset)) + np.spacing(np.abs(expected))
    beyond: NDArray[np.bool_] = ~(np.abs(stored.astype(np.float64) - expected) <= most)
    return beyond


def two_digits(number: float) -> float:
    """Return a number as it is told."""
    return float(f"{number:.1e}")


def sample_boxes(
    shape: tuple[int, ...], *, largest: tuple[int, ...], stride: tuple[int, ...], n: int, seed: int
) -> tuple[Box, ...]:
    """Return ``n`` boxes that start on multiples of the stride, or all that there are where these are fewer.

    The first corner's, the last one's, then any; each once.
    """
    steps = tuple(-(-max(0, size - most) // step) for size, most, step in zip(shape, largest, stride, strict=True))
    places = [(0,) * len(shape), steps]
    if n >= prod(step + 1 for step in steps):
        places += product(*(range(step + 1) for step in steps))
    else:
        rng, found = np.random.default_rng(seed), set(places)
        while len(found) < n:
            places.append(tuple(int(rng.integers(step + 1)) for step in steps))
            found.add(places[-1])
    return tuple(_box(place, shape, largest, stride) for place in list(dict.fromkeys(places))[:n])


def _box(
    place: tuple[int, ...], shape: tuple[int, ...], largest: tuple[int, ...], stride: tuple[int, ...]
) -> Box:
    start = tuple(at * step for at, step in zip(place, stride, strict=True))
    return Box(start, tuple(min(a + most, size) for a, most, size in zip(start, largest, shape, strict=True)))
