"""Slots: how many scans compute at once, whoever began them, as global concurrency limits of the Prefect server say.

    haloseg-gpu             scans that compute at once, of all archives and runs
    haloseg-archive-NAME    scans of one archive at once, so that it leaves room to others

A worker computes one block at a time whatever comes; but it holds the network of every scan that is at work, and shares
out its time among them. A limit that the server does not have limits nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from time import monotonic
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run

from flows.showing import shown, slug
from flows.stopping import given_up
from pipeline.errors import GivenUpError

GPU_LIMIT = "haloseg-gpu"
SECONDS_BETWEEN_TRIES = 3.0
LEASE_S = 60.0  # the least that Prefect takes: after so long a slot of a process that was killed is free

# The limits of the flow that this code belongs to.
LIMITS: ContextVar[tuple[str, ...]] = ContextVar("limits", default=(GPU_LIMIT,))


def limits_of(archive: str) -> tuple[str, ...]:
    """Return the names of the limits of an archive's scans."""
    return GPU_LIMIT, f"haloseg-archive-{slug(archive)}"


@contextmanager
def slot() -> Iterator[None]:
    """Hold one slot of every limit of this flow while the block runs, as soon as all have one.

    Raises
    ------
    GivenUpError : the flow is to end before there is one.
    """
    names = [name for name in LIMITS.get() if _exists(name)]
    with ExitStack() as stack:
        if names:
            _enter(stack, names)
        yield


def _enter(stack: ExitStack, names: list[str]) -> None:
    """Wait for the slots; not at one stretch, since a run that is cancelled or paused waits no longer."""
    begin, told, log = monotonic(), False, get_run_logger()
    run_id = flow_run.get_id()
    holder = ConcurrencyLeaseHolder(type="flow_run", id=UUID(run_id)) if run_id else None
    # Never taken away: the line comes from another thread, perhaps after the waiting is over.
    logging.getLogger("prefect._internal.concurrency").addFilter(_is_news)
    while True:
        if given_up().is_set():
            raise GivenUpError
        try:
            stack.enter_context(
                concurrency(names, timeout_seconds=SECONDS_BETWEEN_TRIES, lease_duration=LEASE_S, holder=holder)
            )
            break
        except TimeoutError:
            if not told:
                log.info("waits for a slot of %s: other scans compute", " and ".join(names))
                told = True
    if told:
        log.info("got the slot after %.0f s", monotonic() - begin)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Prefect's log is not about a try that ended without a slot, an ERROR of 3.8.8 each time."""
    told = "ConcurrencySlotAcquisitionWithLeaseService" in record.getMessage()
    return not (told and isinstance(sys.exception(), TimeoutError))


def _exists(name: str) -> bool:
    """Whether the server has a limit; one that does not answer limits nothing."""

    def ask() -> bool:
        with get_client(sync_client=True) as client:
            return client.read_global_concurrency_limit_by_name(name).active

    return bool(shown(ask))
