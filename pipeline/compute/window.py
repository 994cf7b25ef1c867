"""Window: a run's blocks on a Dask cluster, a few tasks per worker at a time, until all are done or quarantined.

A Dask task costs some milliseconds of the one scheduler. Blocks that are short go in tasks of many, as many as fit into
half a second, so that a hundred workers ask for no more than two hundred tasks a second; any other block is a task.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from queue import Empty, SimpleQueue
from threading import Event
from time import monotonic
from typing import Any, Self

from dask.base import annotate
from distributed import Client, Future, KilledWorker

from pipeline.compute.devices import gpu_workers
from pipeline.compute.losses import Losses
from pipeline.compute.resident import Failed, Stopped, TaskOutcome
from pipeline.compute.retry_log import RetryLog
from pipeline.compute.runner import RETRIES, BlockRecord, Quarantined, cause_of, check_quarantine
from pipeline.compute.upkeep import SPAN, forget_submits, on_scheduler
from pipeline.compute.versions import Newcomers, ThroughGate
from pipeline.errors import GivenUpError, RunError

TASKS_PER_WORKER = 4
TASK_S = 0.5
LARGEST_TASK = 100
REFRESH_S = 2.0
RESULT_TIMEOUT_S = 5.0
LOST_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Task:
    """One attempt at some blocks; ``avoid`` is where the last one, at a block alone, failed; ``others`` may run it.

    ``causes`` say why earlier attempts came to nothing, also those that Dask made again and that count for none.
    """

    indices: tuple[int, ...]
    attempt: int = 0
    avoid: str = ""
    others: frozenset[str] = frozenset()
    causes: tuple[str, ...] = ()


class Window:
    """The blocks in flight of one run; what it holds does not grow with the number of blocks.

    Dask counts a worker's death against every task that was on its way to that worker, and gives up a task after some
    deaths. The blocks of a task of many then become tasks of their own. A block that was alone in its task is only a
    suspect: when all others are done it runs again, the only one in flight, and then the blame is sure.

    Parameters
    ----------
    name : of the plugin that holds the run's work on every worker
    worker_timeout_s : how long the run goes on waiting without a single worker
    given_up : once set, from any thread, the run ends
    losses : tells which tasks were on a worker that died
    priority : of two runs on one cluster, the blocks of that of the higher one go first
    uses_device : blocks go to GPU workers alone where there are any; else these are left alone where there are others
    """

    def __init__(
        self, client: Client, *, name: str, on_record: Callable[[BlockRecord], None], worker_timeout_s: float,
        given_up: Event, losses: Losses, priority: int = 0, uses_device: bool = True,
    ) -> None:
        self._client, self._name, self._on_record = client, name, on_record
        self._worker_timeout_s, self._given_up, self._priority = worker_timeout_s, given_up, priority
        self._losses, self._retry_log, self._uses_device = losses, RetryLog(), uses_device
        self._in_flight: dict[Future[object], _Task] = {}
        self._finished: SimpleQueue[Future[object]] = SimpleQueue()
        self._lost: list[Future[object]] = []
        self._numbers, self._n_per_task = count(), 1
        self._again: deque[_Task] = deque()
        self._suspects: list[_Task] = []
        self._quarantined: list[Quarantined] = []
        self._workers, self._newcomers = frozenset[str](), Newcomers(client)
        self._gpu = self._mixed = False
        self._alone = False
        self._seen_s = self._asked_s = monotonic()
        self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Cancel what is still in flight, which is nothing unless the run is being left by an error."""
        self._retry_log.close()
        if self._in_flight:
            with suppress(Exception):  # a cluster that is gone has nothing to cancel, and the cause is on its way up
                self._client.cancel(list(self._in_flight), force=True)
        self._in_flight.clear()
        self._lost.clear()
        self._losses.forget(self._name)

    def run(self, indices: Iterable[int]) -> tuple[Quarantined, ...]:
        """Run every block; the iterable is read only as far as there is room in the window."""
        self._drain(iter(indices))
        self._alone = True
        for suspect in self._suspects:
            self._again.append(suspect)
            self._drain(iter(()))
        return tuple(self._quarantined)

    def _drain(self, indices: Iterator[int]) -> None:
        self._fill(indices)
        while self._in_flight:
            if self._given_up.is_set():
                raise GivenUpError
            for future, outcome in self._outcomes(self._next_finished()):
                self._settle(self._taken(future), outcome)
            self._fill(indices)

    def _fill(self, indices: Iterator[int]) -> None:
        if monotonic() - self._asked_s > REFRESH_S:
            self._refresh()
        while len(self._in_flight) < TASKS_PER_WORKER * max(1, len(self._workers)):
            task = self._again.popleft() if self._again else _Task(tuple(islice(indices, self._n_per_task)))
            if not task.indices:
                return
            self._submit(task)

    def _submit(self, task: _Task) -> None:
        others = self._wanted(task.avoid)
        for_all = bool(others) and (self._uses_device or not self._mixed)  # Dask steals for others, where they may
        with annotate(span=SPAN):
            future = self._client.submit(
                ThroughGate(), self._name, task.indices, TASK_S,
                key=f"{self._name}-{next(self._numbers)}", pure=False, retries=0, priority=self._priority,
                resources={"GPU": 1} if self._gpu else None,
                workers=sorted(others) or None, allow_other_workers=for_all,
            )  # fmt: skip
        self._in_flight[future] = replace(task, others=others)
        future.add_done_callback(self._finished.put)

    def _wanted(self, avoid: str) -> frozenset[str]:
        """Return the workers that an attempt is for; empty: any will do.

        Others may take it, by Dask's stealing too, but for what is kept off GPU workers: see ``_free``.
        """
        others = self._workers - {avoid} if avoid else frozenset[str]()
        if not self._mixed:
            return others
        return frozenset() if self._uses_device else others or self._workers  # a GPU is asked for as a resource

    def _next_finished(self) -> list[Future[object]]:
        """Return all attempts that have finished, as soon as there is one; none if that takes long.

        A worker may die with results that nobody has fetched. They are lost; Dask runs those tasks again.
        """
        futures = [future for future in self._lost if future.done()]
        with suppress(Empty):
            if not futures:
                futures.append(self._finished.get(timeout=LOST_POLL_S if self._lost else REFRESH_S))
            while True:
                futures.append(self._finished.get_nowait())
        ended = {future: future.done() for future in (*self._lost, *futures)}  # asked once: it may change at any moment
        self._lost = [future for future, done in ended.items() if not done]
        return [future for future, done in ended.items() if done and future in self._in_flight]

    def _outcomes(self, futures: list[Future[object]]) -> list[tuple[Future[object], object]]:
        """Return what the attempts sent back, in one message if none of them has an error, but for what is lost."""
        gather = partial(self._client.gather, futures, asynchronous=True)
        with suppress(Exception, asyncio.CancelledError):
            outcomes = self._client.sync(gather, callback_timeout=RESULT_TIMEOUT_S)
            return list(zip(futures, outcomes, strict=True))
        found: list[tuple[Future[object], object]] = []
        for future in futures:
            try:
                found.append((future, future.result(timeout=RESULT_TIMEOUT_S if future.done() else 0)))
            except TimeoutError:
                self._lost.append(future)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 sorted by kind in _settle
                found.append((future, error))
        return found

    def _taken(self, future: Future[object]) -> _Task:
        """Return the task of a future that is in flight no more, with what happened to it on the way."""
        task, causes = self._in_flight.pop(future), self._losses.pop(str(future.key))
        if causes:
            first, n_more = task.indices[0], len(task.indices) - 1
            self._retry_log.warn(f"block {first} and {n_more} more were sent again: {causes[0]}")
        return replace(task, causes=task.causes + causes)

    def _settle(self, task: _Task, outcome: object) -> None:
        """Act on what one attempt came to."""
        match outcome:
            case TaskOutcome():
                n_begun = len(outcome.of_blocks)
                for index, of_block in zip(task.indices[:n_begun], outcome.of_blocks, strict=True):
                    self._settle_block(index, of_block, task=task)
                self._pace(task, n_begun, seconds=outcome.seconds)
            case str():
                for index in task.indices:
                    self._count_against(index, "the worker does not hold the run's work yet", task=task, worker=outcome)
            case KilledWorker():
                self._suspect(task, n_deaths=outcome.allowed_failures + 1)
            case concurrent.futures.CancelledError() | asyncio.CancelledError() | OSError():
                raise RunError(
                    "the Dask scheduler must live as long as the run, got blocks that it lost or cancelled; what is "
                    "done is kept, start the scheduler and run the same command again"
                )
            case BaseException():
                for index in task.indices:
                    self._count_against(index, cause_of(outcome), task=task, worker="")
            case _:
                raise TypeError(f"a task must return a TaskOutcome, got {outcome!r}")

    def _settle_block(self, index: int, outcome: object, *, task: _Task) -> None:
        match outcome:
            case BlockRecord():
                self._on_record(replace(outcome, retries=task.causes) if task.causes else outcome)
            case Failed():
                self._count_against(index, outcome.cause, task=task, worker=outcome.worker)
            case Stopped():
                raise outcome.error
            case _:
                raise TypeError(f"the run of a block must return a BlockRecord, got {outcome!r}; return one")

    def _pace(self, task: _Task, n_begun: int, *, seconds: float) -> None:
        """Choose how many blocks go into the next tasks, and put back those of this one that did not begin."""
        n_blocks = len(task.indices)
        if n_begun < n_blocks:
            self._n_per_task = n_begun
            left = range(n_begun, n_blocks, n_begun)
            parts = (task.indices[start : start + n_begun] for start in left)
            self._again.extend(_Task(part, task.attempt, causes=task.causes) for part in parts)
        elif seconds < TASK_S / 2:
            self._n_per_task = max(self._n_per_task, min(2 * n_blocks, LARGEST_TASK))

    def _count_against(self, index: int, cause: str, *, task: _Task, worker: str) -> None:
        """Try the block again, alone, on another worker if there is one, up to the number of retries."""
        if self._newcomers.woke(worker):
            self._refresh()
        self._retry_log.warn(f"block {index} failed, attempt {task.attempt + 1} of {1 + RETRIES}: {cause}")
        if task.attempt < RETRIES:
            self._again.append(_Task((index,), task.attempt + 1, worker, causes=(*task.causes, cause)))
        else:
            self._quarantine(Quarantined(index, cause))

    def _suspect(self, task: _Task, *, n_deaths: int) -> None:
        """Set aside a block whose workers died; quarantine it if none other was in flight."""
        if len(task.indices) > 1:
            self._again.extend(_Task((index,), task.attempt, causes=task.causes) for index in task.indices)
            return
        (index,) = task.indices
        cause = f"worker died {n_deaths} times on this block (out of memory, or stuck?)"
        if self._alone:
            self._quarantine(Quarantined(index, cause))
            return
        self._retry_log.warn(f"block {index} is run again when all others are done: {n_deaths} workers died under it")
        self._suspects.append(_Task((index,), task.attempt + 1, causes=task.causes))
        check_quarantine([*self._quarantined, *(Quarantined(each.indices[0], cause) for each in self._suspects)])

    def _quarantine(self, block: Quarantined) -> None:
        self._quarantined.append(block)
        check_quarantine(self._quarantined)

    def _refresh(self) -> None:
        """Ask which workers there are now, and which of them count; see ``uses_device``."""
        self._asked_s = now = monotonic()
        on_scheduler(self._client, forget_submits)
        every: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        with_gpu = gpu_workers(every)
        self._gpu = self._uses_device and (self._gpu or bool(with_gpu))
        without = frozenset(every) - with_gpu
        self._workers = with_gpu if self._gpu else without or frozenset(every)
        self._mixed = len(self._workers) < len(every)
        self._newcomers.compare(self._workers)
        self._free()
        if self._workers:
            self._seen_s = now
        elif now - self._seen_s > self._worker_timeout_s:
            raise RunError(
                f"a run needs at least one worker, got none for {self._worker_timeout_s:g} s; what is done is kept, "
                "start workers and run the same command again"
            )

    def _free(self) -> None:
        """Submit anew what was to run on workers that are all gone: Dask lets it wait for them (distributed 2026.8)."""
        for future, task in list(self._in_flight.items()):
            if task.others and not task.others & self._workers and not future.done():
                self._client.cancel([future], force=True)
                task = self._taken(future)
                self._again.append(_Task(task.indices, task.attempt, causes=task.causes))
