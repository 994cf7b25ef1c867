"""Runners of blocks in this process, in place of those of a cluster, for the tests of flows."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from flows.watching import SHARED_RUNNER
from pipeline.compute.runner import run_serial


@dataclass(frozen=True)
class Flaky:
    """A work of which each attempt at some blocks fails until there were so many."""

    work: Any
    attempts: dict[int, int]
    n_before: dict[int, int] = field(default_factory=dict)

    def setup(self):
        return self.work.setup()

    def run(self, state, index):
        self.n_before[index] = self.n_before.get(index, 0) + 1
        if self.n_before[index] < self.attempts.get(index, 1):
            raise ValueError("a flake")
        return self.work.run(state, index)


@dataclass(frozen=True)
class Here:
    """Runs blocks here, each of which needs so many attempts as ``attempts`` says, in every stage."""

    given_up: Event = field(default_factory=Event)
    attempts: dict[int, int] = field(default_factory=dict)
    priority: int = 0

    def check(self):
        """Be there."""

    check_alive = check

    def can_copy(self, scan):
        """Leave copying to the flow."""
        del scan
        return False

    def __call__(self, work, indices, *, on_record):
        return run_serial(Flaky(work, self.attempts), indices, on_record=on_record)


@contextmanager
def shared(runner):
    """Have flows take this runner."""
    token = SHARED_RUNNER.set(runner)
    try:
        yield
    finally:
        SHARED_RUNNER.reset(token)
