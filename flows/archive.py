"""The flow of an archive: every scan that is not done yet, the next one begun while the last one ends.

        |--- scan 1: ingest |--- segment ---------------| report |--- scan 3 ...
            |--- scan 2: ingest |....blocks wait....|--- segment --- ...       one cluster for all

What is done is told by the published labels; there is no other state. A scan that fails stops no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from time import monotonic
from typing import Any

from prefect import flow, get_run_logger, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

import pipeline.archive as archives
from flows.parameters import (
    ArchivePath,
    AtOnce,
    Augmentation,
    Budget,
    BudgetHours,
    Cluster,
    Ignore,
    ImageFolder,
    LabelName,
    Limit,
    ModelPath,
    Numbers,
    Pattern,
    Priority,
    Settle,
    TruthTemplate,
    Workers,
)
from flows.segment import LOCAL_WORKERS, segment_scan, tell
from flows.slots import LIMITS, limits_of
from flows.stages import failed, stage
from flows.stopping import given_up, pausable
from flows.table import Outcome, Table
from flows.watching import SHARED_RUNNER, logged
from pipeline.archive import Archive, Scan, Survey
from pipeline.compute.address import check_cluster
from pipeline.compute.cluster import DaskRunner, open_runner
from pipeline.compute.runner import cause_of
from pipeline.config import Precision, Tta
from pipeline.errors import ClusterError, GivenUpError, PipelineError, TakenError
from pipeline.scans.backend import open_scan
from pipeline.segment import Segmented
from pipeline.store.location import Location
from pipeline.store.roots import check_paths
from pipeline.store.shelf import model_path
from pipeline.unet.device import pick_device, workers_here

_NAMED = 10
_ALARMING_SHARE = 0.2


@stage("survey")
def survey_stage(archive: Archive) -> Survey:
    """Find the scans, and what has become of each."""
    found, log = archives.survey(archive), get_run_logger()
    log.info("%d scans in %s, %d to do now", len(found.scans), archive.root, len(found.todo))
    if found.others:
        named = ", ".join(found.others[:_NAMED])
        log.info("%d files are of no kind that can be read: %s", len(found.others), named)
    return found


@stage("open")
def open_stage(scans: Sequence[Scan], *, limit: int | None) -> tuple[tuple[Scan, ...], dict[str, str]]:
    """Open scans, up to so many that can be, and return these, and why others cannot, by path: bad ones cost no run."""
    good, causes = list[Scan](), dict[str, str]()
    for scan in scans:
        if limit is not None and len(good) == limit:
            break
        try:
            if scan.path != scan.image:
                open_scan(scan.path)
            good.append(scan)
        except Exception as error:  # noqa: BLE001 whatever a scan does, it stops no other
            cause = str(error) if isinstance(error, PipelineError) else cause_of(error)
            causes[scan.path] = cause
            get_run_logger().warning("%s", cause)
            tell("haloseg.scan.failed", scan.path, {"cause": cause})
    return tuple(good), causes


@flow(name="archive", flow_run_name="{name} of {archive}")
def segment_archive(
    archive: ArchivePath, model: ModelPath, pattern: Pattern = "**/*", name: LabelName = "classes",
    images: ImageFolder = None, truth: TruthTemplate = None, cluster: Cluster = "local", workers: Workers = None,
    budget_bytes: Budget = None, limit: Limit = None, budget_hours: BudgetHours = None,
    settle_s: Settle = 60.0, scans_at_once: AtOnce = 2, priority: Priority = [],  # noqa: B006 shown in the UI's form
    precision: Numbers = Precision.FLOAT32, tta: Augmentation = Tta.NONE, ignore: Ignore = None,
) -> State[Any]:
    """Segment every scan of an archive that is not done yet; scans that fail stop no others and are tried next time."""
    settings = {"cluster": cluster, "workers": workers, "budget_bytes": budget_bytes}
    settings |= {"precision": precision, "tta": tta, "ignore": ignore}
    deadline_s = monotonic() + 3600 * budget_hours if budget_hours else float("inf")
    try:
        what = Archive(
            archive, model_path(model), pattern, name, images, truth, settle_s, tuple(priority), precision, tta
        )
        check_paths(archive, what.model, images)
        check_cluster(cluster)
        with pausable(), logged(), _shown_at_the_end(Table(what, survey_stage(what))) as table:
            todo, bad = open_stage(table.found.todo, limit=limit) if table.found.todo else ((), {})
            for scan in table.found.todo:
                if scan.path in bad:
                    table.put(Outcome(scan, "failed", bad[scan.path]))
            if todo:
                with _cluster(cluster, workers, archive=archive) as run:
                    _scans(todo, what, table, settings=settings, at_once=scans_at_once, deadline_s=deadline_s, run=run)
    except GivenUpError as error:
        return Cancelled(message=str(error))
    except PipelineError as error:
        return failed(error)
    return _end(what, table)


@contextmanager
def _shown_at_the_end(table: Table) -> Iterator[Table]:
    """Show the table when the block is left, however it is; what was at work then waits."""
    try:
        yield table
    finally:
        for outcome in [each for each in table.outcomes.values() if each.state == "running"]:
            table.put(replace(outcome, state="waiting", cause="this run ended before it"))
        table.write()
        get_run_logger().info("%s", table.summary)


@contextmanager
def _cluster(address: str, workers: int | None, *, archive: str) -> Iterator[DaskRunner]:
    """Open one cluster for all scans of an archive."""
    device = pick_device("auto") if address == "local" else "cpu"
    n_workers, gpus = workers_here(device, asked=workers, usual=LOCAL_WORKERS)
    with open_runner(cluster=address, n_workers=n_workers, gpus=gpus) as run:
        shared = replace(run, given_up=given_up())
        runner, limits = SHARED_RUNNER.set(shared), LIMITS.set(limits_of(archive))
        try:
            yield shared
        finally:
            SHARED_RUNNER.reset(runner)
            LIMITS.reset(limits)


def _scans(
    todo: tuple[Scan, ...], archive: Archive, table: Table, *, settings: dict[str, Any], at_once: int,
    deadline_s: float, run: DaskRunner,
) -> None:
    """Work through the scans, some at once; what is left when time is over waits for another run.

    As one task: Prefect tells the flow runs that a flow begins by their order, so that a run that is resumed, or tried
    again, would be given those of other scans; those that a task begins are made anew.
    """
    lost = list[ClusterError]()

    def lane(scan: Scan, rank: int) -> None:
        SHARED_RUNNER.set(replace(run, priority=-rank))  # so that scans end one after another, not all at once
        if lost or run.given_up.is_set():
            return
        try:
            run.check()
        except ClusterError as error:  # it would fail every scan, one by one
            lost.append(error)
            return
        if monotonic() > deadline_s:
            table.put(Outcome(scan, "waiting", "the hours of this run are over"))
            return
        table.put(_of_scan(scan, archive, table, settings=settings))

    @task(name="scans", cache_policy=NO_CACHE)
    def all_of_them() -> None:
        with ThreadPoolExecutor(at_once, thread_name_prefix="haloseg-scan") as pool:
            futures = [pool.submit(copy_context().run, lane, scan, rank) for rank, scan in enumerate(todo)]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # cancelled, say
                run.give_up()
                raise

    all_of_them()
    if lost:
        raise lost[0]
    run.check_alive()


def _of_scan(scan: Scan, archive: Archive, table: Table, *, settings: dict[str, Any]) -> Outcome:
    """Run the flow of one scan, and tell what became of it."""
    begin = monotonic()
    try:
        scan = archives.judge(scan, archive, model_sha256=table.found.model_sha256, scaling=table.found.scaling)
        if not scan.is_todo:
            return Outcome(scan, str(scan.state), scan.detail)
        table.put(Outcome(scan, "running"))
        with tags(f"scan:{scan.relative}", f"model:{Location(archive.model).name}"):
            state = segment_scan(
                scan.path, scan.image, archive.model, archive.name, scan.truth, return_state=True, **settings
            )
        run_id = str(state.state_details.flow_run_id or "")
        if state.is_cancelled():
            return Outcome(scan, "waiting", "cancelled", monotonic() - begin, run_id=run_id)
        result = state.result(raise_on_failure=False)
    except Exception as error:  # noqa: BLE001 a scan that fails, however it does, stops no other
        return Outcome(scan, "failed", cause_of(error), monotonic() - begin)
    seconds = monotonic() - begin
    if isinstance(result, TakenError):
        return Outcome(scan, "taken", str(result))
    if isinstance(result, BaseException):
        return Outcome(scan, "failed", str(result) or cause_of(result), seconds, run_id=run_id)
    made: Segmented = result[0]
    scan = replace(scan, n_voxels=made.n_voxels)
    return Outcome(scan, "published", _retried(made), seconds, made.voxels_per_s, run_id)


def _retried(made: Segmented) -> str:
    return f"blocks retried: {made.retries.told}" if made.retries.told else ""


def _end(archive: Archive, table: Table) -> State[Any]:
    """Return the flow's final state, and tell automations of failures."""
    failed = [each for each in table.outcomes.values() if each.state == "failed"]
    n_scans = max(1, len(table.outcomes))
    if not failed:
        return Completed(message=table.summary)
    if len(failed) > _ALARMING_SHARE * n_scans:
        resource = {"prefect.resource.id": f"haloseg.archive.{archive.root}"}
        named = [each.scan.relative for each in failed[:_NAMED]]
        emit_event(
            "haloseg.archive.failures", resource=resource | {"haloseg.flow-run": str(flow_run.get_id())},
            payload={"failed": len(failed), "scans": n_scans, "named": named},
        )
    return Completed(name="Done with failures", message=table.summary)
