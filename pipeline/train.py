"""Train: images and their labels become a model file."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from rich.console import Console

from pipeline.config import Precision
from pipeline.ensemble import figures_of, joined
from pipeline.errors import ArgumentError
from pipeline.learning import learning
from pipeline.lesson import open_lesson
from pipeline.preview import draw_sample, preview
from pipeline.replacing import in_the_way, model_at
from pipeline.store.location import Location, storage_errors
from pipeline.store.shelf import called, to_be_written
from pipeline.training import Learnt, Training
from pipeline.unet.device import has_bf16, pick_device
from pipeline.unet.model import Model, as_saved, build_unet, save_model
from pipeline.unet.training.checkpoint import CheckpointFile
from pipeline.unet.training.course import Step, Validation
from pipeline.unet.training.processes import processes_for
from pipeline.unet.training.recipe import Recipe, load_recipe
from pipeline.unet.training.validation import sample

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training has made; the model's own record holds the rest.

    Attributes
    ----------
    networks : each that has learnt, in the order of their seeds; more than one of an ensemble
    """

    model: Model
    path: str
    networks: tuple[Learnt, ...]
    wall_s: float

    @property
    def curves(self) -> tuple[str, ...]:
        """Where the learning curves of each network are drawn."""
        n = len(self.networks)
        paths = [self.path] if n == 1 else [member_path(self.path, at) for at in range(1, n + 1)]
        return tuple(f"{path}.curves.png" for path in paths)

    @property
    def best(self) -> Validation:
        """The validation of lowest loss, of all networks."""
        return min((each.fitted.best for each in self.networks), key=lambda best: best.loss)

    @property
    def n_steps(self) -> int:
        """Steps that were taken, of all networks together."""
        return sum(each.fitted.n_steps for each in self.networks)

    @property
    def n_before(self) -> int:
        """Steps of ``n_steps`` that runs before this one had taken."""
        return sum(each.fitted.n_before for each in self.networks)

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        if len(self.networks) > 1:
            return self._of_several()
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

    def _of_several(self) -> dict[str, Any]:
        return {
            "model": self.path, "sha256": self.model.digest, "networks": len(self.networks),
            "precision": self.networks[0].model.training["recipe"]["precision"], "steps": self.n_steps,
            "steps_before": self.n_before, "wall_s": self.wall_s,
            "members": [
                {"seed": training["seed"], "steps": training["steps"], "best_step": training["best"]["step"]}
                | figures_of(training)
                for training in (each.model.training for each in self.networks)
            ],
        }  # fmt: skip


def train(
    images: Sequence[str], *, model: str, labels: str | None = None, targets: Sequence[str] = (),
    recipe: Recipe | None = None, held_out: Sequence[str] = (), minutes: float | None = None, device: str = "cpu",
    seed: int = 0, members: int = 1, processes: int | None = None, tensorboard: str | None = None,
    on_progress: Callable[[Validation], None] = lambda _: None, on_step: Callable[[Step], None] = lambda _: None,
    on_network: Callable[[str], None] = lambda _: None,
) -> TrainResult:
    """Write a model that has learnt the label volume ``labels`` of every image, or to make its target of it.

    Of several label volumes, separated by commas, each is learnt for itself: they may overlap.

    Images that are held out are not learnt from; without any, it is the last part of every image along its first axis:
    the last slices of a volume, the bottom of a slide, or others where these lack a class. The weights of lowest loss
    there are kept. A run that was killed goes on, with the same arguments, from its last validation, as FILE.checkpoint
    beside the model file says; the model is the one that it would have made undisturbed, bit by bit, unless ``minutes``
    are given. A model that this very training has made already stays as it is. FILE.curves.png shows how it goes, and
    how it went, FILE.sample.png what the network makes of a part that is held out.

    Several members learn one after another, with seeds that follow each other, and become one model, an ensemble. Each
    has a checkpoint and curves of its own, FILE.member-1.checkpoint and so on. That of a member which is done stays
    until all are, so that a run that was killed goes on with the member that it was at.

    Parameters
    ----------
    images, held_out : paths or URLs of complete images
    targets : of complete images of the same shapes, in the order of ``images``, then of ``held_out``
    recipe : by default the usual settings; of targets the recipe ``regression``
    model : path of the model file, written at once at the end
    minutes : stop after so long, all runs and members together, if the recipe's steps take longer
    seed : of the first member
    members : networks that learn; more than one make an ensemble
    device : "cpu" or "cuda"
    processes : that share each batch, all on this machine; None is one per GPU, or one on the CPU
    tensorboard : folder of a log that TensorBoard shows; None writes none
    on_progress, on_step : told of each validation and of each step
    on_network : told which member begins, where there are several

    Raises
    ------
    InputError : images, labels and recipe do not fit, the checkpoint is damaged or of other settings, or another
        model is there; nothing was written.
    RunError : the training failed; no model was written.
    """
    begin, recipe = perf_counter(), _on(device, recipe or usual_recipe(targets))
    lesson = open_lesson(images, labels=labels, targets=targets, recipe=recipe, held_out=held_out)
    n = processes_for(device, asked=processes, n_patches=recipe.batch_size(lesson.settings.dims))
    alone = Training(lesson, recipe, str(model), str(model), called(model), device, seed, n, minutes, tensorboard)
    trainings = [alone] if members == 1 else _of_members(alone, members)
    saved, learnt = model_at(str(model)), list[Learnt]()
    there = _members(saved, trainings) if saved is not None else (None,) * members
    for each, made_before in zip(trainings, there, strict=True):
        if members > 1:
            on_network(each.title)
        if made_before is not None:
            learnt.append(each.made(made_before, on_progress=on_progress))
        else:
            learnt.append(each.learn(on_progress=on_progress, on_step=on_step))
    if saved is None:
        made = learnt[0].model
        if members > 1:
            names = [each.title for each in trainings]
            made = joined([as_saved(each.model) for each in learnt], names=names, made_by="haloseg train")
        saved = save_model(made, model)
    shown = sample([build_unet(each, device) for each in saved.members], lesson.check, device=device)
    Location(f"{model}.sample.png").write_bytes(draw_sample(shown))
    _forget(model)
    return TrainResult(saved, str(model), tuple(learnt), perf_counter() - begin)


def _members(model: Model, trainings: Sequence[Training]) -> tuple[Model, ...]:
    """Return the networks of a model that is there, each with its own record, if they are as many as are to learn."""
    records = [each["training"] for each in model.training.get("members", ())] or [model.training]
    if len(records) != len(trainings):
        raise in_the_way(trainings[0].file, why=f"of {len(records)} networks, not {len(trainings)}")
    return tuple(replace(each, training=own) for each, own in zip(model.members, records, strict=True))


def _forget(model: str) -> None:
    """Remove the checkpoints of a model that is made, those of an earlier run with more members, too."""
    place = Location(model)
    ours = re.compile(rf"\.?({re.escape(place.name)}(\.member-\d+)?\.checkpoint)(\..*\.partial)?")
    with storage_errors(place.parent):
        names = {found[1] for each in place.parent.entries() if (found := ours.fullmatch(each.name))}
    for name in names:
        CheckpointFile(str(place.parent / name), {}).remove()


def _of_members(alone: Training, n: int) -> list[Training]:
    """Return the trainings of the members of an ensemble."""
    if n < 1:
        raise ArgumentError(f"a training needs one member or more, got {n}; use 1")
    log, minutes = alone.tensorboard, alone.minutes
    return [
        replace(
            alone, path=member_path(alone.path, at), title=f"{alone.title}, member {at} of {n}",
            seed=alone.seed + at - 1, minutes=minutes and minutes / n,
            tensorboard=log and f"{log.rstrip('/')}/member-{at}",
        )
        for at in range(1, n + 1)
    ]  # fmt: skip


def member_path(model: str, at: int) -> str:
    """Return what the files of a member, counted from 1, are called after."""
    return f"{model}.member-{at}"


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
    minutes = args.minutes and args.minutes / args.members
    with to_be_written(args.model) as path, learning(console, n_steps=recipe.steps, minutes=minutes) as watch:
        result = train(
            args.images, labels=args.labels, targets=args.target, model=path, recipe=recipe, held_out=args.held_out,
            minutes=args.minutes, device=pick_device(args.device), seed=args.seed, members=args.members,
            processes=args.processes, tensorboard=args.tensorboard, on_progress=watch.validated, on_step=watch.took,
            on_network=watch.begins,
        )
    if result.n_before == result.n_steps:
        console.print(f"{path} was made by the same command before, and stays as it is", soft_wrap=True)
    return result.to_json()


def _on(device: str, recipe: Recipe) -> Recipe:
    """Return a recipe with the precision that it takes on a device."""
    return replace(recipe, precision=recipe.precision or (Precision.BF16 if has_bf16(device) else Precision.FLOAT32))
