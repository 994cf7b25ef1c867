"""Hosts: processes of this machine for what needs no device, copying and pyramids, as many as the work is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from threading import Event, Lock
from typing import Any

from dask.system import CPU_COUNT

from pipeline.compute.cluster import open_runner
from pipeline.compute.pulse import stopped_by
from pipeline.compute.runner import BlockRecord, BlockWork, Quarantined, RunBlocks, run_serial

MOST_HOSTS = 8
# Voxels that a process copies, counts and halves in three times the seconds that another needs to start: 12 to 25 ns
# each, and 5 s. Of 6 x 10^8 bytes two took as long as one (measured, two cores).
WORTH_A_HOST = 2**30
_IN_USE = Lock()  # Dask's settings and the environment, which local workers are started with, are the whole process's


@contextmanager
def here(*, n_most: int = MOST_HOSTS, given_up: Event | None = None) -> Iterator[RunBlocks]:
    """Yield a runner that begins processes for large works that need no device; all else runs in this process.

    Parameters
    ----------
    n_most : processes, no more than there are cores
    given_up : once set, from any thread, runs end soon, with GivenUpError
    """
    with ExitStack() as stack:
        yield _Here(stack, min(n_most, CPU_COUNT), given_up or Event())


class _Here:
    """See ``here``; once begun, the processes serve all works that follow."""

    def __init__(self, stack: ExitStack, n_most: int, given_up: Event) -> None:
        self._stack, self._n_most, self._given_up = stack, n_most, given_up
        self._hosts: RunBlocks | None = None

    def __call__(
        self, work: BlockWork, indices: Iterable[int], *, on_record: Callable[[BlockRecord], None]
    ) -> tuple[Quarantined, ...]:
        """Run the blocks; see RunBlocks."""
        if getattr(work, "uses_device", True):
            return run_serial(work, indices, on_record=on_record)
        todo = list(indices)
        if self._hosts is None:
            of_blocks: Any = work
            n_voxels = len(todo) * prod(of_blocks.grid.core_shape)
            n_hosts = min(self._n_most, len(todo), 1 + n_voxels // WORTH_A_HOST)
            if n_hosts > 1 and _IN_USE.acquire(blocking=False):  # of several scans at once in a process, one
                self._stack.callback(_IN_USE.release)
                runner = self._stack.enter_context(open_runner(n_workers=n_hosts))
                self._hosts = replace(runner, given_up=self._given_up)
        if self._hosts is not None:
            return self._hosts(work, todo, on_record=on_record)
        with stopped_by(self._given_up):
            return run_serial(work, todo, on_record=on_record)
