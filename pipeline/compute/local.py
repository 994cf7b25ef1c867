"""The cluster of this machine: processes started for a run, each with its share of the cores, and its own GPU."""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Nanny

from pipeline.compute.runner import RETRIES

log = logging.getLogger("haloseg")

LOG_LENGTH = 100  # of Dask's logs for its own developers: 1000 messages to and from each worker are 1 MiB and more
LOST_WORKER_TIMEOUT_S = 24 * 3600  # else Dask ends the nanny of a worker that is not back within 15 s
HOSTS_PER_GPU = 4  # processes that copy, and make pyramids, while the GPU computes; deploy/serve.py has as many
_KILL_TIMEOUT_S = 0.2
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def local_client(n_workers: int, gpus: tuple[str, ...]) -> Iterator[Client]:
    """Start one process per worker; memory is the plan's affair, not Dask's.

    Each gets its share of the cores, unless the environment says OMP_NUM_THREADS already, and a GPU of its own where
    there are ``gpus``, as many as workers. Then some more processes do what needs none, as far as there are cores.
    """
    n_hosts = min(HOSTS_PER_GPU * len(gpus), max(0, CPU_COUNT - len(gpus)))
    own = os.environ.get("OMP_NUM_THREADS", "")  # torch lets MKL_NUM_THREADS, where it is set, overrule it
    n_threads = int(own) if own.isdigit() else max(1, CPU_COUNT // (n_workers + n_hosts))
    settings = {f"distributed.nanny.pre-spawn-environ.{name}": n_threads for name in _THREAD_SETTINGS} | {
        "distributed.scheduler.allowed-failures": RETRIES,
        "distributed.admin.low-level-log-length": LOG_LENGTH,
        "distributed.deploy.lost-worker-timeout": LOST_WORKER_TIMEOUT_S,
    }
    with (
        dask.config.set(settings),
        _kept_environment(),
        _started(n_workers + n_hosts, gpus) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if gpus:
            log.info("%d workers, each with a GPU: %s, and %d without", n_workers, ", ".join(gpus), n_hosts)
        try:
            yield client
        except BaseException:
            cluster.sync(_kill_workers, cluster)
            raise


def _started(n_workers: int, gpus: tuple[str, ...]) -> LocalCluster:
    """Return a running cluster whose processes do not hear Ctrl-C: this one does, and ends them.

    Threads and processes inherit the signals that are blocked where they are started, also those of later restarts.
    """
    resource_tracker.ensure_running()  # it unblocks the signal in the thread that first needs it (CPython, all of 3.x)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    on_gpus = {"worker_class": _on_gpu, "gpus": gpus} if gpus else {}
    try:
        return LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL, **on_gpus,
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_gpu(*args: Any, name: int, gpus: tuple[str, ...], **options: Any) -> Nanny:  # noqa: ANN401 Dask's own
    """Return what starts, and starts again, the worker of this number, which sees its own GPU alone, or none."""
    own: dict[str, Any] = {"name": name, "env": {"CUDA_VISIBLE_DEVICES": ""}}
    if name < len(gpus):
        own |= {"env": {"CUDA_VISIBLE_DEVICES": gpus[name]}, "resources": {"GPU": 1}}
    return Nanny(*args, **options | own)


async def _kill_workers(cluster: LocalCluster) -> None:
    """End the processes in the midst of their blocks, whose writes are atomic; Dask would wait seconds for them."""
    await asyncio.gather(*(nanny.close(timeout=_KILL_TIMEOUT_S) for nanny in cluster.workers.values()))


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Give this process its environment back: Dask's nannies put the settings of their workers into it."""
    names = {*dask.config.get("distributed.nanny.pre-spawn-environ"), "PYTHONHASHSEED", "__DASK_PARENT_PID"}
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
