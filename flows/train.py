"""The flow that trains a model on images and their labels, and shows how it goes while it learns."""

from __future__ import annotations

import base64
import json
import math
from time import monotonic
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.states import Cancelled

from flows.parameters import HeldOut, ImagePaths, Minutes, ModelPath, RecipePath, Targets, TruthName
from flows.showing import rewrite, shown, slug
from flows.stages import failed, stage
from flows.stopping import given_up, pausable
from flows.watching import SECONDS_BETWEEN_UPDATES, duration, logged
from pipeline.errors import GivenUpError, PipelineError
from pipeline.store.location import Location
from pipeline.store.roots import check_paths
from pipeline.store.shelf import called, to_be_written
from pipeline.train import train, usual_recipe
from pipeline.unet.device import pick_device
from pipeline.unet.training.course import Validation, best_of
from pipeline.unet.training.recipe import load_recipe, shipped


class Course:
    """Shows a training in the Prefect UI: how far it is, and all its validations as a table, one artifact each."""

    def __init__(self, model: str, *, n_steps: int, minutes: float) -> None:
        self._model, self._n_steps, self._minutes = model, n_steps, minutes
        self._key, self._curve = slug(called(model)), list[Validation]()
        self._begin_s, self._written_s = monotonic(), -math.inf
        self._progress, self._table = cast("UUID | None", None), cast("UUID | None", None)

    def put(self, now: Validation) -> None:
        """Take a validation, and show it unless the last one was shown right before."""
        self._curve.append(now)
        if monotonic() - self._written_s > SECONDS_BETWEEN_UPDATES:
            self.write(percent=self._percent())

    def write(self, *, percent: float) -> None:
        """Show the course as it is now."""
        self._written_s = monotonic()
        if self._curve:
            self._write_progress(percent)
            self._write_table()

    def _write_progress(self, percent: float) -> None:
        told = self.summary
        if (artifact := self._progress) is not None:
            shown(lambda: update_progress_artifact(artifact, percent, description=told))
            return
        made = shown(lambda: create_progress_artifact(percent, key=f"{self._key}-train", description=told))
        self._progress = made if isinstance(made, UUID) else None

    def _write_table(self) -> None:
        rows, told = self._rows(), f"how {self._model} is learnt: {self.summary}"
        if (artifact := self._table) is not None:
            rewrite(artifact, data=json.dumps(rows), description=told)
            return
        made = shown(lambda: create_table_artifact(rows, key=f"{self._key}-curve", description=told))
        self._table = made if isinstance(made, UUID) else None

    def write_pictures(self, curves: bytes, sample: bytes) -> None:
        """Show the learning curves, and what the network makes of a part that is held out, at the end."""
        drawn = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (curves, sample))
        page = (
            "# Curves\n\n{}\n\n![learning curves]({})\n\n# Held out\n\nImage, truth, and what the network makes of it."
            "\n\n![image, truth, prediction]({})\n"
        ).format(self.summary, *drawn)
        shown(lambda: create_markdown_artifact(page, key=f"{self._key}-curves"))

    @property
    def summary(self) -> str:
        """How far it is, and the best so far."""
        last, best = self._curve[-1], best_of(self._curve)
        took = duration(monotonic() - self._begin_s)
        return (
            f"step {last.step:,} of {self._n_steps:,}, {took} of {duration(60 * self._minutes)}; best so far at step "
            f"{best.step:,}: loss held out {best.loss:.4f}, {best.told}"
        )

    def _percent(self) -> float:
        """Return how far it is by steps or by time, whichever ends first."""
        by_time = (monotonic() - self._begin_s) / (60 * self._minutes)
        return 100 * min(1.0, max(self._curve[-1].step / self._n_steps, by_time))

    def _rows(self) -> list[dict[str, Any]]:
        best = best_of(self._curve)
        return [
            {"step": each.step, "loss": round(each.train_loss, 4), "loss held out": round(each.loss, 4),
             **_figures(each), "best so far": "yes" if each is best else ""}
            for each in self._curve
        ]  # fmt: skip


def _figures(each: Validation) -> dict[str, str]:
    name, _, figures = each.told.partition(" ")
    return {f"{name} held out": figures}


@stage("train")
def train_stage(
    images: list[str], labels: str | None, model: str, minutes: float, recipe: str | None, *, targets: list[str],
    held_out: list[str],
) -> dict[str, Any]:
    """Train, and show the validations while they come; a run that was killed goes on, see ``train``."""
    log = get_run_logger()
    settings = load_recipe(recipe) if recipe else usual_recipe(targets)
    course, stop = Course(model, n_steps=settings.steps, minutes=minutes), given_up()

    def on_progress(now: Validation) -> None:
        log.info("step %d: loss %.4f, held out %.4f", now.step, now.train_loss, now.loss)
        course.put(now)
        if stop.is_set():
            raise GivenUpError

    result = train(
        images, labels=labels, targets=targets, held_out=held_out, model=model, recipe=settings, minutes=minutes,
        device=pick_device("auto"), on_progress=on_progress,
    )
    course.write(percent=100)
    course.write_pictures(*(Location(f"{result.path}.{kind}.png").read_bytes() for kind in ("curves", "sample")))
    return result.to_json()


@flow(name="train", flow_run_name="train {model}")
def train_model(
    images: ImagePaths, labels: TruthName, model: ModelPath, minutes: Minutes = 30.0, recipe: RecipePath = None,
    held_out: HeldOut = [], targets: Targets = [],  # noqa: B006 shown in the UI's form
) -> dict[str, Any]:
    """Train a model on the label volume ``labels`` of every image, or to make its target of it; returns its figures.

    A model that is told by name becomes the next version of it, which other flows then find by that name.
    """
    try:
        with pausable(), logged(), to_be_written(model) as path:
            check_paths(path, None if recipe in shipped() else recipe, *images, *held_out, *targets)
            return train_stage(images, labels, path, minutes, recipe, targets=targets, held_out=held_out)
    except GivenUpError as error:
        return cast("dict[str, Any]", Cancelled(message=str(error)))
    except PipelineError as error:
        return cast("dict[str, Any]", failed(error))
