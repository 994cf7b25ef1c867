"""Train: images and their labels become a model file."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from time import perf_counter
from typing import Any

from pipeline.lesson import Lesson, open_lesson
from pipeline.preview import preview
from pipeline.unet.device import pick_device
from pipeline.unet.fit import Fitted, Validation, fit
from pipeline.unet.model import Model, save_model
from pipeline.unet.recipe import Recipe, load_recipe
from pipeline.unet.settings import closed_form_rule

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
    lesson = open_lesson(images, labels=labels, recipe=recipe)
    settings = lesson.settings
    fitted = fit(
        settings, lesson.learn, validation=lesson.check, recipe=recipe, device=device, seed=seed, minutes=minutes,
        on_progress=on_progress,
    )
    record = _record(lesson, recipe=recipe, seed=seed, fitted=fitted, device=device)
    made = Model(
        settings, lesson.classes, lesson.class_values, recipe.normalisation,
        tuple(map(str, range(settings.in_channels))), lesson.images[0].voxel_size_um, closed_form_rule(settings),
        record, fitted.weights,
    )  # fmt: skip
    return TrainResult(save_model(made, model), str(model), fitted.best, fitted.n_steps, perf_counter() - begin)


def command(args: Namespace) -> dict[str, Any]:
    """Train as the command line asks, with a line of progress on stderr per validation; or show what with."""

    def tell(now: Validation) -> None:
        dice = " ".join("-" if d is None else f"{d:.3f}" for d in now.dice)
        sys.stderr.write(f"step {now.step}: loss {now.train_loss:.4f}, held out {now.loss:.4f}, Dice {dice}\n")

    recipe = load_recipe(args.recipe) if args.recipe else Recipe()
    if args.preview:
        return preview(args.images, labels=args.labels, recipe=recipe, seed=args.seed, path=args.preview).to_json()
    result = train(
        args.images, labels=args.labels, model=args.model, recipe=recipe, minutes=args.minutes,
        device=pick_device(args.device), seed=args.seed, on_progress=tell,
    )
    return result.to_json()


def _record(lesson: Lesson, *, recipe: Recipe, seed: int, fitted: Fitted, device: str) -> dict[str, Any]:
    """Return what the model was made from; nothing in it differs between two runs of the same command."""
    record = {
        "made_by": "haloseg train", "recipe": recipe.to_json(), "seed": seed, "device": device, "steps": fitted.n_steps,
        "images": [
            {
                "image": image.location.name, "labels": truth.location.name, "shape": image.spatial_shape,
                "voxel_size_um": image.voxel_size_um, "scan": image.scan, "labels_from": truth.fingerprint,
                "statistics": [each.to_json() for each in image.statistics],
                "held_out": asdict(held_out),
            }
            for image, truth, held_out in zip(lesson.images, lesson.truths, lesson.held_out, strict=True)
        ],
        "best": asdict(fitted.best), "curve": [asdict(each) for each in fitted.curve],
        "versions": {package: version(package) for package in ("haloseg", "torch", "numpy")},
    }  # fmt: skip
    document: dict[str, Any] = json.loads(json.dumps(record))
    return document
