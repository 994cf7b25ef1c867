"""Lesson: what a network is to learn, from images and their labels or target images on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, cast

import numpy as np

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.geometry.held_out import split
from pipeline.geometry.mirror import Sliceable
from pipeline.store.image import Image, open_image
from pipeline.store.labels import Labels
from pipeline.store.reading import chunk_cache, open_voxels
from pipeline.store.scaling import Window
from pipeline.truths import Truth, check_alike, check_asked, of_labels, of_targets
from pipeline.unet.settings import UNetSettings
from pipeline.unet.training.borders import Borders, Separated, in_memory
from pipeline.unet.training.dims import choose_dims
from pipeline.unet.training.learner import training_rule
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.overlapping import Overlapping
from pipeline.unet.training.patches import Patches
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.resampled import Steps, seen_region, steps_between
from pipeline.unet.training.source import Source
from pipeline.unet.training.targets import UNKNOWN, Known, Target

RESIDENT_BYTES = 2**29
CACHED_BYTES = 2**31
_FARTHEST = 64  # of a voxel that is seen from one of the image: nanometres taken for micrometres are 1000 apart


@dataclass(frozen=True, slots=True)
class Lesson:
    """Images, their labels or targets, and the patches that a network of these settings learns from.

    Attributes
    ----------
    truths : of each image its label volumes; of losses of values its target image
    classes, class_values : names and label values of the classes, ascending; none of targets
    learn, check : patches to learn from, and those of the parts that are held out
    held_out : the part of each image that is held out; None: nothing of it is
    voxel_size_um : that the network sees, along the images' spatial axes; None where it is not known
    target_windows, input_windows : (offset, scale) of each channel of the targets, and of all images; none of labels
    """

    images: tuple[Image, ...]
    truths: tuple[tuple[Labels | Image, ...], ...]
    settings: UNetSettings
    classes: tuple[str, ...]
    class_values: tuple[int, ...]
    learn: Patches
    check: Patches
    held_out: tuple[Box | None, ...]
    voxel_size_um: tuple[float, ...] | None
    target_windows: tuple[tuple[float, float], ...] = ()
    input_windows: tuple[tuple[float, float], ...] = ()


def open_lesson(
    images: Sequence[str], *, recipe: Recipe, labels: str | None = None, targets: Sequence[str] = (),
    held_out: Sequence[str] = (),
) -> Lesson:
    """Return what a recipe makes of the label volume ``labels`` of every image, or of the image's target.

    Several label volumes, separated by commas, may overlap: a voxel has each label whose volume is not zero there.

    Without images that are held out, a part of every image along its first axis is: the last slices of a volume, the
    bottom of a slide, or others where these lack a class (``held_out.split``).

    Parameters
    ----------
    targets : paths or URLs of the images that the network is to make, in the order of ``images`` and ``held_out``

    Raises
    ------
    InputError : images, labels or targets, and recipe do not fit.
    """
    if not images:
        raise ArgumentError("training needs at least one image, got none; name one")
    check_asked(recipe, labels=labels, targets=targets, n_images=len(images) + len(held_out))
    opened = [open_image(path) for path in (*images, *held_out)]
    places = [str(image.location.absolute()) for image in opened]
    if both := set(places[: len(images)]) & set(places[len(images) :]):
        raise ArgumentError(f"images that are held out must not be learnt from, got {min(both)}; name it once")
    check_alike(opened, resampled=bool(recipe.voxel_size_um), neighbours=recipe.neighbours)
    truth = of_labels(opened, labels, recipe=recipe) if labels else of_targets(opened, targets, n_learnt=len(images))
    size, shapes = _seen_size(opened, recipe=recipe), [_seen_shape(each, recipe.voxel_size_um) for each in opened]
    dims = choose_dims(recipe, shapes=shapes, voxel_size_um=size)
    recipe.scaling.check_dims(dims)
    if size and dims < len(size):
        size = (*(opened[0].voxel_size_um or size)[:-dims], *size[-dims:])
    settings = recipe.network(dims=dims, in_channels=opened[0].n_channels, n_classes=truth.n_outputs)
    regions = _regions(opened, truth, n_learnt=len(images) if held_out else None, fraction=recipe.validation_fraction)
    patches = _patches(opened, truth, settings=settings, recipe=recipe, size=size)
    learn, check = (_within(patches, side) for side in zip(*regions, strict=True))
    learn = learn if recipe.ignore is None else learn.with_labelled()
    learn = learn.with_foreground(recipe.foreground_share) if recipe.foreground_share else learn
    return Lesson(
        tuple(opened), truth.volumes, settings, truth.classes, truth.class_values, learn, check,
        tuple(kept[0] if kept else None for _, kept in regions), size, truth.windows, truth.input_windows,
    )  # fmt: skip


def _seen_size(images: list[Image], *, recipe: Recipe) -> tuple[float, ...] | None:
    """Return the voxel size that the network is to see, along the images' spatial axes."""
    size, n_axes = recipe.voxel_size_um, len(images[0].spatial_shape)
    if not size:
        return images[0].voxel_size_um
    if untold := [image for image in images if image.voxel_size_um is None]:
        raise ArgumentError(
            f"voxel_size_um needs images that tell their own, got none in {untold[0].location}; ingest it again with "
            "--voxel-size-um"
        )
    if len(size) != n_axes and not (len(size) == recipe.dims == 2):
        raise ArgumentError(
            f"voxel_size_um needs {n_axes} numbers for images of {images[0].spatial_shape}, got {size}; give one for "
            "each axis, or for slices of volumes set dims = 2"
        )
    for image in images:
        steps = _steps(image, size)
        if steps and not 1 / _FARTHEST <= min(steps) <= max(steps) <= _FARTHEST:
            raise ArgumentError(
                f"voxel_size_um must be at most {_FARTHEST} times the images' or a {_FARTHEST}th, got {size} for "
                f"{image.voxel_size_um} in {image.location}; give micrometres"
            )
    return (*(images[0].voxel_size_um or ())[: n_axes - len(size)], *size)


def _seen_shape(image: Image, size: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many voxels of this size the network sees of an image."""
    return seen_region(Box.whole(image.spatial_shape), _steps(image, size)).shape


def _steps(image: Image, size: tuple[float, ...]) -> Steps:
    """Return the voxels of an image per voxel of this size, which is along its last axes."""
    own, across = image.voxel_size_um, len(image.spatial_shape) - len(size)
    steps = steps_between(own[across:], size) if own and size else ()
    return (1.0,) * across + steps if steps else ()


def _patches(
    images: list[Image], truth: Truth, *, settings: UNetSettings, recipe: Recipe, size: tuple[float, ...] | None
) -> Patches:
    """Return patches of whole images, in which the network sees voxels of this size."""
    rule, core = training_rule(settings), settings.in_proportion(recipe.patch_core(settings))
    if len(images[0].spatial_shape) > settings.dims:
        rule, core = rule.over_slices(settings.neighbours), (1, *core)
    spacing = _spacing(size or (1.0,) * len(core), dims=settings.dims)
    turns = orientations(core, halo=rule.halo, voxel_size_um=size)
    turns = turns if recipe.augmentation.flips else turns[:1]
    stored = _stored(images, truth.volumes, recipe=recipe)
    if truth.windows:
        sources = _targeted(images, truth, stored, recipe=recipe, dims=settings.dims)
    else:
        sources = _labelled(images, stored, recipe=recipe, spacing=spacing, dims=settings.dims)
    ignored = UNKNOWN if truth.windows else -1 if recipe.instances else recipe.ignore
    patches = Patches(
        sources, core, rule.halo, () if truth.n_overlapping else truth.class_values or (0,), settings.dims, turns,
        recipe.augmentation, spacing[-settings.dims :], None if recipe.ignore is None else ignored,
        n_overlapping=truth.n_overlapping,
    )  # fmt: skip
    recipe.augmentation.check(patches.tile, spacing=patches.spacing)
    return patches


def _spacing(size: tuple[float, ...], *, dims: int) -> tuple[float, ...]:
    """Return the distance of voxels along every axis, in voxels of the finest that the network sees."""
    return tuple(each / min(size[-dims:]) for each in size)


_Stored = list[tuple[Sliceable, tuple[Sliceable, ...]]]


def _stored(images: list[Image], truths: Sequence[tuple[Labels | Image, ...]], *, recipe: Recipe) -> _Stored:
    """Return the voxels of each image and of its truths, in memory where they are small, else the chunks used last."""
    volumes = [(image, *truth) for image, truth in zip(images, truths, strict=True)]
    n_voxels = sum(prod(image.spatial_shape) for image in images)
    computed_bytes = n_voxels * (recipe.instances + 4 * (recipe.border_weight > 0) + 4 * (len(truths[0]) > 1))
    every: list[Any] = [each.array for own in volumes for each in own]
    resident = sum(array.nbytes for array in every) + computed_bytes <= RESIDENT_BYTES
    cache = chunk_cache(CACHED_BYTES)

    def voxels(volume: Labels | Image) -> Sliceable:
        if resident:
            return np.asarray(volume.array[:])
        return cast("Sliceable", open_voxels(volume.location / volume.levels[0].path, cache=cache))

    return [(voxels(image), tuple(map(voxels, truth))) for image, *truth in volumes]


def _targeted(
    images: list[Image], truth: Truth, stored: _Stored, *, recipe: Recipe, dims: int
) -> tuple[Source, ...]:
    """Return the images with their targets."""
    windows, sources = tuple(Window(*each) for each in truth.input_windows), []
    for image, (target,), (voxels, (goal,)) in zip(images, truth.volumes, stored, strict=True):
        assert isinstance(target, Image)
        spans = tuple(each.maximum - each.minimum for each in target.statistics)
        known, about = Known(goal, recipe.ignore), Target(goal, truth.windows, spans)
        steps = _steps(image, recipe.voxel_size_um[-dims:])
        sources.append(Source(voxels, known, windows, Box.whole(image.spatial_shape), None, steps, about))
    return tuple(sources)


def _labelled(
    images: list[Image], stored: _Stored, *, recipe: Recipe, spacing: tuple[float, ...], dims: int
) -> tuple[Source, ...]:
    """Return the images with their labels, and with what follows from these."""
    axes, sources = tuple(range(len(spacing) - dims, len(spacing))), []
    resident = isinstance(stored[0][0], np.ndarray)
    for image, (voxels, (ids, *others)) in zip(images, stored, strict=True):
        labels, borders, steps = ids, None, _steps(image, recipe.voxel_size_um[-dims:])
        keep: Callable[[Sliceable], Sliceable] = in_memory if resident else lambda computed: computed
        apart = partial(Separated, axes=axes if recipe.instances else (), ignore=recipe.ignore)
        if others:
            labels = keep(Overlapping(tuple(map(apart, (ids, *others)))))
        elif recipe.instances:
            labels = keep(apart(ids))
        if recipe.border_weight:
            about = recipe.border_weight, recipe.border_sigma_voxels, recipe.ignore
            own = tuple(s / step for s, step in zip(spacing, steps or (1.0,) * len(spacing), strict=True))
            borders = keep(Borders(ids, axes, own, *about))
        windows = image.windows(recipe.scaling)
        sources.append(Source(voxels, labels, windows, Box.whole(image.spatial_shape), borders, steps))
    return tuple(sources)


def _regions(
    images: list[Image], truth: Truth, *, n_learnt: int | None, fraction: float
) -> list[tuple[tuple[Box, ...], tuple[Box, ...]]]:
    """Return of each image what to learn from and what to hold out: all of the first ``n_learnt``, or parts of each."""
    shapes = [image.spatial_shape for image in images]
    if n_learnt is None:
        every = zip(shapes, truth.occurrences or (None,) * len(shapes), strict=True)
        return [split(shape, fraction=fraction, occurrences=found) for shape, found in every]
    boxes = [Box.whole(shape) for shape in shapes]
    return [((box,), ()) if number < n_learnt else ((), (box,)) for number, box in enumerate(boxes)]


def _within(patches: Patches, regions: Sequence[tuple[Box, ...]]) -> Patches:
    """Return the patches of these regions of each image."""
    of = zip(patches.sources, regions, strict=True)
    return replace(patches, sources=tuple(replace(source, region=box) for source, boxes in of for box in boxes))
