"""Training: one network learns a lesson; what lies beside its model file until that is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from pipeline.curves import CurvesFile
from pipeline.lesson import Lesson
from pipeline.replacing import in_the_way
from pipeline.store.image import Image
from pipeline.store.labels import Labels
from pipeline.unet.model import Model
from pipeline.unet.settings import closed_form_rule
from pipeline.unet.training.board import board
from pipeline.unet.training.checkpoint import CheckpointFile, difference
from pipeline.unet.training.course import Step, Validation, best_of
from pipeline.unet.training.fit import Fitted, fit
from pipeline.unet.training.processes import fit_together
from pipeline.unet.training.recipe import Recipe

_SAME = ("recipe", "seed", "device", "images", "processes", "minutes")  # in two runs of one command


@dataclass(frozen=True, slots=True)
class Learnt:
    """A network that has learnt.

    Attributes
    ----------
    model : of it alone, not saved yet
    fitted : how it went
    """

    model: Model
    fitted: Fitted


@dataclass(frozen=True, slots=True)
class Training:
    """One network that is to learn a lesson.

    Attributes
    ----------
    file : of the model that it becomes, or a member of
    path : PATH.checkpoint and PATH.curves.png are written while it learns
    title : of the curves
    processes : that share each batch
    minutes : after which it ends, all runs together
    tensorboard : folder of a log that TensorBoard shows; None writes none
    """

    lesson: Lesson
    recipe: Recipe
    file: str
    path: str
    title: str
    device: str
    seed: int
    processes: int
    minutes: float | None
    tensorboard: str | None

    @property
    def checkpoint(self) -> CheckpointFile:
        """Where it goes on from after it was killed, and where it is over already if it was at its end."""
        return CheckpointFile(f"{self.path}.checkpoint", self.source | {"minutes": self.minutes})

    def made(self, model: Model, *, on_progress: Callable[[Validation], None]) -> Learnt:
        """Return a network that this training has made before; versions of libraries do not count.

        Raises
        ------
        ArgumentError : another training has made it, or none.
        """
        record, ours = model.training, self.source | self._timed
        if record.get("made_by") != ours["made_by"] or "curve" not in record:
            raise in_the_way(self.file, why="which was not trained by haloseg")
        here, there = ({key: each[key] for key in _SAME if key in each} for each in (ours, record))
        if differing := difference(here, there, path="it"):
            raise in_the_way(self.file, why=f"of a training with {differing}")
        curve = tuple(Validation(**each | {"dice": tuple(each["dice"])}) for each in record["curve"])
        curves = self._curves
        for each in curve:
            curves.put(each)
            on_progress(each)
        curves.write()
        return Learnt(model, Fitted(model.weights, best_of(curve), curve, record["steps"], record["steps"]))

    @property
    def _curves(self) -> CurvesFile:
        return CurvesFile(f"{self.path}.curves.png", self.title, self.lesson.classes)

    @property
    def _timed(self) -> dict[str, Any]:
        return {} if self.minutes is None else {"minutes": self.minutes}

    @property
    def source(self) -> dict[str, Any]:
        """What the model is made from, a JSON object."""
        recipe, lesson = self.recipe, self.lesson
        source = {
            "made_by": "haloseg train", "recipe": recipe.to_json(), "seed": self.seed, "device": self.device,
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
            "processes": self.processes,
        }  # fmt: skip
        document: dict[str, Any] = json.loads(json.dumps(source))
        return document

    def learn(self, *, on_progress: Callable[[Validation], None], on_step: Callable[[Step], None]) -> Learnt:
        """Return the network once it has learnt; its checkpoint stays until it is removed."""
        lesson, curves = self.lesson, self._curves
        with board(self.tensorboard, classes=lesson.classes) as log:

            def validated(now: Validation) -> None:
                for tell in (curves.put, log.validated, on_progress):
                    tell(now)

            def took(step: Step) -> None:
                log.took(step)
                on_step(step)

            make = fit if self.processes == 1 else partial(fit_together, n=self.processes)
            fitted = make(
                lesson.settings, lesson.learn, validation=lesson.check, recipe=self.recipe, device=self.device,
                seed=self.seed, minutes=self.minutes, checkpoint=self.checkpoint, on_progress=validated, on_step=took,
            )
        curves.write()
        return Learnt(self._model(fitted), fitted)

    def _model(self, fitted: Fitted) -> Model:
        lesson, settings = self.lesson, self.lesson.settings
        return Model(
            settings, lesson.classes, lesson.class_values, self.recipe.normalisation,
            tuple(map(str, range(settings.image_channels))), lesson.voxel_size_um, closed_form_rule(settings),
            self.source | self._timed | _reached(fitted), fitted.weights, limits=self.recipe.scaling.limits,
            target_windows=lesson.target_windows, input_windows=lesson.input_windows,
        )  # fmt: skip


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
