"""Watcher: who looks on while blocks are done, on a terminal or in the Prefect UI."""

from __future__ import annotations

from typing import Protocol

from pipeline.compute.runner import BlockRecord


class Watcher(Protocol):
    """Told of every stage and of every block that is done."""

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Hear that a stage of ``n_blocks`` begins, ``n_done`` of which an earlier run has done."""
        ...

    def advance(self, record: BlockRecord) -> None:
        """Hear that a block is done."""
        ...


class Unwatched:
    """Nobody looks on."""

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Do nothing."""

    def advance(self, record: BlockRecord) -> None:
        """Do nothing."""


UNWATCHED = Unwatched()
