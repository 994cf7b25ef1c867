"""Report: a picture of an image and its labels, or its prediction, small enough to look at whatever the scan's size."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box
from pipeline.store.arrays import open_array
from pipeline.store.image import Image
from pipeline.store.labels import Labels, colour_of
from pipeline.store.predictions import Prediction
from pipeline.store.results import Result

_LARGEST = 512
_GAP = 8
_OPACITY = 0.45


def picture(image: Image, result: Result, *, truth: Labels | None = None) -> bytes:
    """Return a PNG: the image, the truth over it where there is one, and the labels over it, side by side.

    A prediction stands beside the image, grey or in colours as it is.

    Shows the middle slice of a volume, at the finest level that is at most 512 voxels along y and x; of a larger
    coarsest level its middle. Small scans are enlarged.
    """
    index = next((i for i, level in enumerate(image.levels) if max(level.shape[-2:]) <= _LARGEST), -1)
    index = index % len(image.levels)
    region = _region(image.levels[index].shape)
    grey = _grey(image, index, region)
    panels = [grey]
    for each in (truth, result):
        if each is None:
            continue
        array = open_array(each.location / each.levels[index].path)
        if isinstance(each, Prediction):
            panels.append(_of_prediction(array, region))
        else:
            plane = np.asarray(array[region.slices]).reshape(grey.shape[:2])
            panels.append(_over(grey, plane, _values(each, plane, result)))
    gap = np.full((grey.shape[0], _GAP, 3), 255, dtype=np.uint8)
    strip = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    enlarged = max(1, _LARGEST // max(grey.shape))
    return bytes(imagecodecs.png_encode(strip.repeat(enlarged, axis=0).repeat(enlarged, axis=1)))


def _region(shape: tuple[int, ...]) -> Box:
    """Return the middle slice, and of it the middle where it is too large to look at."""
    depth = shape[:-2]
    start = tuple(n // 2 for n in depth) + tuple(max(0, (n - _LARGEST) // 2) for n in shape[-2:])
    return Box(start, tuple(n // 2 + 1 for n in depth) + tuple(
        a + min(n, _LARGEST) for a, n in zip(start[-2:], shape[-2:], strict=True)
    ))


def _grey(image: Image, index: int, region: Box) -> NDArray[np.uint8]:
    """Return the voxels as (y, x, 3), from the image's 0.1st percentile to its 99.9th."""
    voxels = np.asarray(image.level(index)[(slice(None), *region.slices)], dtype=np.float64)
    percentiles = [dict(each.percentiles) for each in image.statistics]
    return _shown(voxels, [(at[0.1], at[99.9]) for at in percentiles])


def _of_prediction(array: Any, region: Box) -> NDArray[np.uint8]:  # noqa: ANN401 a Zarr array
    """Return the values as (y, x, 3), from the 0.1st percentile of what is shown to its 99.9th."""
    values = np.asarray(array[(slice(None), *region.slices)], dtype=np.float64)
    return _shown(values, [tuple(np.percentile(each, (0.1, 99.9))) for each in values])


def _shown(voxels: NDArray[np.float64], ranges: list[tuple[float, float]]) -> NDArray[np.uint8]:
    """Return voxels (channels, *region) as (y, x, 3): the first three as red, green and blue, or the first as grey."""
    shown = []
    for channel in (0, 1, 2) if len(voxels) >= 3 else (0, 0, 0):
        low, high = ranges[channel]
        plane = voxels[channel].reshape(voxels.shape[-2:])
        shown.append(np.clip((plane - low) / max(high - low, 1e-12), 0, 1) * 255)
    return np.stack(shown, axis=-1).astype(np.uint8)


def _values(labels: Labels, plane: NDArray[Any], result: Result) -> tuple[int, ...]:
    """Return the values of the labels in the order of their classes: a truth has the result's colours.

    A truth has them by the values that the model learned from, or by their order, as ``evaluate`` has it, whichever
    more of what is in the slice is among; what is not, such as voxels that training ignored, has no colour.
    """
    there = set(map(int, np.unique(plane).tolist()))
    if labels.classes or not isinstance(result, Labels):
        return tuple(range(len(labels.classes))) or tuple(sorted(there))
    indices = tuple(range(len(result.classes)))
    return max((result.class_values, indices), key=lambda known: len(there.intersection(known)))


def _over(grey: NDArray[np.uint8], plane: NDArray[Any], values: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the picture with each label but the first in its colour."""
    out = grey.astype(np.float64)
    for position, value in enumerate(values):
        if position:
            where = plane == value
            out[where] = (1 - _OPACITY) * out[where] + _OPACITY * np.array(colour_of(position))
    return out.astype(np.uint8)
