"""Upkeep: what runs on the Dask scheduler itself, so that a cluster that lives for months stays as it was at first.

A scheduler without haloseg cannot run it. Then it keeps 0.7 KiB for every task, and workers keep the state of runs
whose process was killed.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from dask.utils import key_split
from distributed import Client, Scheduler

from pipeline.compute.runner import cause_of

log = logging.getLogger("haloseg")

T = TypeVar("T")
PREFIX = "haloseg-"
# One span for all tasks, for ever: of each moment without a task Dask makes a new one, and scheduler and workers keep
# counters of every span there was.
SPAN = {"name": ("haloseg",), "ids": ("haloseg",)}


def on_scheduler(client: Client, function: Callable[[Scheduler], T]) -> T | None:
    """Return what a function of the scheduler returns; None where the scheduler cannot run it."""
    try:
        found: T = client.run_on_scheduler(function)
    except Exception as error:  # noqa: BLE001 upkeep is no part of the run: the next error of the cluster itself will tell
        log.debug("no upkeep on the scheduler: %s", cause_of(error))
        return None
    return found


def forget_submits(dask_scheduler: Scheduler) -> None:
    """Drop the notes that the scheduler takes of every submit and never reads: memory would grow with the blocks.

    Of distributed 2026.8, Span.add_metadata appends to a list without end, Span.groups keeps what has ended, and
    key_split keeps 100,000 keys.
    """
    key_split.cache_clear()
    for span in dask_scheduler.extensions["spans"].spans.values():
        span.groups = {group for group in span.groups if not group.done}
        if span.metadata:
            span.metadata["collections"].clear()


def orphans(dask_scheduler: Scheduler) -> list[str]:
    """Return the names of the plugins of runs whose client is gone; their names hold it, see DaskRunner."""
    ours = [name for name in dask_scheduler.worker_plugins if name.startswith(PREFIX)]
    return [name for name in ours if not any(client in name for client in dask_scheduler.clients)]
