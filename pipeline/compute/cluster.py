"""The runner on Dask workers: processes of this machine, started for the run, or those of a cluster that is there."""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from time import monotonic, sleep
from uuid import uuid4

from distributed import Client, Security
from distributed.comm.core import connect
from distributed.utils import LoopRunner

from pipeline.compute.address import check_address
from pipeline.compute.asking import tell_all
from pipeline.compute.devices import can_copy, device_of
from pipeline.compute.local import local_client
from pipeline.compute.losses import Losses
from pipeline.compute.pulse import STUCK_AFTER_S
from pipeline.compute.resident import ResidentWork
from pipeline.compute.runner import BlockRecord, BlockWork, Quarantined, cause_of
from pipeline.compute.upkeep import PREFIX
from pipeline.compute.versions import behind_gate, check_versions
from pipeline.compute.window import Window
from pipeline.errors import ArgumentError, ClusterError

log = logging.getLogger("haloseg")

CONNECT_TIMEOUT_S = 10.0
FIRST_WORKER_TIMEOUT_S = 30.0
WORKER_TIMEOUT_S = 300.0
_NOISY_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado.application", "asyncio")


@dataclass(frozen=True, slots=True)
class DaskRunner:
    """Runs blocks on the workers of a cluster, one at a time on each; see RunBlocks.

    The work goes to each worker once, and each makes its state once. Workers may come and go during the run. Where
    the resources of some name a GPU (``--resources GPU=1``), they alone compute, and do not copy while others can. Of
    several runs at once on one cluster the blocks of the one of higher ``priority`` go first.
    """

    client: Client
    losses: Losses
    worker_timeout_s: float = WORKER_TIMEOUT_S
    stuck_after_s: float = STUCK_AFTER_S
    given_up: Event = field(default_factory=Event)
    priority: int = 0

    def __call__(
        self, work: BlockWork, indices: Iterable[int], *, on_record: Callable[[BlockRecord], None]
    ) -> tuple[Quarantined, ...]:
        """Run every block; see RunBlocks.

        Raises
        ------
        RunError : the scheduler died, no worker is left, or so many blocks fail that it is the run that is broken.
        PipelineError : what a block or the work's setup raised, unchanged.
        """
        name = f"{PREFIX}{self.client.id}-{uuid4().hex}"
        with (
            behind_gate(self.client, ResidentWork(work, stuck_after_s=self.stuck_after_s), name=name),
            Window(
                self.client, name=name, on_record=on_record, worker_timeout_s=self.worker_timeout_s,
                given_up=self.given_up, priority=self.priority, losses=self.losses,
                uses_device=getattr(work, "uses_device", True),
            ) as window,
        ):
            return window.run(indices)

    def give_up(self) -> None:
        """End all runs on this cluster soon, from any thread: each raises GivenUpError, and its blocks stop."""
        self.given_up.set()

    def device(self) -> str:
        """Return the device of the workers that blocks go to.

        Raises
        ------
        ClusterError : the scheduler is gone.
        """
        self.check_alive()
        try:
            return device_of(self.client)
        except Exception as error:
            raise ClusterError(
                f"the workers must tell what they compute on, got {cause_of(error)}; see that the scheduler lives, and "
                "run the same command again"
            ) from error

    def can_copy(self, scan: str) -> bool:
        """Whether there are workers without a GPU, and all of them see the scan; says so where only some do."""
        self.check_alive()
        try:
            return can_copy(self.client, scan)
        except OSError:  # the scheduler dies in this moment
            self.check_alive()
            return False

    def check_alive(self) -> None:
        """See that the scheduler lives; one that the client is just connecting to again gets some seconds.

        Raises
        ------
        ClusterError : it is gone.
        """
        until_s = monotonic() + CONNECT_TIMEOUT_S
        while self.client.status == "connecting" and monotonic() < until_s:
            sleep(0.2)
        if self.client.status != "running":
            raise ClusterError("the Dask scheduler must live as long as the run, got none; the next run goes on")

    def check(self) -> None:
        """See that the scheduler lives and that no worker has other versions.

        Raises
        ------
        ClusterError : it is gone, or one has.
        """
        self.check_alive()
        try:
            check_versions(self.client)
        except OSError:  # it dies in this moment
            self.check_alive()


@contextmanager
def open_runner(
    *, cluster: str = "local", n_workers: int, gpus: tuple[str, ...] = (),
    worker_timeout_s: float = WORKER_TIMEOUT_S, stuck_after_s: float = STUCK_AFTER_S,
) -> Iterator[DaskRunner]:
    """Yield a runner of blocks, on a cluster that is closed at the end if it was started here.

    Parameters
    ----------
    cluster : "local" for processes of this machine, or the address of a scheduler, tcp://host:port or tls://host:port
    n_workers : processes of a local cluster; an address brings its own
    gpus : one for each of these processes, which sees no other, as CUDA_VISIBLE_DEVICES names it; none on the CPU
    worker_timeout_s : how long a run goes on waiting when it has lost every worker
    stuck_after_s : a worker whose block shows no sign of life for so long ends itself, and the block runs elsewhere

    Raises
    ------
    ArgumentError : the cluster is neither, or there is not at least one worker.
    ClusterError : no scheduler answers at the address, it has no worker, or workers have other versions.
    """
    if n_workers < 1:
        raise ArgumentError(f"a run needs at least 1 worker, got {n_workers}; use 1 or more")
    check_address(cluster)
    is_local = cluster == "local"
    with _quiet_logs(), local_client(n_workers, gpus) if is_local else _remote_client(cluster) as client:
        tell_all(client, client.forward_logging, "haloseg")
        losses = Losses(prefix=f"{PREFIX}{client.id}-")
        with losses.listening(client):
            yield DaskRunner(client, losses, worker_timeout_s, stuck_after_s)


def device_at(address: str) -> str:
    """Return the device of the workers of the scheduler at an address; see ``open_runner`` for what it raises."""
    with open_runner(cluster=address, n_workers=1) as run:
        return run.device()


@contextmanager
def _remote_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that has at least one worker, and none of other versions."""
    try:
        LoopRunner().run_sync(_shake_hands, address)
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except Exception as error:
        raise ClusterError(
            f"a Dask scheduler must answer at {address} within {CONNECT_TIMEOUT_S:g} s, got {cause_of(error)}; "
            "start it or mend the address"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER_TIMEOUT_S)
        except TimeoutError as error:
            raise ClusterError(
                f"the scheduler at {address} must have a worker within {FIRST_WORKER_TIMEOUT_S:g} s, got none; "
                f"start some: dask worker {address} --nthreads 1"
            ) from error
        check_versions(client)
        yield client


async def _shake_hands(address: str) -> None:
    """Connect once within the time limit: Client waits for ever on a peer that is mute (distributed 2026.8)."""
    arguments = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, timeout=CONNECT_TIMEOUT_S, **arguments), CONNECT_TIMEOUT_S)
    comm.abort()


class _ToOurLog(logging.Handler):
    """Hands Dask's errors to our own log as details: what a user must know comes as an exception or a quarantine."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("%s: %s", record.name, record.getMessage())


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep Dask's own chatter off the terminal for as long as the block runs."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
        each.handlers, each.propagate = [_ToOurLog()], False
    try:
        yield
    finally:
        for each, level, handlers, propagate in before:
            each.setLevel(level)
            each.handlers, each.propagate = handlers, propagate
