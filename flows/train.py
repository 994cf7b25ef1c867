"""The flow that trains a model on images and their labels."""

from __future__ import annotations

from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.parameters import ImagePaths, LabelName, Minutes, ModelPath, RecipePath
from flows.stages import failed, stage
from flows.watching import logged, slug
from pipeline.errors import PipelineError
from pipeline.store.location import Location
from pipeline.store.roots import check_paths
from pipeline.train import train
from pipeline.unet.device import pick_device
from pipeline.unet.fit import Validation
from pipeline.unet.recipe import Recipe, load_recipe


@stage("train")
def train_stage(images: list[str], labels: str, model: str, minutes: float, recipe: str | None) -> dict[str, Any]:
    """Train, and leave the validations as a table."""
    log, curve = get_run_logger(), list[Validation]()

    def on_progress(now: Validation) -> None:
        curve.append(now)
        log.info("step %d: loss %.4f, held out %.4f", now.step, now.train_loss, now.loss)

    result = train(
        images, labels=labels, model=model, recipe=load_recipe(recipe) if recipe else Recipe(), minutes=minutes,
        device=pick_device("auto"), on_progress=on_progress,
    )
    rows = [
        {"step": each.step, "loss": round(each.train_loss, 4), "loss held out": round(each.loss, 4),
         "Dice held out": ", ".join("-" if d is None else f"{d:.3f}" for d in each.dice)}
        for each in curve
    ]  # fmt: skip
    create_table_artifact(rows, key=f"{slug(Location(model).name)}-curve", description=f"how {model} was learnt")
    return result.to_json()


@flow(name="train", flow_run_name="train {model}")
def train_model(
    images: ImagePaths, labels: LabelName, model: ModelPath, minutes: Minutes = 30.0, recipe: RecipePath = None
) -> dict[str, Any]:
    """Train a model on the label volume ``labels`` of every image; returns its figures."""
    try:
        check_paths(model, recipe, *images)
        with logged():
            return train_stage(images, labels, model, minutes, recipe)
    except PipelineError as error:
        return cast("dict[str, Any]", failed(error))
