"""Preview: a picture of what a network would learn from, changed as its recipe says; and of what it has learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError
from pipeline.lesson import open_lesson
from pipeline.store.labels import colour_of
from pipeline.store.location import check_ours
from pipeline.unet.training.batches import batches
from pipeline.unet.training.overlapping import first_of
from pipeline.unet.training.patches import IGNORED
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.validation import Sample
from pipeline.unet.training.warp import batch_of

N_PATCHES = 6
_WIDTH = 192
_GAP = 4
_OPACITY = 0.35
_UNKNOWN = (90, 0, 0)
_HEAD = 33  # bytes of a PNG's signature and header, after which its maker may be told
_MAKER = b"tEXtSoftware\0haloseg"
_MARK = (len(_MAKER) - 4).to_bytes(4) + _MAKER + crc32(_MAKER).to_bytes(4)


@dataclass(frozen=True, slots=True)
class Preview:
    """What was drawn, and where the picture lies."""

    path: str
    tile: tuple[int, ...]
    n_patches: int

    def to_json(self) -> dict[str, Any]:
        """Return the preview as a JSON object."""
        return {"preview": self.path, "patch_shape": list(self.tile), "patches": self.n_patches}


def preview(
    images: Sequence[str], *, recipe: Recipe, seed: int, path: str, labels: str | None = None,
    targets: Sequence[str] = (), held_out: Sequence[str] = (),
) -> Preview:
    """Write a PNG of the first patches that a training with this seed would see; of volumes their middle slices.

        image    image    image   ...    what enters the network
        labels   labels   labels  ...    over it; unlabelled voxels dark red, what only lends context left clear

    Of overlapping labels the first that a voxel has is shown. Of targets the second row shows what the network is to
    make, what only lends context left white.

    Raises
    ------
    InputError : images, labels and recipe do not fit, or the picture cannot be written there.
    """
    if not path.lower().endswith(".png"):
        raise ArgumentError(f"a preview must be a .png, got {path}; name it so")
    check_ours(Path(path), rule="a preview must not replace another file", mark=_MARK, at=_HEAD)
    if seed < 0:
        raise ArgumentError(f"seed must be at least 0, got {seed}; use 0")
    lesson = open_lesson(images, labels=labels, targets=targets, recipe=recipe, held_out=held_out)
    n = recipe.batch_size(lesson.settings.dims)
    steps = batches(lesson.learn, n, seed=seed, first=1, last=ceil(N_PATCHES / n))
    batch = batch_of([patch for _, drawn in steps for patch in drawn][:N_PATCHES], device="cpu")
    columns = []
    for number, x in enumerate(batch.images.numpy()):
        grey = _grey(_middle(x[lesson.settings.neighbours]))
        if batch.target is None:
            classes = batch.classes[number].numpy()
            below = _over(grey, _middle(first_of(classes) if lesson.learn.n_overlapping else classes))
        else:
            below = _framed(_grey(_middle(batch.target[number, 0].numpy())), grey.shape)
        columns.append(np.concatenate([grey, _gap(grey.shape[1], axis=0), below]))
    enlarged = max(1, _WIDTH // columns[0].shape[1])
    columns = [column.repeat(enlarged, axis=0).repeat(enlarged, axis=1) for column in columns]
    strip = [part for column in columns for part in (column, _gap(columns[0].shape[0], axis=1))][:-1]
    picture = np.concatenate(strip, axis=1)
    try:
        Path(path).write_bytes(_marked(bytes(imagecodecs.png_encode(picture))))
    except OSError as error:
        raise ArgumentError(
            f"a preview must be a file that can be written, got {path} ({error.strerror}); name another place"
        ) from error
    return Preview(path, lesson.learn.tile, N_PATCHES)


def draw_sample(sample: Sample) -> bytes:
    """Return a PNG, side by side: a part of what is held out, its truth, what the network makes of it."""
    x, truth, found = (_middle(each) for each in (sample.image, sample.truth, sample.found))
    inner = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(x.shape, truth.shape, strict=True))
    grey = _grey(x[inner])
    real = truth.dtype.kind == "f"
    panels = [grey, *(_grey(each) if real else _over(grey, each) for each in (truth, found))]
    gap = _gap(grey.shape[0], axis=1)
    strip = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    enlarged = max(1, _WIDTH // grey.shape[1])
    return bytes(imagecodecs.png_encode(strip.repeat(enlarged, axis=0).repeat(enlarged, axis=1)))


def _marked(png: bytes) -> bytes:
    """Return a PNG that says that it is ours."""
    return png[:_HEAD] + _MARK + png[_HEAD:]


def _middle(x: NDArray[Any]) -> NDArray[Any]:
    """Return the middle slice of a volume, (y, x)."""
    return x if x.ndim == 2 else x[x.shape[0] // 2]


def _grey(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the plane as (y, x, 3), its 1st percentile black and its 99th white."""
    low, high = np.percentile(plane, (1, 99))
    shown = np.clip((plane - low) / max(high - low, 1e-12), 0, 1) * 255
    return np.repeat(shown.astype(np.uint8)[..., None], 3, axis=2)


def _over(grey: NDArray[np.uint8], classes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the picture with the classes of its middle, but the first, in their colours."""
    out = grey.astype(np.float64)
    start = [(n - m) // 2 for n, m in zip(grey.shape, classes.shape, strict=False)]
    part = out[tuple(slice(a, a + m) for a, m in zip(start, classes.shape, strict=True))]
    for value in np.unique(classes[classes != 0]).tolist():
        where = classes == value
        colour = _UNKNOWN if value == IGNORED else colour_of(value)
        part[where] = (1 - _OPACITY) * part[where] + _OPACITY * np.array(colour)
    return out.astype(np.uint8)


def _framed(picture: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the picture in the middle of a white one of this shape."""
    out = np.full(shape, 255, dtype=np.uint8)
    start = [(n - m) // 2 for n, m in zip(shape, picture.shape, strict=True)]
    out[tuple(slice(a, a + m) for a, m in zip(start, picture.shape, strict=True))] = picture
    return out


def _gap(length: int, *, axis: int) -> NDArray[np.uint8]:
    """Return a white bar between rows (axis 0) or columns (axis 1) of the picture."""
    shape = (_GAP, length, 3) if axis == 0 else (length, _GAP, 3)
    return np.full(shape, 255, dtype=np.uint8)
