"""Train: images and their labels become a model file."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np

from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import Sliceable
from pipeline.store.image import Image, open_image
from pipeline.store.labels import Labels, label_location, open_labels
from pipeline.unet.device import pick_device
from pipeline.unet.fit import Fitted, Validation, fit, training_rule
from pipeline.unet.model import Model, save_model
from pipeline.unet.patches import Patches, Source, orientations
from pipeline.unet.recipe import Recipe, choose_dims, load_recipe
from pipeline.unet.settings import LARGEST_CLASS, UNetSettings, closed_form_rule

RESIDENT_BYTES = 2**29
_SIZE_TOLERANCE = 1.5
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training has made; the model's own record holds the rest."""

    model: Model
    path: str
    best: Validation
    n_steps: int
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        per_class = zip(self.model.classes, self.model.class_values, self.best.dice, strict=True)
        return {
            "model": self.path, "sha256": self.model.digest, "steps": self.n_steps, "wall_s": self.wall_s,
            "best_step": self.best.step, "validation_loss": self.best.loss,
            "parameters": sum(t.numel() for name, t in self.model.weights.items() if not name.endswith(_STATISTICS)),
            "classes": [{"class": name, "value": value, "validation_dice": dice} for name, value, dice in per_class],
        }  # fmt: skip


def train(
    images: Sequence[str], *, labels: str, model: str, recipe: Recipe | None = None, minutes: float | None = None,
    device: str = "cpu", seed: int = 0, on_progress: Callable[[Validation], None] = lambda _: None,
) -> TrainResult:
    """Write a model that has learnt the label volume ``labels`` of every image.

    The last part of every image along its first axis (the last slices of a volume, the bottom of a slide) is held out;
    the weights of lowest loss there are kept.

    Parameters
    ----------
    images : paths or URLs of complete images
    model : path of the model file, written at once at the end
    minutes : stop after so long, if the recipe's steps take longer
    device : "cpu" or "cuda"

    Raises
    ------
    InputError : images, labels and recipe do not fit; nothing was written.
    RunError : the training failed; nothing was written.
    """
    begin, recipe = perf_counter(), recipe or Recipe()
    opened = [open_image(path) for path in images]
    truths = [open_labels(label_location(image.location, labels)) for image in opened]
    _check_alike(opened)
    values = _class_values(opened, truths)
    if recipe.classes and len(recipe.classes) != len(values):
        raise ArgumentError(f"classes must name the values {values}, got {recipe.classes}; give one name for each")
    dims = choose_dims(recipe, shapes=[each.spatial_shape for each in opened], voxel_size_um=opened[0].voxel_size_um)
    settings = recipe.network(dims=dims, in_channels=opened[0].n_channels, n_classes=len(values))
    learn, check = _patches(opened, truths, settings=settings, recipe=recipe, values=values)
    fitted = fit(
        settings, learn, validation=check, recipe=recipe, device=device, seed=seed, minutes=minutes,
        on_progress=on_progress,
    )
    record = _record(opened, truths, recipe=recipe, seed=seed, fitted=fitted, device=device)
    names = recipe.classes or tuple(_class_name(truths[0], value) for value in values)
    made = Model(
        settings, names, values, recipe.normalisation, tuple(map(str, range(settings.in_channels))),
        opened[0].voxel_size_um, closed_form_rule(settings), record, fitted.weights,
    )
    return TrainResult(save_model(made, model), str(model), fitted.best, fitted.n_steps, perf_counter() - begin)


def command(args: Namespace) -> dict[str, Any]:
    """Train as the command line asks, with a line of progress on stderr per validation."""

    def tell(now: Validation) -> None:
        dice = " ".join("-" if d is None else f"{d:.3f}" for d in now.dice)
        sys.stderr.write(f"step {now.step}: loss {now.train_loss:.4f}, held out {now.loss:.4f}, Dice {dice}\n")

    recipe = load_recipe(args.recipe) if args.recipe else Recipe()
    result = train(
        args.images, labels=args.labels, model=args.model, recipe=recipe, minutes=args.minutes,
        device=pick_device(args.device), seed=args.seed, on_progress=tell,
    )
    return result.to_json()


def _check_alike(images: list[Image]) -> None:
    """Refuse images that one network cannot learn from together."""
    if not images:
        raise ArgumentError("training needs at least one image, got none; name one")
    first = images[0]
    for other in images[1:]:
        if (other.n_channels, len(other.spatial_shape)) != (first.n_channels, len(first.spatial_shape)):
            raise ArgumentError(
                f"images must have the same channels and axes, got {first.n_channels} x {first.spatial_shape} and "
                f"{other.n_channels} x {other.spatial_shape} in {other.location}; train one model for each kind"
            )
        pairs = zip(first.voxel_size_um or (), other.voxel_size_um or (), strict=False)
        if any(max(a / b, b / a) > _SIZE_TOLERANCE for a, b in pairs):
            raise ArgumentError(
                f"images must have about the same voxel size, got {first.voxel_size_um} and {other.voxel_size_um} um "
                f"in {other.location}; resample them or train one model for each"
            )


def _class_values(images: list[Image], truths: list[Labels]) -> tuple[int, ...]:
    """Return all label values, ascending, found block by block."""
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
            values |= set(np.unique(np.asarray(array[block.core.slices])).tolist())
            if len(values) > LARGEST_CLASS:
                raise ArgumentError(
                    f"labels must have 2 to {LARGEST_CLASS} different values, got more at {truth.location}; if they "
                    "are instances, make classes of them, such as boundary and interior"
                )
    if len(values) < 2:
        raise ArgumentError(f"labels must have at least 2 different values, got {sorted(values)}; label another class")
    return tuple(sorted(values))


def _patches(
    images: list[Image], truths: list[Labels], *, settings: UNetSettings, recipe: Recipe, values: tuple[int, ...]
) -> tuple[Patches, Patches]:
    """Return the patches to learn from and those held out."""
    size = recipe.patch_core(settings)
    rule, core = training_rule(settings), (size,) * settings.dims
    if len(images[0].spatial_shape) > settings.dims:
        rule, core = rule.over_slices(), (1, *core)
    arrays = [*(image.array for image in images), *(truth.array for truth in truths)]
    stored: list[Sliceable] = list(arrays)
    if sum(array.nbytes for array in arrays) <= RESIDENT_BYTES:
        stored = [np.asarray(array[:]) for array in arrays]
    windows = [tuple(each.window(recipe.normalisation) for each in image.statistics) for image in images]
    regions = [_split(image.spatial_shape, recipe.validation_fraction) for image in images]
    learn, check = (
        tuple(map(Source, stored[: len(images)], stored[len(images) :], windows, regions_of))
        for regions_of in zip(*regions, strict=True)
    )
    turns = orientations(core, halo=rule.halo, voxel_size_um=images[0].voxel_size_um)
    patches = Patches(learn, core, rule.halo, values, settings.dims, turns, recipe.contrast)
    return patches, replace(patches, sources=check)


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


def _record(
    images: list[Image], truths: list[Labels], *, recipe: Recipe, seed: int, fitted: Fitted, device: str
) -> dict[str, Any]:
    """Return what the model was made from; nothing in it differs between two runs of the same command."""
    record = {
        "made_by": "haloseg train", "recipe": recipe.to_json(), "seed": seed, "device": device, "steps": fitted.n_steps,
        "images": [
            {
                "image": image.location.name, "labels": truth.location.name, "shape": image.spatial_shape,
                "voxel_size_um": image.voxel_size_um, "scan": image.scan, "labels_from": truth.fingerprint,
                "statistics": [each.to_json() for each in image.statistics],
                "held_out": asdict(_split(image.spatial_shape, recipe.validation_fraction)[1]),
            }
            for image, truth in zip(images, truths, strict=True)
        ],
        "best": asdict(fitted.best), "curve": [asdict(each) for each in fitted.curve],
        "versions": {package: version(package) for package in ("haloseg", "torch", "numpy")},
    }  # fmt: skip
    document: dict[str, Any] = json.loads(json.dumps(record))
    return document
