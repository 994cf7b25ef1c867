"""Retries are counted, with their causes, from the runner to what a run tells, and to its log."""

from __future__ import annotations

import logging
import re

from hypothesis import given
from hypothesis import strategies as st

from pipeline.compute.retries import Retries, RetriesWatch
from pipeline.compute.retry_log import RetryLog
from pipeline.compute.runner import BlockRecord, run_serial
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


class Lines(logging.Handler):
    """What is logged while the block runs."""

    def __init__(self):
        super().__init__()
        self.told = []

    def emit(self, record):
        self.told.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("haloseg").addHandler(self)
        return self.told

    def __exit__(self, *exc):
        logging.getLogger("haloseg").removeHandler(self)


def counted(line):
    """Return how many attempts a line stands for."""
    found = re.match(r"more attempts that came to nothing since: (\d+), the last: ", line)
    return int(found[1]) if found else 1


@given(st.lists(st.floats(0.0, 4000.0), max_size=60))
def test_every_attempt_is_in_one_line_and_lines_grow_ever_rarer(pauses):
    now = [0.0]
    with Lines() as told:
        retry_log = RetryLog(clock=lambda: now[0])
        for number, pause in enumerate(pauses):
            now[0] += pause
            retry_log.warn(f"attempt {number}")
        retry_log.close()
    assert sum(map(counted, told)) == len(pauses)
    assert told[:10] == [f"attempt {number}" for number in range(len(pauses))][:10]
    assert not told or told[-1].endswith(f"attempt {len(pauses) - 1}")
    hours = sum(pauses) / 3600
    assert len(told) <= 10 + 6 + hours + 1  # pauses of 1, 2, 4, 8, 16 and 32 minutes, then of one hour, then the end


def test_a_hundred_thousand_failures_in_an_hour_are_few_lines():
    now = [0.0]
    with Lines() as told:
        retry_log = RetryLog(clock=lambda: now[0])
        for number in range(100_000):
            now[0] = number * 3600 / 100_000
            retry_log.warn("block 7 failed")
        retry_log.close()
    assert (len(told), sum(map(counted, told))) == (16, 100_000)


class Flaky:
    """Blocks of which each fails once."""

    def setup(self):
        return set()

    def run(self, state, index):
        if index not in state:
            state.add(index)
            raise ValueError(f"not yet, {index}")
        return BlockRecord(index, 1, 0.0, 0.0, 0.0)


def test_a_run_tells_of_all_its_retries():
    with Lines() as told:
        assert run_serial(Flaky(), range(50), on_record=lambda _: None) == ()
    assert told[9] == "block 9 failed, attempt 1 of 3: ValueError: not yet, 9"
    last = "block 49 failed, attempt 1 of 3: ValueError: not yet, 49"
    assert told[10:] == [f"more attempts that came to nothing since: 40, the last: {last}"]
