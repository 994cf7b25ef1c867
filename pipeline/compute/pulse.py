"""Pulse: the sign of life that a block's work gives, slab by slab, and the point where it learns that it is to stop.

A worker sets a pulse before it runs a block; whatever loop the work has beats it. Where nobody set one, nothing
happens. A block that does not beat for too long is stuck (a dead mount, a hung driver): no thread can be ended from
outside, so the process ends itself, its nanny starts another, and the block counts as one whose worker died.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, local
from time import monotonic, sleep

from pipeline.compute.metrics import count_beat
from pipeline.errors import GivenUpError

log = logging.getLogger("haloseg")

STUCK_AFTER_S = 1800.0
_EXIT_STUCK = 75
_mine = local()


class StoppedError(Exception):
    """The run that this block belongs to is over: it was cancelled, or it failed."""


class Pulse:
    """Of one worker: beats while a block runs.

    Parameters
    ----------
    stuck_after_s : without a beat for so long, this process ends
    """

    def __init__(self, *, stuck_after_s: float = STUCK_AFTER_S) -> None:
        self._stuck_after_s, self._stop = stuck_after_s, Event()
        self._last_s: float | None = None
        self._index = -1
        Thread(target=self._watch, name="haloseg-pulse", daemon=True).start()

    @contextmanager
    def of_block(self, index: int) -> Iterator[None]:
        """Let this thread's beats count while the block of code runs."""
        self._index, self._last_s = index, monotonic()
        _mine.pulse = self
        try:
            yield
        finally:
            self._last_s = _mine.pulse = None

    def beat(self) -> None:
        """Say that the work goes on; raises StoppedError if it is not to."""
        self._last_s = monotonic()
        count_beat()
        if self._stop.is_set():
            raise StoppedError

    def stop(self) -> None:
        """Have the block that runs now end at its next beat, and watch it until then."""
        self._stop.set()

    def _watch(self) -> None:
        pause_s = min(5.0, self._stuck_after_s / 4)
        while not self._stop.is_set() or self._last_s is not None:
            sleep(pause_s)
            last_s = self._last_s
            if last_s is not None and monotonic() - last_s > self._stuck_after_s:
                log.error("block %d is stuck for %g s: this worker ends itself", self._index, self._stuck_after_s)
                sys.stderr.flush()
                os._exit(_EXIT_STUCK)


@contextmanager
def stopped_by(given_up: Event) -> Iterator[None]:
    """Have this thread's blocks end at their next beat once the event is set, where no worker runs them.

    Raises
    ------
    GivenUpError : it was set.
    """
    _mine.given_up = given_up
    try:
        yield
    finally:
        _mine.given_up = None


def beat() -> None:
    """Say that the block that this thread runs goes on."""
    pulse: Pulse | None = getattr(_mine, "pulse", None)
    if pulse is not None:
        pulse.beat()
    given_up: Event | None = getattr(_mine, "given_up", None)
    if given_up is not None and given_up.is_set():
        raise GivenUpError
