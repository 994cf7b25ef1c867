"""Train: images and their labels become a model file."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np

from pipeline.errors import ArgumentError, StoreError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import Sliceable
from pipeline.geometry.tiles import TileRule
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
            "parameters": sum(t.numel() for name, t in self.model.weights.items() if "running" not in name),
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
    shapes = [image.spatial_shape for image in opened]
    dims = choose_dims(recipe, shapes=shapes, voxel_size_um=opened[0].voxel_size_um)
    settings = recipe.network(dims=dims, in_channels=opened[0].n_channels, n_classes=len(values))
    learn, check = _patches(opened, truths, settings=settings, recipe=recipe, values=values)
    fitted = fit(
        settings, learn, validation=check, recipe=recipe, device=device, seed=seed, minutes=minutes,
        on_progress=on_progress,
    )
    record = _record(opened, truths, recipe=recipe, seed=seed, fitted=fitted, device=device)
    names = tuple(_class_name(truths[0], value) for value in values)
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
                f"images must have about the same voxel size, got {first.voxel_size_um} and {other.voxel_size_um} um in "
                f"{other.location}; resample them or train one model for each"
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
                    f"labels must have 2 to {LARGEST_CLASS} different values, got more at {truth.location}; if they are "
                    "instances, make classes of them, such as boundary and interior"
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
    learn, check = [], []
    resident = sum(_n_bytes(image.array) for image in (*images, *truths)) <= RESIDENT_BYTES
    for image, truth in zip(images, truths, strict=True):
        arrays: list[Sliceable] = [image.array, truth.array]
        if resident:
            arrays = [np.asarray(array[(slice(None),) * len(array.shape)]) for array in arrays]
        windows = tuple(each.window(recipe.normalisation) for each in image.statistics)
        for part, region in zip((learn, check), _split(image.spatial_shape, recipe.validation_fraction), strict=True):
            part.append(Source(arrays[0], arrays[1], windows, region))
    turns = orientations(core, halo=rule.halo, voxel_size_um=images[0].voxel_size_um)
    return (
        _of(tuple(learn), rule, core, settings, values, turns=turns, contrast=recipe.contrast),
        _of(tuple(check), rule, core, settings, values, turns=turns[:1], contrast=0.0),
    )
