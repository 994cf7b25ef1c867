"""What an operator sees while a flow runs: progress artifacts, and the log of workers in the log of the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event, Lock, Thread
from time import monotonic
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.showing import shown
from flows.stopping import given_up
from pipeline.compute.cluster import DaskRunner
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import Watcher
from pipeline.console import bars, quantity
from pipeline.errors import GivenUpError

SECONDS_BETWEEN_UPDATES = 2.0
_SHOWN_STAGES = ("ingest", "segment", "evaluate", "components", "instances")
_LARGEST_SHARE_COUNTING = 0.05
_SHARE_BETWEEN_UPDATES = 0.01

# The runner of a flow that has one cluster for many scans.
SHARED_RUNNER: ContextVar[DaskRunner | None] = ContextVar("shared_runner", default=None)


class ArtifactWatcher:
    """Shows the progress of the long stages in the Prefect UI, now and then, and of all to ``also``; see Watcher.

    Parameters
    ----------
    key : of the artifacts, before the stage's name
    count : tells how many blocks of the stage "segment" are done, from the ledger, since a worker reports a column of
        blocks when all of it is done: then these count once
    n_voxels : of the stage "segment"
    """

    def __init__(
        self, also: Watcher, *, key: str, count: Callable[[], int] | None = None, n_voxels: int | None = None
    ) -> None:
        self._also, self._key, self._count, self._n_voxels = also, key, count, n_voxels
        self._given_up, self._lock = given_up(), Lock()
        self._stage, self._artifact = "", cast("UUID | None", None)
        self._n_blocks = self._n_before = self._n_reported = self._n_counted = self._n_told = 0
        self._begin_s = self._updated_s = 0.0

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Make a progress artifact for the stage."""
        self._also.begin(stage, n_blocks=n_blocks, n_done=n_done)
        with self._lock:
            self._stage, self._n_blocks = stage, n_blocks
            self._n_before = self._n_reported = self._n_counted = self._n_told = n_done
            self._begin_s = self._updated_s = monotonic()
            self._artifact = None
            if stage in _SHOWN_STAGES:
                key, told = f"{self._key}-{stage}", self._description()
                made = shown(lambda: create_progress_artifact(self._percent(), key=key, description=told))
                self._artifact = made if isinstance(made, UUID) else None

    def advance(self, record: BlockRecord) -> None:
        """Move the artifact, now and then and at the end; raises GivenUpError where the flow has been cancelled."""
        if self._given_up.is_set():
            raise GivenUpError
        self._also.advance(record)
        self._n_reported += record.n_blocks
        if self._n_done == self._n_blocks != self._n_told or self._is_time():
            self._update()

    def count(self) -> None:
        """Move the artifact of the stage "segment" to what the ledger says; another thread may advance meanwhile."""
        if self._count is None or self._stage != "segment" or self._n_done == self._n_blocks:
            return
        self._n_counted = min(self._count(), self._n_blocks - 1)
        if self._is_time():
            self._update()

    @property
    def _n_done(self) -> int:
        return max(self._n_counted, min(self._n_reported, self._n_blocks))

    def _is_time(self) -> bool:
        """Whether there is news, and old enough: long stages are told of less often, or events would flood the feed."""
        now = monotonic()
        pause_s = max(SECONDS_BETWEEN_UPDATES, _SHARE_BETWEEN_UPDATES * (now - self._begin_s))
        return self._n_done > self._n_told and now - self._updated_s > pause_s

    def _update(self) -> None:
        with self._lock:
            self._updated_s, self._n_told = monotonic(), self._n_done
            artifact, percent, told = self._artifact, self._percent(), self._description()
            if artifact is not None:
                shown(lambda: update_progress_artifact(artifact, percent, description=told))

    def _percent(self) -> float:
        return 100.0 * self._n_done / max(1, self._n_blocks)

    def _description(self) -> str:
        now = f"{self._stage}: {self._n_done:,} of {self._n_blocks:,} blocks"
        took_s, n_new = monotonic() - self._begin_s, self._n_done - self._n_before
        if not n_new or took_s <= 0:
            return now
        if self._n_voxels and self._stage == "segment":
            now += f", {quantity(self._n_voxels * n_new / self._n_blocks / took_s)} voxels/s"
        left_s = took_s * (self._n_blocks - self._n_done) / n_new
        return f"{now}, {duration(left_s)} left" if left_s else f"{now}, took {duration(took_s)}"


@contextmanager
def watched(
    *, key: str, count: Callable[[], int] | None = None, n_voxels: int | None = None
) -> Iterator[Watcher]:
    """Show progress in the Prefect UI and, where somebody sits at a terminal, there too; see ArtifactWatcher."""
    with bars(shown=sys.stderr.isatty()) as terminal:
        watcher, over = ArtifactWatcher(terminal, key=key, count=count, n_voxels=n_voxels), Event()

        def tick() -> None:
            wait_s = SECONDS_BETWEEN_UPDATES
            while not over.wait(wait_s):
                begin = monotonic()
                watcher.count()
                wait_s = max(SECONDS_BETWEEN_UPDATES, (monotonic() - begin) / _LARGEST_SHARE_COUNTING)

        thread = Thread(target=copy_context().run, args=(tick,), name="haloseg-progress", daemon=True)
        thread.start()
        try:
            yield watcher
        finally:
            over.set()
            thread.join()


class _ToRun(logging.Handler):
    """Hands records to the log of a run; those of Dask workers say which worker."""

    def __init__(self, run_log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        super().__init__(logging.INFO)
        self._run_log = run_log

    def emit(self, record: logging.LogRecord) -> None:
        worker = getattr(record, "worker", None)
        self._run_log.log(record.levelno, "%s%s", f"worker {worker}: " if worker else "", record.getMessage())


_bridged: ContextVar[bool] = ContextVar("bridged", default=False)


@contextmanager
def logged() -> Iterator[None]:
    """Show what haloseg logs, here and on the workers, in the log of the outermost flow run."""
    if _bridged.get():
        yield
        return
    ours, handler, token = logging.getLogger("haloseg"), _ToRun(get_run_logger()), _bridged.set(True)
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        _bridged.reset(token)


def duration(seconds: float) -> str:
    """Return a time as people say it: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
