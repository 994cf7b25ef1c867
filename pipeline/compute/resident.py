"""ResidentWork: a run's work and its state on one Dask worker, and what a task of some blocks sends back to the run."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
from dask.utils import key_split
from distributed import Worker, WorkerPlugin

from pipeline.compute.metrics import count_failure, metered
from pipeline.compute.pulse import STUCK_AFTER_S, Pulse, StoppedError
from pipeline.compute.runner import BlockRecord, BlockWork, cause_of
from pipeline.errors import PipelineError, RunError

# One task at a time in a process, whatever the threads of the worker and the runs that share it: memory is planned so.
_ONE_TASK = Lock()
_KEYS_KEPT = 1000  # of tasks that were, by Dask's key_split: it keeps 100,000, 30 MiB of them


@dataclass(frozen=True, slots=True)
class Failed:
    """A block raised an error that counts against it alone; ``worker`` is the address of where."""

    cause: str
    worker: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """A block, or the state that blocks need, raised an error that ends the run."""

    error: PipelineError


Outcome = BlockRecord | Failed | Stopped


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What the first blocks of a task, at least one, came to within so many seconds; the others did not begin."""

    of_blocks: tuple[Outcome, ...]
    seconds: float


class ResidentWork(WorkerPlugin):
    """Keeps the work, pickled, on every worker there is or will be; the first block makes the state.

    The state is not made when the plugin arrives: that would block the worker's event loop while a network loads, and
    a worker that dies of it would be restarted into the same death for ever, with no block to blame.
    """

    def __init__(self, work: BlockWork, *, stuck_after_s: float = STUCK_AFTER_S) -> None:
        self._pickled: bytes = cloudpickle.dumps(work)
        self._kind, self._stuck_after_s = type(work).__name__, stuck_after_s
        self._pulse: Pulse
        self._over: bool

    def setup(self, worker: Worker) -> None:
        """Begin with no state; runs again after a restart of the worker."""
        self._over, self._pulse = False, Pulse(stuck_after_s=self._stuck_after_s)
        self._ready: tuple[BlockWork, Any] | None = None
        self._worker = worker.address

    def teardown(self, worker: Worker) -> None:
        """Drop the state; a block that runs ends at its next beat, and blocks that still wait do not begin."""
        del worker
        self._over, self._ready = True, None
        self._pulse.stop()

    def run_blocks(self, indices: tuple[int, ...], *, task_s: float) -> TaskOutcome:
        """Run blocks; after ``task_s`` seconds, or an error that ends the run, no further one begins."""
        if key_split.cache_info().currsize > _KEYS_KEPT:
            key_split.cache_clear()
        outcomes: list[Outcome] = []
        with _ONE_TASK:
            begin = monotonic()
            for index in indices:
                outcomes.append(self.run(index))
                if monotonic() - begin >= task_s or isinstance(outcomes[-1], Stopped):
                    break
            return TaskOutcome(tuple(outcomes), monotonic() - begin)

    def run(self, index: int) -> Outcome:
        """Run one block, and count what it did."""
        with self._pulse.of_block(index), metered(work=self._kind) as meter:
            outcome = self._run(index)
        if isinstance(outcome, BlockRecord):
            meter.end(outcome)
        elif not self._over:
            count_failure(work=self._kind)
        return outcome

    def _run(self, index: int) -> Outcome:
        if self._over:
            return Failed("the run is over", self._worker)
        try:
            work, state = self._ready = self._ready or self._make()
            return work.run(state, index)
        except StoppedError:
            return Failed("the run is over", self._worker)
        except PipelineError as error:
            return Stopped(_portable(error))
        except Exception as error:  # noqa: BLE001 whatever a block dies of is reported, never lost
            return Failed(cause_of(error), self._worker)

    def _make(self) -> tuple[BlockWork, Any]:
        try:
            work: BlockWork = pickle.loads(self._pickled)
            return work, work.setup()
        except PipelineError:
            raise
        except Exception as error:
            raise RunError(
                f"every worker must get ready for its blocks, got {cause_of(error)} on {self._worker}; mend it and run "
                "the same command again"
            ) from error


def _portable(error: PipelineError) -> PipelineError:
    """Return the error if it survives pickling, else one that does and says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 an error's own constructor may raise anything
        return RunError(cause_of(error))
    return error
