"""Retries: which blocks of a run had to be run again, and why; they are told, since good labels do not show them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import Watcher

_LARGEST = 10
_OTHERS = "other causes"


@dataclass(frozen=True, slots=True)
class Retries:
    """Blocks that came to an end after more than one attempt; of their other attempts how many had which cause."""

    n_blocks: int = 0
    by_cause: tuple[tuple[str, int], ...] = ()

    @property
    def told(self) -> str:
        """All of it in one line; empty where nothing was run again."""
        causes = "; ".join(f"{cause} ({n:,})" for cause, n in self.by_cause)
        return f"{self.n_blocks:,}, {causes}" if self.n_blocks else ""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as the fields of a JSON object."""
        causes = [{"cause": cause, "attempts": n} for cause, n in self.by_cause]
        return {"blocks_retried": self.n_blocks, "retries": causes}

    def after(self, stage: str, before: Retries) -> Retries:
        """Return these together with those of the stage before, whose causes then say so."""
        causes = Counter(dict(self.by_cause))
        causes.update({f"{stage}: {cause}": n for cause, n in before.by_cause})
        return Retries(self.n_blocks + before.n_blocks, tuple(causes.most_common()))


class RetriesWatch:
    """Counts retries on the way to another watcher; see Watcher. Of very many causes the rest count as one."""

    def __init__(self, watch: Watcher) -> None:
        self._watch, self._n_blocks, self._by_cause = watch, 0, Counter[str]()

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Pass it on."""
        self._watch.begin(stage, n_blocks=n_blocks, n_done=n_done)

    def advance(self, record: BlockRecord) -> None:
        """Count the attempts before the one that ended well, and pass the record on."""
        self._n_blocks += record.n_blocks * bool(record.retries)
        for cause in record.retries:
            known = cause in self._by_cause or len(self._by_cause) < _LARGEST
            self._by_cause[cause if known else _OTHERS] += 1
        self._watch.advance(record)

    @property
    def retries(self) -> Retries:
        """What was counted so far; the most frequent cause first."""
        return Retries(self._n_blocks, tuple(self._by_cause.most_common()))
