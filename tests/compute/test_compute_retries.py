"""Retries are counted, with their causes, from the runner to what a run tells."""

from __future__ import annotations

from pipeline.compute.retries import Retries, RetriesWatch
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import UNWATCHED


def test_blocks_count_once_and_their_attempts_by_cause():
    watch = RetriesWatch(UNWATCHED)
    for index, causes in enumerate(((), ("a", "b"), ("b",), ())):
        watch.advance(BlockRecord(index, 1, 0.0, 0.0, 0.0, n_blocks=1 + index, retries=causes))
    assert watch.retries == Retries(2 + 3, (("b", 2), ("a", 1)))
    assert watch.retries.told == "5, b (2); a (1)"
    assert Retries().told == ""


def test_very_many_causes_do_not_grow():
    watch = RetriesWatch(UNWATCHED)
    for index in range(1000):
        watch.advance(BlockRecord(index, 1, 0.0, 0.0, 0.0, retries=(f"cause {index}",)))
    watch.advance(BlockRecord(1000, 1, 0.0, 0.0, 0.0, retries=("cause 3",)))
    counted = dict(watch.retries.by_cause)
    assert len(counted) == 11
    assert (counted["cause 3"], counted["other causes"], sum(counted.values())) == (2, 990, 1001)
