"""Truths: what images are to be learnt with, their labels or the target images that are to be made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.held_out import long_axis
from pipeline.store.image import Image, open_image
from pipeline.store.labels import Labels, label_location, open_labels
from pipeline.unet.settings import LARGEST_CLASS
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.overlapping import MOST_LABELS
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.resampled import about_as_large
from pipeline.unet.training.targets import common_windows

INSTANCE_CLASSES = ("background", "object")
NONE = "none"


@dataclass(frozen=True, slots=True)
class Truth:
    """What a network is to make of images.

    Attributes
    ----------
    volumes : of each image its labels, of which there may be several, or its target
    n_outputs : classes, overlapping labels and none of them, or channels of the targets
    classes, class_values : names and label values of the classes, ascending; none of targets
    occurrences : voxels of each class or overlapping label in each plane of a volume, (classes, planes of its long
        axis); none of targets
    windows, input_windows : (offset, scale) of each channel of the targets, and of their images; none of labels
    """

    volumes: tuple[tuple[Labels | Image, ...], ...]
    n_outputs: int
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    occurrences: tuple[NDArray[np.int64], ...] = ()
    windows: tuple[tuple[float, float], ...] = ()
    input_windows: tuple[tuple[float, float], ...] = ()

    @property
    def n_overlapping(self) -> int:
        """Labels that a voxel may have any number of; 0 where it is of one class."""
        return len(self.volumes[0]) if len(self.volumes[0]) > 1 else 0


def of_labels(images: list[Image], names: str, *, recipe: Recipe) -> Truth:
    """Return the label volume of this name of every image; or of several names, separated by commas, which overlap."""
    each = [_named(images, name) for name in names.split(",")]
    if len(each) > 1:
        return _overlapping(each, names.split(","), recipe=recipe)
    (volumes,) = each
    values, occurrences = _occurrences(volumes, recipe=recipe)
    if recipe.classes and len(recipe.classes) != len(values):
        raise ArgumentError(f"classes must name the values {values}, got {recipe.classes}; give one name for each")
    usual = INSTANCE_CLASSES if recipe.instances else tuple(_class_name(volumes[0], value) for value in values)
    return Truth(tuple((each,) for each in volumes), len(values), recipe.classes or usual, values, occurrences)


def _named(images: list[Image], name: str) -> list[Labels]:
    """Return the label volume of this name of every image."""
    volumes = [open_labels(label_location(image.location, name)) for image in images]
    _check_shapes(images, volumes)
    return volumes


def _overlapping(each: list[list[Labels]], names: list[str], *, recipe: Recipe) -> Truth:
    """Return label volumes, those of one name after the other, of which a voxel may be in any number: where not zero.

    Raises
    ------
    ArgumentError : the recipe has settings for classes that exclude each other, or a label is nowhere or everywhere.
    """
    if len(set(names)) < len(names) or len(names) > MOST_LABELS:
        raise ArgumentError(
            f"overlapping labels must be at most {MOST_LABELS} different volumes, got {','.join(names)}; name each once"
        )
    if not recipe.loss.is_of_labels:
        raise ArgumentError(
            f"overlapping labels need a loss that takes each for itself, got {recipe.loss} for {','.join(names)}; set "
            f'loss = "{Loss.BINARY_CROSS_ENTROPY}" or "{Loss.DICE_BINARY_CROSS_ENTROPY}" in the recipe, or name one '
            "label volume"
        )
    if asked := [name for name in ("border_weight", "balance_classes") if getattr(recipe, name)]:
        raise ArgumentError(
            f"overlapping labels have no weights of classes or of borders, got {', '.join(asked)}; leave that out"
        )
    if len(classes := recipe.classes or (NONE, *names)) != len(names) + 1:
        raise ArgumentError(
            f"classes must name none and each of the labels {','.join(names)}, got {classes}; give {len(names) + 1}"
        )
    there = [_occurrences(volumes, recipe=replace(recipe, instances=True))[1] for volumes in each]
    occurrences = tuple(np.stack([found[1] for found in image]) for image in zip(*there, strict=True))
    return Truth(tuple(zip(*each, strict=True)), len(classes), classes, tuple(range(len(classes))), occurrences)


def of_targets(images: list[Image], paths: Sequence[str], *, n_learnt: int) -> Truth:
    """Return the target of every image; both are normalised alike everywhere, by those that are learnt from.

    An image that is brighter than another is to be made brighter: its own statistics would hide that.
    """
    volumes = [open_image(path) for path in paths]
    check_alike(volumes, resampled=True)  # their voxels are those of their images
    _check_shapes(images, volumes)
    windows, seen = (
        common_windows([each.statistics for each in kind[:n_learnt]]) for kind in (volumes, images)
    )  # fmt: skip
    return Truth(tuple((each,) for each in volumes), volumes[0].n_channels, windows=windows, input_windows=seen)


def check_asked(recipe: Recipe, *, labels: str | None, targets: Sequence[str], n_images: int) -> None:
    """Refuse what is not one kind of truth, or not the one that the loss compares with."""
    if bool(labels) == bool(targets):
        raise ArgumentError("a network learns labels or target images, got both or neither; give one of them")
    if recipe.loss.is_of_values != bool(targets):
        got = "target images; set l1 in the recipe" if targets else "labels; give target images, or set another loss"
        raise ArgumentError(f"losses l1 and l2 learn target images, the others labels, got {recipe.loss} and {got}")
    if targets and len(targets) != n_images:
        raise ArgumentError(
            f"each image needs its target, in the same order, those of images held out last, got {len(targets)} for "
            f"{n_images} images; name one for each"
        )


def _check_shapes(images: list[Image], truths: Sequence[Labels | Image]) -> None:
    """Refuse truths of other shapes than their images."""
    for image, truth in zip(images, truths, strict=True):
        if truth.spatial_shape != image.spatial_shape:
            kind = "labels" if isinstance(truth, Labels) else "a target"
            raise StoreError(
                f"{kind} must have the image's shape {image.spatial_shape}, got {truth.spatial_shape} at "
                f"{truth.location}; ingest them again"
            )


def check_alike(images: list[Image], *, resampled: bool, neighbours: int = 0) -> None:
    """Refuse images that one network cannot learn from together.

    Parameters
    ----------
    resampled : it sees one voxel size of all, but between slices, of which it sees so many ``neighbours``
    """
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
        if neighbours and sizes[0] and sizes[1] and not about_as_large(sizes[0][:1], sizes[1][:1]):
            raise ArgumentError(
                f"images whose neighbouring slices are seen must have them about as far apart, got {sizes[0][0]:g} and "
                f"{sizes[1][0]:g} um in {other.location}; leave neighbours out, or train one model for each"
            )


def _occurrences(truths: list[Labels], *, recipe: Recipe) -> tuple[tuple[int, ...], tuple[NDArray[np.int64], ...]]:
    """Return all label values but the ignored one, ascending, and how often each is in each plane of each volume.

    Of instances the values are 0 and 1. All is found block by block.
    """
    tallies, values = [], set[int]()
    for truth in truths:
        if np.dtype(truth.dtype).kind not in "iub":
            raise StoreError(f"labels must be integers, got {truth.dtype} at {truth.location}; convert them")
        tallies.append(tally := dict[int, NDArray[np.int64]]())
        array, axis, shape = truth.array, long_axis(truth.spatial_shape), truth.spatial_shape
        others = tuple(at for at in range(len(shape)) if at != axis)
        for block in BlockGrid(shape, truth.layout.shard):
            voxels = np.asarray(array[block.core.slices])
            known = voxels if recipe.ignore is None else voxels[voxels != recipe.ignore]
            found = list(map(int, np.unique(known != 0 if recipe.instances else known).tolist()))  # of uint64 too
            values.update(found)
            if len(values) > LARGEST_CLASS:
                raise ArgumentError(
                    f"labels must have 2 to {LARGEST_CLASS} different values, got more at {truth.location}; if they "
                    "are instances, set instances = true in the recipe or make classes of them, such as boundary and "
                    "interior"
                )
            for value in found:
                here = (voxels != 0) & (voxels != recipe.ignore) if recipe.instances and value else voxels == value
                counts = tally.setdefault(value, np.zeros(shape[axis], dtype=np.int64))
                counts[block.core.slices[axis]] += np.count_nonzero(here, axis=others)
    if len(values) < 2:
        raise ArgumentError(f"labels must have at least 2 different values, got {sorted(values)}; label another class")
    every = tuple(sorted(values))
    nowhere = [np.zeros(truth.spatial_shape[long_axis(truth.spatial_shape)], dtype=np.int64) for truth in truths]
    return every, tuple(
        np.stack([tally.get(value, none) for value in every]) for tally, none in zip(tallies, nowhere, strict=True)
    )


def _class_name(truth: Labels, value: int) -> str:
    """Return what the labels call a value, where they were made by a model; else the value itself."""
    return truth.classes[value] if 0 <= value < len(truth.classes) else f"class {value}"
