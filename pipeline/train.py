"""Train: images and their labels become a model file."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Any

from rich.console import Console

from pipeline.config import Precision
from pipeline.curves import CurvesFile
from pipeline.learning import learning
from pipeline.lesson import Lesson, open_lesson
from pipeline.preview import draw_sample, preview
from pipeline.store.image import Image
from pipeline.store.labels import Labels
from pipeline.store.location import Location
from pipeline.store.shelf import called, to_be_written
from pipeline.unet.device import has_bf16, pick_device
from pipeline.unet.model import Model, build_unet, save_model
from pipeline.unet.settings import closed_form_rule
from pipeline.unet.training.board import board
from pipeline.unet.training.checkpoint import CheckpointFile
from pipeline.unet.training.course import Step, Validation
from pipeline.unet.training.fit import Fitted, fit
from pipeline.unet.training.processes import fit_together, processes_for
from pipeline.unet.training.recipe import Recipe, load_recipe
from pipeline.unet.training.validation import sample

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training has made; the model's own record holds the rest.

    Attributes
    ----------
    n_before : steps of ``n_steps`` that a run before this one had taken
    """

    model: Model
    path: str
    best: Validation
    n_steps: int
    n_before: int
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        per_class = zip(self.model.classes, self.model.class_values, self.best.dice, strict=True)
        reached = {
            "model": self.path, "sha256": self.model.digest, "precision": self.model.training["recipe"]["precision"],
            "steps": self.n_steps,
            "steps_before": self.n_before, "wall_s": self.wall_s,
            "best_step": self.best.step, "validation_loss": self.best.loss,
            "parameters": sum(t.numel() for name, t in self.model.weights.items() if not name.endswith(_STATISTICS)),
            "classes": [{"class": name, "value": value, "validation_dice": dice} for name, value, dice in per_class],
        }  # fmt: skip
        return reached if self.best.dice else reached | {"validation_psnr_db": self.best.psnr}


def train(
    images: Sequence[str], *, model: str, labels: str | None = None, targets: Sequence[str] = (),
    recipe: Recipe | None = None, held_out: Sequence[str] = (), minutes: float | None = None, device: str = "cpu",
    seed: int = 0, processes: int | None = None, tensorboard: str | None = None,
    on_progress: Callable[[Validation], None] = lambda _: None, on_step: Callable[[Step], None] = lambda _: None,
) -> TrainResult:
    """Write a model that has learnt the label volume ``labels`` of every image, or to make its target of it.

    Of several label volumes, separated by commas, each is learnt for itself: they may overlap.

    Images that are held out are not learnt from; without any, it is the last part of every image along its first axis:
    the last slices of a volume, the bottom of a slide, or others where these lack a class. The weights of lowest loss
    there are kept. A run that was killed goes on, with the same arguments, from its last validation, as FILE.checkpoint
    beside the model file says; the model is the one that it would have made undisturbed, bit by bit, unless ``minutes``
    are given. FILE.curves.png shows how it goes, and how it went, FILE.sample.png what the network makes of a part that
    is held out.

    Parameters
    ----------
    images, held_out : paths or URLs of complete images
    targets : of complete images of the same shapes, in the order of ``images``, then of ``held_out``
    recipe : by default the usual settings; of targets the recipe ``regression``
    model : path of the model file, written at once at the end
    minutes : stop after so long, all runs together, if the recipe's steps take longer
    device : "cpu" or "cuda"
    processes : that share each batch, all on this machine; None is one per GPU, or one on the CPU
    tensorboard : folder of a log that TensorBoard shows; None writes none
    on_progress, on_step : told of each validation and of each step

    Raises
    ------
    InputError : images, labels and recipe do not fit, or the checkpoint is damaged or of other settings; nothing was
        written.
    RunError : the training failed; no model was written.
    """
    begin, recipe = perf_counter(), _on(device, recipe or usual_recipe(targets))
    lesson = open_lesson(images, labels=labels, targets=targets, recipe=recipe, held_out=held_out)
    settings, source = lesson.settings, _source(lesson, recipe=recipe, seed=seed, device=device)
    n = processes_for(device, asked=processes, n_patches=recipe.batch_size(settings.dims))
    source |= {"processes": n}
    checkpoint = CheckpointFile(f"{model}.checkpoint", source | {"minutes": minutes})
    curves = CurvesFile(f"{model}.curves.png", called(model), lesson.classes)
    with board(tensorboard, classes=lesson.classes) as log:

        def validated(now: Validation) -> None:
            for tell in (curves.put, log.validated, on_progress):
                tell(now)

        def took(step: Step) -> None:
            log.took(step)
            on_step(step)

        make = fit if n == 1 else partial(fit_together, n=n)
        fitted = make(
            settings, lesson.learn, validation=lesson.check, recipe=recipe, device=device, seed=seed, minutes=minutes,
            checkpoint=checkpoint, on_progress=validated, on_step=took,
        )
    made = Model(
        settings, lesson.classes, lesson.class_values, recipe.normalisation,
        tuple(map(str, range(settings.in_channels))), lesson.voxel_size_um, closed_form_rule(settings),
        source | _reached(fitted), fitted.weights, limits=recipe.scaling.limits,
        target_windows=lesson.target_windows, input_windows=lesson.input_windows,
    )  # fmt: skip
    saved = save_model(made, model)
    shown = sample(build_unet(made, device), lesson.check, device=device)
    Location(f"{model}.sample.png").write_bytes(draw_sample(shown))
    curves.write()
    checkpoint.remove()
    return TrainResult(saved, str(model), fitted.best, fitted.n_steps, fitted.n_before, perf_counter() - begin)


def usual_recipe(targets: Sequence[str]) -> Recipe:
    """Return the recipe that is taken where none is given."""
    return load_recipe("regression") if targets else Recipe()


def command(args: Namespace, *, console: Console) -> dict[str, Any]:
    """Train as the command line asks, with progress on stderr; or show what with."""
    recipe = load_recipe(args.recipe) if args.recipe else usual_recipe(args.target)
    if args.preview:
        return preview(
            args.images, labels=args.labels, targets=args.target, recipe=recipe, seed=args.seed, path=args.preview,
            held_out=args.held_out,
        ).to_json()  # fmt: skip
    with to_be_written(args.model) as path, learning(console, n_steps=recipe.steps, minutes=args.minutes) as watch:
        result = train(
            args.images, labels=args.labels, targets=args.target, model=path, recipe=recipe, held_out=args.held_out,
            minutes=args.minutes, device=pick_device(args.device), seed=args.seed, processes=args.processes,
            tensorboard=args.tensorboard, on_progress=watch.validated, on_step=watch.took,
        )
    return result.to_json()


def _on(device: str, recipe: Recipe) -> Recipe:
    """Return a recipe with the precision that it takes on a device."""
    return replace(recipe, precision=recipe.precision or (Precision.BF16 if has_bf16(device) else Precision.FLOAT32))


def _source(lesson: Lesson, *, recipe: Recipe, seed: int, device: str) -> dict[str, Any]:
    """Return what a model is made from, a JSON object."""
    source = {
        "made_by": "haloseg train", "recipe": recipe.to_json(), "seed": seed, "device": device,
        "images": [
            {
                "image": image.location.name, "shape": image.spatial_shape, "voxel_size_um": image.voxel_size_um,
                "scan": image.scan, **_truth(*truth), "statistics": [each.to_json() for each in image.statistics],
                **({"slices_sha256": image.slices_sha256} if recipe.scaling.is_slicewise else {}),
                "held_out": asdict(held_out) if held_out else None,
            }
            for image, truth, held_out in zip(lesson.images, lesson.truths, lesson.held_out, strict=True)
        ],
        "versions": {package: version(package) for package in ("haloseg", "torch", "numpy")},
    }  # fmt: skip
    document: dict[str, Any] = json.loads(json.dumps(source))
    return document


def _truth(truth: Labels | Image, *others: Labels | Image) -> dict[str, Any]:
    """Return what was learnt, a JSON object; of several label volumes lists."""
    if others:
        every = [each for each in (truth, *others) if isinstance(each, Labels)]
        return {"labels": [each.location.name for each in every], "labels_from": [each.fingerprint for each in every]}
    if isinstance(truth, Labels):
        return {"labels": truth.location.name, "labels_from": truth.fingerprint}
    statistics = [each.to_json() for each in truth.statistics]
    return {"target": truth.location.name, "target_scan": truth.scan, "target_statistics": statistics}


def _reached(fitted: Fitted) -> dict[str, Any]:
    """Return how it went, a JSON object; nothing in it differs between two runs of the same command."""
    reached = {
        "steps": fitted.n_steps, "best": asdict(fitted.best), "curve": [asdict(each) for each in fitted.curve],
    }  # fmt: skip
    document: dict[str, Any] = json.loads(json.dumps(reached))
    return document
