"""Lesson: what a network is to learn, from images and their labels on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import Sliceable
from pipeline.store.image import Image, open_image
from pipeline.store.labels import Labels, label_location, open_labels
from pipeline.store.reading import open_voxels
from pipeline.unet.borders import Borders, Separated, in_memory
from pipeline.unet.learner import training_rule
from pipeline.unet.patches import Patches, orientations
from pipeline.unet.recipe import Recipe, choose_dims
from pipeline.unet.resampled import Steps, about_as_large, seen_region, steps_between
from pipeline.unet.settings import LARGEST_CLASS, UNetSettings
from pipeline.unet.source import Source

RESIDENT_BYTES = 2**29
INSTANCE_CLASSES = ("background", "object")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Images, their labels, and the patches that a network of these settings learns from.

    Attributes
    ----------
    classes, class_values : names and label values of the classes, ascending
    learn, check : patches to learn from, and those of the parts that are held out
    held_out : the part of each image that is held out; None: nothing of it is
    voxel_size_um : that the network sees, along the images' spatial axes; None where it is not known
    """

    images: tuple[Image, ...]
    truths: tuple[Labels, ...]
    settings: UNetSettings
    classes: tuple[str, ...]
    class_values: tuple[int, ...]
    learn: Patches
    check: Patches
    held_out: tuple[Box | None, ...]
    voxel_size_um: tuple[float, ...] | None


def open_lesson(
    images: Sequence[str], *, labels: str, recipe: Recipe, held_out: Sequence[str] = ()
) -> Lesson:
    """Return what a recipe makes of the label volume ``labels`` of every image.

    Without images that are held out, the last part of every image along its first axis is: the last slices of a volume,
    the bottom of a slide.

    Raises
    ------
    InputError : images, labels and recipe do not fit.
    """
    if not images:
        raise ArgumentError("training needs at least one image, got none; name one")
    opened = [open_image(path) for path in (*images, *held_out)]
    places = [str(image.location.absolute()) for image in opened]
    if both := set(places[: len(images)]) & set(places[len(images) :]):
        raise ArgumentError(f"images that are held out must not be learnt from, got {min(both)}; name it once")
    truths = [open_labels(label_location(image.location, labels)) for image in opened]
    _check_alike(opened, resampled=bool(recipe.voxel_size_um))
    values = _class_values(opened, truths, recipe=recipe)
    if recipe.classes and len(recipe.classes) != len(values):
        raise ArgumentError(f"classes must name the values {values}, got {recipe.classes}; give one name for each")
    names = INSTANCE_CLASSES if recipe.instances else tuple(_class_name(truths[0], value) for value in values)
    size, shapes = _seen_size(opened, recipe=recipe), [_seen_shape(each, recipe.voxel_size_um) for each in opened]
    dims = choose_dims(recipe, shapes=shapes, voxel_size_um=size)
    if size and dims < len(size):
        size = (*(opened[0].voxel_size_um or size)[:-dims], *size[-dims:])
    settings = recipe.network(dims=dims, in_channels=opened[0].n_channels, n_classes=len(values))
    regions = _regions(opened, n_learnt=len(images) if held_out else None, fraction=recipe.validation_fraction)
    patches = _patches(opened, truths, settings=settings, recipe=recipe, values=values, size=size)
    learn, check = (
        replace(patches, sources=tuple(replace(s, region=r) for s, r in zip(patches.sources, side, strict=True) if r))
        for side in zip(*regions, strict=True)
    )  # fmt: skip
    learn = learn if recipe.ignore is None else learn.with_labelled()
    learn = learn.with_foreground(recipe.foreground_share) if recipe.foreground_share else learn
    kept_back = tuple(box for _, box in regions)
    return Lesson(
        tuple(opened), tuple(truths), settings, recipe.classes or names, values, learn, check, kept_back, size
    )  # fmt: skip


def _check_alike(images: list[Image], *, resampled: bool) -> None:
    """Refuse images that one network cannot learn from together."""
    first = images[0]
    for other in images[1:]:
        if (other.n_channels, len(other.spatial_shape)) != (first.n_channels, len(first.spatial_shape)):
            raise ArgumentError(
                f"images must have the same channels and axes, got {first.n_channels} x {first.spatial_shape} and "
                f"{other.n_channels} x {other.spatial_shape} in {other.location}; train one model for each kind"
            )
        sizes = first.voxel_size_um, other.voxel_size_um
        if not resampled and sizes[0] and sizes[1] and not about_as_large(sizes[0], sizes[1]):
            raise ArgumentError(
                f"images must have about the same voxel size, got {first.voxel_size_um} and {other.voxel_size_um} um "
                f"in {other.location}; set voxel_size_um in the recipe to what the network is to see of all"
            )


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
    return (*(images[0].voxel_size_um or ())[: n_axes - len(size)], *size)


def _seen_shape(image: Image, size: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many voxels of this size the network sees of an image."""
    return seen_region(Box.whole(image.spatial_shape), _steps(image, size)).shape


def _steps(image: Image, size: tuple[float, ...]) -> Steps:
    """Return the voxels of an image per voxel of this size, which is along its last axes."""
    own, across = image.voxel_size_um, len(image.spatial_shape) - len(size)
    steps = steps_between(own[across:], size) if own and size else ()
    return (1.0,) * across + steps if steps else ()


def _class_values(images: list[Image], truths: list[Labels], *, recipe: Recipe) -> tuple[int, ...]:
    """Return all label values but the ignored one, ascending, found block by block; of instances, 0 and 1."""
    values: set[int] = set()
    for image, truth in zip(images, truths, strict=True):
        if truth.spatial_shape != image.spatial_shape:
            raise StoreError(
                f"labels must have the image's shape {image.spatial_shape}, got {truth.spatial_shape} at "
                f"{truth.location}; ingest them again"
            )
        if np.dtype(truth.dtype).kind not in "iub":
            raise StoreError(f"labels must be integers, got {truth.dtype} at {truth.location}; convert them")
        array = truth.array
        for block in BlockGrid(truth.spatial_shape, truth.layout.shard):
            found = set(np.unique(np.asarray(array[block.core.slices])).tolist()) - {recipe.ignore}
            values |= {int(value != 0) for value in found} if recipe.instances else found
            if len(values) > LARGEST_CLASS:
                raise ArgumentError(
                    f"labels must have 2 to {LARGEST_CLASS} different values, got more at {truth.location}; if they "
                    "are instances, set instances = true in the recipe or make classes of them, such as boundary and "
                    "interior"
                )
    if len(values) < 2:
        raise ArgumentError(f"labels must have at least 2 different values, got {sorted(values)}; label another class")
    return tuple(sorted(values))


def _patches(
    images: list[Image], truths: list[Labels], *, settings: UNetSettings, recipe: Recipe, values: tuple[int, ...],
    size: tuple[float, ...] | None,
) -> Patches:
    """Return patches of whole images, in which the network sees voxels of this size."""
    rule, core = training_rule(settings), settings.in_proportion(recipe.patch_core(settings))
    if len(images[0].spatial_shape) > settings.dims:
        rule, core = rule.over_slices(), (1, *core)
    spacing = _spacing(size or (1.0,) * len(core), dims=settings.dims)
    turns = orientations(core, halo=rule.halo, voxel_size_um=size)
    turns = turns if recipe.augmentation.flips else turns[:1]
    sources = _sources(images, truths, recipe=recipe, spacing=spacing, dims=settings.dims)
    patches = Patches(
        sources, core, rule.halo, values, settings.dims, turns, recipe.augmentation, spacing[-settings.dims :],
        -1 if recipe.instances and recipe.ignore is not None else recipe.ignore,
    )
    recipe.augmentation.check(patches.tile, spacing=patches.spacing)
    return patches


def _spacing(size: tuple[float, ...], *, dims: int) -> tuple[float, ...]:
    """Return the distance of voxels along every axis, in voxels of the finest that the network sees."""
    return tuple(each / min(size[-dims:]) for each in size)


def _sources(
    images: list[Image], truths: list[Labels], *, recipe: Recipe, spacing: tuple[float, ...], dims: int
) -> tuple[Source, ...]:
    """Return the images with their labels, in memory where they are small."""
    volumes: list[Image | Labels] = [*images, *truths]
    arrays: list[Any] = [each.array for each in volumes]
    n_voxels = sum(prod(image.spatial_shape) for image in images)
    computed_bytes = n_voxels * (2 * recipe.instances + 4 * (recipe.border_weight > 0))
    resident = sum(array.nbytes for array in arrays) + computed_bytes <= RESIDENT_BYTES
    stored: list[Sliceable] = [
        np.asarray(array[:]) if resident else open_voxels(each.location / each.levels[0].path)
        for array, each in zip(arrays, volumes, strict=True)
    ]
    n, axes, sources = len(images), tuple(range(len(spacing) - dims, len(spacing))), []
    for image, voxels, ids in zip(images, stored[:n], stored[n:], strict=True):
        labels, borders, steps = ids, None, _steps(image, recipe.voxel_size_um[-dims:])
        keep: Callable[[Sliceable], Sliceable] = in_memory if resident else lambda computed: computed
        if recipe.instances:
            labels = keep(Separated(ids, axes, recipe.ignore))
        if recipe.border_weight:
            about = recipe.border_weight, recipe.border_sigma_voxels, recipe.ignore
            own = tuple(s / step for s, step in zip(spacing, steps or (1.0,) * len(spacing), strict=True))
            borders = keep(Borders(ids, axes, own, *about))
        windows = recipe.scaling.windows(image.statistics, dtype=image.dtype)
        sources.append(Source(voxels, labels, windows, Box.whole(image.spatial_shape), borders, steps))
    return tuple(sources)


def _regions(
    images: list[Image], *, n_learnt: int | None, fraction: float
) -> list[tuple[Box | None, Box | None]]:
    """Return of each image what to learn from and what to hold out: all of the first ``n_learnt``, or parts of each."""
    if n_learnt is None:
        return [_split(image.spatial_shape, fraction) for image in images]
    boxes = [Box.whole(image.spatial_shape) for image in images]
    return [(box, None) if number < n_learnt else (None, box) for number, box in enumerate(boxes)]


def _split(shape: tuple[int, ...], fraction: float) -> tuple[Box, Box]:
    """Return the region to learn from and the slab held out: the end of the first axis of more than one voxel."""
    axis = next((axis for axis, n in enumerate(shape) if n > 1), None)
    if axis is None:
        raise ArgumentError(f"an image must have at least two voxels to learn and to hold out, got shape {shape}")
    n = shape[axis]
    cut = n - min(n - 1, max(1, round(n * fraction)))
    whole = Box.whole(shape)
    stop = tuple(cut if i == axis else m for i, m in enumerate(shape))
    start = tuple(cut if i == axis else 0 for i in range(len(shape)))
    return Box(whole.start, stop), Box(start, whole.stop)


def _class_name(truth: Labels, value: int) -> str:
    """Return what the labels call a value, where they were made by a model; else the value itself."""
    return truth.classes[value] if value < len(truth.classes) else f"class {value}"
