"""The flow of one scan: ingest, segment, stitch, evaluate, report. Stages are tasks, blocks are not; it holds paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.states import Cancelled

from flows.parameters import (
    Augmentation,
    Budget,
    Cluster,
    Ignore,
    ImagePath,
    InstancesName,
    LabelName,
    ModelPath,
    Numbers,
    ScanPath,
    Shard,
    TruthPath,
    Workers,
)
from flows.reports import failure_markdown, kind_of, plan_markdown, report_markdown
from flows.showing import key_of, shown
from flows.slots import slot
from flows.stages import failed, stage
from flows.stopping import given_up, pausable
from flows.watching import SHARED_RUNNER, logged, watched
from pipeline.compare import Compared
from pipeline.compute.address import check_cluster
from pipeline.compute.cluster import DaskRunner, device_at, open_runner
from pipeline.compute.hosts import here
from pipeline.compute.retries import Retries, RetriesWatch
from pipeline.compute.runner import RunBlocks, run_serial
from pipeline.config import UNCOUNTED_WORKERS, Precision, Scheme, Tta
from pipeline.errors import GivenUpError, InputError, PipelineError, QuarantineError, TakenError
from pipeline.evaluate import Evaluated, evaluate
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.report import picture
from pipeline.segment import Segmented, segment
from pipeline.stitch import check_ahead, stitch
from pipeline.store.image import open_image, read_image
from pipeline.store.lease import held
from pipeline.store.location import Location
from pipeline.store.results import complete, mark_reported
from pipeline.store.roots import check_paths
from pipeline.store.shelf import model_path
from pipeline.unet.device import pick_device, workers_here

LOCAL_WORKERS = 2  # of a cluster that a flow starts, where there is no GPU
_MOST_HOSTS = 4  # beside a flow's own process, which may be one of several on a small node

Figures = Evaluated | Compared
Made = tuple[Segmented, Figures | None]


@stage("ingest")
def ingest_stage(
    scan: str, image: str, *, shard: tuple[int, ...] | None = None, overwrite: bool = False
) -> tuple[str, Retries]:
    """Make the image; returns its path, and which blocks had to be copied again."""
    if scan == image and read_image(Location(image)) is not None:
        return image, Retries()
    with watched(key=key_of(image)) as watch, _copying(scan) as run:
        again = RetriesWatch(watch)
        made = ingest(scan, image, shard=shard, overwrite=overwrite, run=run, watch=again)
    get_run_logger().info("image %s: %s voxels", made.location, "x".join(map(str, made.spatial_shape)))
    _warn_of(again.retries)
    return str(made.location), again.retries


def _copying(scan: str) -> AbstractContextManager[RunBlocks]:
    """Return what copies a scan: those workers of an archive's cluster that have no GPU, or else this machine."""
    shared = SHARED_RUNNER.get()
    return nullcontext(shared) if shared and shared.can_copy(scan) else here(n_most=_MOST_HOSTS, given_up=given_up())


def _warn_of(retries: Retries) -> None:
    if retries.n_blocks:
        get_run_logger().warning("blocks retried: %s", retries.told)


@stage("segment")
def segment_stage(
    image: str, *, model: str, name: str, cluster: str, workers: int | None, budget_bytes: int | None,
    precision: Precision, tta: Tta, instances: str | None = None,
) -> Segmented:
    """Make the label volume on the cluster's workers; of ``instances`` it is but seen that they can be made of it."""
    shared = SHARED_RUNNER.get()
    is_guess = cluster != "local" and not shared  # that cluster is not open yet: asked where something is to be done
    device = pick_device("auto") if cluster == "local" else shared.device() if shared else "cuda"
    n_workers, gpus = UNCOUNTED_WORKERS, tuple[str, ...]()
    if cluster == "local":
        n_workers, gpus = workers_here(device, asked=workers, usual=LOCAL_WORKERS)
    scheme = Scheme(device=device, budget_bytes=budget_bytes, precision=precision, tta=tta, n_workers=n_workers)
    plan = plan_segment(image, model=model, name=name, scheme=scheme)
    if instances:
        check_ahead(plan.result, name=instances)
    n_missing, key = len(plan.grid) - len(plan.done()), key_of(image, name)
    if n_missing and is_guess and (device := device_at(cluster)) != scheme.device:
        plan = plan_segment(image, model=model, name=name, scheme=replace(scheme, device=device))
    plan = replace(plan, result=replace(plan.result, report_due=True))  # until report_stage says that it is made
    what = plan_markdown(plan, n_missing=n_missing, n_workers=n_workers if cluster == "local" else 0)
    shown(lambda: create_markdown_artifact(what, key=f"{key}-plan", description=f"what is to be done for {image}"))
    kind = "columns" if plan.columns else "tiles"
    get_run_logger().info("%d blocks, %d to do, in %d %s", len(plan.grid), n_missing, plan.n_units, kind)
    with (
        _runner(shared, n_missing=n_missing, cluster=cluster, n_workers=n_workers, gpus=gpus) as run,
        watched(key=key, count=lambda: len(plan.done()), n_voxels=prod(plan.grid.shape)) as watch,
    ):
        result = segment(plan, run=run, watch=watch)
    made = f"{kind_of(result.result)} {result.result.location}"
    get_run_logger().info("%s: %d blocks run in %.1f s", made, result.n_run, result.wall_s)
    _warn_of(result.retries)
    return result


@contextmanager
def _runner(
    shared: DaskRunner | None, *, n_missing: int, cluster: str, n_workers: int, gpus: tuple[str, ...]
) -> Iterator[RunBlocks]:
    """Yield the shared runner or one opened for this scan, or, where nothing is to be done, one that needs no slot."""
    if not n_missing:
        yield shared or run_serial
        return
    opened = nullcontext(shared) if shared else open_runner(cluster=cluster, n_workers=n_workers, gpus=gpus)
    with slot(), opened as run:
        yield replace(run, given_up=given_up())


@stage("stitch")
def stitch_stage(image: str, *, labels: str, name: str) -> Retries:
    """Make instances of class labels; returns which blocks had to be run again."""
    with watched(key=key_of(image, name)) as watch, here(n_most=_MOST_HOSTS, given_up=given_up()) as run:
        made = stitch(image, labels=labels, name=name, run=run, watch=watch)
    get_run_logger().info("%d instances in %s", made.n_instances, made.labels.location)
    _warn_of(made.retries)
    return made.retries


@stage("evaluate")
def evaluate_stage(predicted: str, truth: str, *, ignore: int | None) -> Figures:
    """Compare the result with the truth."""
    with watched(key=key_of(predicted, "truth")) as watch:
        return evaluate(predicted, truth, ignore=ignore, watch=watch)


def _evaluated(result: str, truth: str | None, *, ignore: int | None) -> tuple[Figures | None, str]:
    """Return the figures, or why a truth cannot be compared with: that makes a good result no worse."""
    try:
        return (evaluate_stage(result, truth, ignore=ignore) if truth else None), ""
    except InputError as error:
        get_run_logger().warning("not evaluated: %s", error)
        return None, str(error)


@stage("report")
def report_stage(image: str, result: Segmented, *, figures: Figures | None, cause: str = "") -> None:
    """Put figures, or why there are none, and a picture of the result into the Prefect UI, and say so in the result."""
    opened, made = open_image(Location(image)), complete(result.result)
    png = picture(opened, made)
    text = report_markdown(result, figures=figures, cause=cause, png=png)
    key = key_of(image, made.location.name, "report")
    if shown(lambda: create_markdown_artifact(text, key=key, description=f"{kind_of(made)} of {image}")):
        mark_reported(opened, made.location.name)


@flow(name="segment", flow_run_name="{name} of {scan}")
def segment_scan(
    scan: ScanPath, image: ImagePath, model: ModelPath, name: LabelName = "classes", truth: TruthPath = None,
    cluster: Cluster = "local", workers: Workers = None, budget_bytes: Budget = None, shard: Shard = None,
    precision: Numbers = Precision.FLOAT32, tta: Augmentation = Tta.NONE, ignore: Ignore = None,
    instances: InstancesName = None,
) -> Made:
    """Ingest a scan, segment it, evaluate it where there is a truth, and report. Done work is not done again.

    Where ``instances`` are asked for, each object of the classes gets an id of its own in a label volume of that name.
    """
    try:
        model = model_path(model)
        check_paths(scan, image, model, truth)
        check_cluster(cluster)
    except PipelineError as error:  # of a path that may hold credentials no page and no event is made
        return cast("Made", failed(error))
    try:
        with pausable(), logged(), held(Location(image).absolute()):
            path, copied = ingest_stage(scan, image, shard=shard)
            result = segment_stage(
                path, model=model, name=name, cluster=cluster, workers=workers, budget_bytes=budget_bytes,
                precision=precision, tta=tta, instances=instances,
            )  # fmt: skip
            result = replace(result, retries=result.retries.after("ingest", copied))
            if instances:
                stitched = stitch_stage(path, labels=name, name=instances)
                result = replace(result, retries=result.retries.after("stitch", stitched))
            figures, cause = _evaluated(str(result.result.location), truth, ignore=ignore)
            report_stage(path, result, figures=figures, cause=cause)
    except GivenUpError as error:
        return cast("Made", Cancelled(message=str(error)))
    except PipelineError as error:
        if not isinstance(error, TakenError):
            _tell_of_failure(scan, image, name, error)
        return cast("Made", failed(error))
    made = {kind_of(result.result): str(result.result.location), "voxels": result.n_voxels}
    tell("haloseg.scan.published", scan, made)
    return result, figures


def _tell_of_failure(scan: str, image: str, name: str, error: PipelineError) -> None:
    """Leave a page with the cause and the blocks, and events for automations."""
    causes, retries = (error.causes, error.retries) if isinstance(error, QuarantineError) else ({}, "")
    text, key = failure_markdown(str(error), causes=causes, retries=retries), key_of(image, name, "failure")
    shown(lambda: create_markdown_artifact(text, key=key, description=f"why {scan} failed"))
    for index, cause in causes.items():
        tell("haloseg.block.quarantined", scan, {"block": index, "cause": cause})
    tell("haloseg.scan.failed", scan, {"cause": str(error)})


def tell(event: str, scan: str, payload: dict[str, Any]) -> None:
    """Emit an event about a scan, for automations."""
    emit_event(event, resource={"prefect.resource.id": f"haloseg.scan.{scan}"}, payload=payload)
