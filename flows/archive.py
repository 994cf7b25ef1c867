"""The flow of an archive: every scan that is not done yet, the next one begun while the last one ends.

        |--- scan 1: ingest |--- segment ---------------| report |--- scan 3 ...
            |--- scan 2: ingest |....blocks wait....|--- segment --- ...       one cluster for all

What is done is told by the published labels; there is no other state. A scan that fails stops no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from threading import Lock
from time import monotonic
from typing import Any

from prefect import flow, get_run_logger, tags
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Completed

import pipeline.archive as archives
from flows.parameters import (
    ArchivePath,
    AtOnce,
    Budget,
    BudgetHours,
    Cluster,
    ImageFolder,
    LabelName,
    Limit,
    ModelPath,
    Pattern,
    Priority,
    Settle,
    TruthTemplate,
    Workers,
)
from flows.reports import archive_markdown
from flows.segment import segment_scan
from flows.stages import failed, stage
from flows.watching import SECONDS_BETWEEN_UPDATES, SHARED_RUNNER, duration, logged, slug
from pipeline.archive import Archive, Scan, Survey
from pipeline.compute.cluster import DaskRunner, open_runner
from pipeline.compute.runner import cause_of
from pipeline.config import DEFAULT_BUDGET_BYTES
from pipeline.console import quantity
from pipeline.errors import ClusterError, PipelineError, TakenError
from pipeline.segment import Segmented
from pipeline.store.location import Location
from pipeline.store.roots import check_paths

_SHOWN = 500
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one scan in this run; ``cause`` says why it failed or waits."""

    scan: Scan
    state: str
    cause: str = ""
    seconds: float = 0.0
    voxels_per_s: float = 0.0
    run_id: str = ""


class Table:
    """The archive's table under a stable key, kept up to date while the flow runs."""

    def __init__(self, archive: Archive, found: Survey) -> None:
        self._archive, self._begin_s, self._written_s = archive, monotonic(), 0.0
        self._lock = Lock()
        self.outcomes = {scan.path: Outcome(scan, str(scan.state), scan.detail) for scan in found.scans}

    def put(self, outcome: Outcome) -> None:
        """Take what became of a scan, and show it."""
        with self._lock:
            self.outcomes[outcome.scan.path] = outcome
            if monotonic() - self._written_s > SECONDS_BETWEEN_UPDATES:
                self.write()

    def write(self) -> None:
        """Make a new version of the artifact."""
        self._written_s = monotonic()
        create_markdown_artifact(
            archive_markdown(self._rows(), summary=self.summary), key=f"archive-{slug(self._archive.root)}",
            description=f"{self._archive.root}: {self.summary}",
        )

    @property
    def summary(self) -> str:
        """How many scans are in each state."""
        counts: dict[str, int] = {}
        for each in self.outcomes.values():
            counts[each.state] = counts.get(each.state, 0) + 1
        told = ", ".join(f"{n:,} {state}" for state, n in sorted(counts.items(), key=lambda each: -each[1]))
        return f"{len(self.outcomes):,} scans: {told or 'none'}; {duration(monotonic() - self._begin_s)}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yield those first that need a look, then those of this run; of very many the first."""
        rank = {"failed": 0, "running": 1, "published": 2}
        ordered = sorted(self.outcomes.values(), key=lambda each: (rank.get(each.state, 3), each.scan.relative))
        for each in ordered[:_SHOWN]:
            labels = f"`{Location(each.scan.image) / 'labels' / self._archive.name}`"
            run = f"[run](/runs/flow-run/{each.run_id})" if each.run_id else ""
            yield (
                each.scan.relative, each.state, f"{each.scan.n_voxels:,}" if each.scan.n_voxels else "",
                duration(each.seconds) if each.seconds else "",
                quantity(each.voxels_per_s) if each.voxels_per_s else "",
                labels if each.state in ("done", "published") else each.cause.replace("|", "\\|"), run,
            )  # fmt: skip
        if len(ordered) > _SHOWN:
            yield (f"and {len(ordered) - _SHOWN:,} more", *[""] * 6)


@stage("survey")
def survey_stage(archive: Archive) -> Survey:
    """Find the scans, and what has become of each."""
    found, log = archives.survey(archive), get_run_logger()
    log.info("%d scans in %s, %d to do now", len(found.scans), archive.root, len(found.todo))
    if found.others:
        named = ", ".join(found.others[:_NAMED])
        log.info("%d files are no scans of a kind that can be read: %s", len(found.others), named)
    return found


@flow(name="archive", flow_run_name="{name} of {archive}")
def segment_archive(
    archive: ArchivePath, model: ModelPath, pattern: Pattern = "**/*", name: LabelName = "classes",
    images: ImageFolder = None, truth: TruthTemplate = None, cluster: Cluster = "local", workers: Workers = 2,
    budget_bytes: Budget = DEFAULT_BUDGET_BYTES, limit: Limit = None, budget_hours: BudgetHours = None,
    settle_s: Settle = 60.0, scans_at_once: AtOnce = 2, priority: Priority = [],  # noqa: B006 shown in the UI's form
) -> State[Any]:
    """Segment every scan of an archive that is not done yet; scans that fail stop no others and are tried next time."""
    what = Archive(archive, model, pattern, name, images, truth, settle_s, tuple(priority))
    settings = {"cluster": cluster, "workers": workers, "budget_bytes": budget_bytes}
    try:
        check_paths(archive, model, images)
        with logged():
            found = survey_stage(what)
            table, todo = Table(what, found), found.todo[:limit]
            deadline_s = monotonic() + 3600 * budget_hours if budget_hours else float("inf")
            if todo:
                with _cluster(cluster, workers) as run:
                    _run(todo, what, table, settings=settings, at_once=scans_at_once, deadline_s=deadline_s, run=run)
            table.write()
            get_run_logger().info("%s", table.summary)
    except PipelineError as error:
        return failed(error)
    return _end(what, table)


@contextmanager
def _cluster(address: str, workers: int) -> Iterator[DaskRunner]:
    """Open one cluster for all scans."""
    with open_runner(cluster=address, n_workers=workers) as run:
        token = SHARED_RUNNER.set(run)
        try:
            yield run
        finally:
            SHARED_RUNNER.reset(token)


def _run(
    todo: tuple[Scan, ...], archive: Archive, table: Table, *, settings: dict[str, Any], at_once: int,
    deadline_s: float, run: DaskRunner,
) -> None:
    """Work through the scans, some at once; what is left when time is over waits for another run."""

    def lane(scan: Scan) -> None:
        if run.lost or run.given_up.is_set():
            return
        if monotonic() > deadline_s:
            table.put(Outcome(scan, "waiting", "the hours of this run are over"))
            return
        table.put(_of_scan(scan, archive, table, settings=settings))

    with ThreadPoolExecutor(at_once, thread_name_prefix="haloseg-scan") as pool:
        futures = [pool.submit(copy_context().run, lane, scan) for scan in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:  # cancelled, say
            run.give_up()
            raise
    if run.lost:
        raise ClusterError("the Dask scheduler must live as long as the run, got none; the next run goes on")


def _of_scan(scan: Scan, archive: Archive, table: Table, *, settings: dict[str, Any]) -> Outcome:
    """Run the flow of one scan, and tell what became of it."""
    begin = monotonic()
    try:
        scan = archives.judge(scan, archive)
        if scan not in Survey((scan,), ()).todo:
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
    return Outcome(scan, "published", "", seconds, made.voxels_per_s, run_id)


def _end(archive: Archive, table: Table) -> State[Any]:
    """Return the flow's final state, and tell automations of failures."""
    failed = [each for each in table.outcomes.values() if each.state == "failed"]
    n_tried = len(failed) + sum(each.state == "published" for each in table.outcomes.values())
    if not failed:
        return Completed(message=table.summary)
    emit_event(
        "haloseg.archive.failures",
        resource={"prefect.resource.id": f"haloseg.archive.{archive.root}", "haloseg.flow-run": str(flow_run.get_id())},
        payload={"failed": len(failed), "tried": n_tried, "share": len(failed) / n_tried,
                 "scans": [each.scan.relative for each in failed[:_NAMED]]},
    )  # fmt: skip
    return Completed(name="Done with failures", message=table.summary)
