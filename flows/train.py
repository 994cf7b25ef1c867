"""The flow that trains a model on images and their labels, and shows how it goes while it learns."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
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

from flows.parameters import HeldOut, ImagePaths, Members, Minutes, ModelPath, RecipePath, Targets, TruthName
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

    def __init__(self, model: str, *, n_steps: int, minutes: float, members: int = 1) -> None:
        self._model, self._n_steps, self._minutes, self._members = model, n_steps, minutes, members
        self._key, self._curves = slug(called(model)), [list[Validation]()]  # of each member
        self._begin_s = self._member_begin_s = monotonic()
        self._written_s = -math.inf
        self._progress, self._table = cast("UUID | None", None), cast("UUID | None", None)

    def begins(self) -> None:
        """Take that a member begins, those before it being done."""
        if self._curves[-1]:
            self._curves.append([])
        self._member_begin_s = monotonic()

    def put(self, now: Validation) -> None:
        """Take a validation, and show it unless the last one was shown right before."""
        self._curves[-1].append(now)
        if monotonic() - self._written_s > SECONDS_BETWEEN_UPDATES:
            self.write(percent=self._percent())

    def write(self, *, percent: float) -> None:
        """Show the course as it is now."""
        self._written_s = monotonic()
        if self._curves[-1]:
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

    def write_pictures(self, curves: Sequence[bytes], sample: bytes) -> None:
        """Show the curves of each member, and what they make together of a part that is held out, at the end."""
        alone = len(curves) == 1
        drawn = "".join(
            ("" if alone else f"## Member {at}\n\n") + f"![learning curves]({_embedded(png)})\n\n"
            for at, png in enumerate(curves, start=1)
        )
        who = "the network makes" if alone else f"the {len(curves)} networks make, on average,"
        page = (
            f"# Curves\n\n{self.summary}\n\n{drawn}# Held out\n\nImage, truth, and what {who} of it."
            f"\n\n![image, truth, prediction]({_embedded(sample)})\n"
        )
        shown(lambda: create_markdown_artifact(page, key=f"{self._key}-curves"))

    @property
    def summary(self) -> str:
        """How far it is, and the best so far; of several members those of the one that learns."""
        last, best = self._curves[-1][-1], best_of(self._curves[-1])
        took = duration(monotonic() - self._begin_s)
        who = "" if self._members == 1 else f"member {len(self._curves)} of {self._members}, "
        return (
            f"{who}step {last.step:,} of {self._n_steps:,}, {took} of {duration(60 * self._minutes)}; best so far at "
            f"step {best.step:,}: loss held out {best.loss:.4f}, {best.told}"
        )

    def _percent(self) -> float:
        """Return how far it is by steps or by time, whichever ends first; each member has its share of both."""
        by_time = (monotonic() - self._member_begin_s) / (60 * self._minutes / self._members)
        here = min(1.0, max(self._curves[-1][-1].step / self._n_steps, by_time))
        return 100 * (len(self._curves) - 1 + here) / self._members

    def _rows(self) -> list[dict[str, Any]]:
        return [
            ({"member": at} if self._members > 1 else {}) | row
            for at, curve in enumerate(self._curves, start=1) for row in _rows_of(curve)
        ]  # fmt: skip


def _rows_of(curve: list[Validation]) -> list[dict[str, Any]]:
    """Return the validations of one network, and which of them is the best."""
    best = best_of(curve)
    return [
        {"step": each.step, "loss": round(each.train_loss, 4), "loss held out": round(each.loss, 4),
         **_figures(each), "best so far": "yes" if each is best else ""}
        for each in curve
    ]  # fmt: skip


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figures(each: Validation) -> dict[str, str]:
    name, _, figures = each.told.partition(" ")
    return {f"{name} held out": figures}


@stage("train")
def train_stage(
    images: list[str], labels: str | None, model: str, minutes: float, recipe: str | None, *, targets: list[str],
    held_out: list[str], members: int,
) -> dict[str, Any]:
    """Train, and show the validations while they come; a run that was killed goes on, see ``train``."""
    log = get_run_logger()
    settings = load_recipe(recipe) if recipe else usual_recipe(targets)
    course, stop = Course(model, n_steps=settings.steps, minutes=minutes, members=members), given_up()

    def on_progress(now: Validation) -> None:
        log.info("step %d: loss %.4f, held out %.4f", now.step, now.train_loss, now.loss)
        course.put(now)
        if stop.is_set():
            raise GivenUpError

    def on_network(title: str) -> None:
        log.info("%s", title)
        course.begins()

    result = train(
        images, labels=labels, targets=targets, held_out=held_out, model=model, recipe=settings, minutes=minutes,
        device=pick_device("auto"), members=members, on_progress=on_progress, on_network=on_network,
    )
    course.write(percent=100)
    course.write_pictures(
        [Location(path).read_bytes() for path in result.curves], Location(f"{result.path}.sample.png").read_bytes()
    )
    return result.to_json()


@flow(name="train", flow_run_name="train {model}")
def train_model(
    images: ImagePaths, labels: TruthName, model: ModelPath, minutes: Minutes = 30.0, recipe: RecipePath = None,
    held_out: HeldOut = [], targets: Targets = [],  # noqa: B006 shown in the UI's form
    members: Members = 1,
) -> dict[str, Any]:
    """Train a model on the label volume ``labels`` of every image, or to make its target of it; returns its figures.

    A model that is told by name becomes the next version of it, which other flows then find by that name. A run that
    ended before its end, whatever the reason, goes on when the same is asked for again, with the member it was at.
    """
    try:
        with pausable(), logged(), to_be_written(model) as path:
            check_paths(path, None if recipe in shipped() else recipe, *images, *held_out, *targets)
            return train_stage(
                images, labels, path, minutes, recipe, targets=targets, held_out=held_out, members=members
            )
    except GivenUpError as error:
        return cast("dict[str, Any]", Cancelled(message=str(error)))
    except PipelineError as error:
        return cast("dict[str, Any]", failed(error))
