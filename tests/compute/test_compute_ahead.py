"""Reading ahead and writing behind: order, bounds, errors, and the end of their threads."""

import threading
import time

import pytest

from pipeline.compute.ahead import WriteBehind, read_ahead
from pipeline.compute.clock import StageClock


def alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("haloseg-")]


def test_items_come_in_order_and_at_most_a_few_ahead():
    made, seen = [], []

    def items():
        for n in range(20):
            made.append(n)
            yield n

    with read_ahead(items(), n_ahead=2, clock=StageClock()) as arriving:
        for n in arriving:
            time.sleep(0.002)
            seen.append(n)
            assert len(made) <= len(seen) + 2 + 1  # two wait, and one is being put
    assert seen == list(range(20))
    assert not alive()


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield 1
        raise OSError("disk on fire")

    with read_ahead(items(), n_ahead=2, clock=StageClock()) as arriving:
        assert next(arriving) == 1
        with pytest.raises(OSError, match="disk on fire"):
            next(arriving)
    assert not alive()


def test_leaving_early_ends_the_reader():
    with read_ahead(iter(range(10**9)), n_ahead=2, clock=StageClock()) as arriving:
        assert next(arriving) == 0
    assert not alive()


def test_everything_is_written_in_order_before_the_block_is_left():
    written = []

    def write(n):
        time.sleep(0.002)
        written.append(n)

    with WriteBehind(write, clock=StageClock()) as behind:
        for n in range(10):
            behind.put(n)
    assert written == list(range(10))
    assert not alive()


def test_an_error_of_the_writer_is_raised_at_the_next_put_or_at_the_end():
    def write(n):
        raise OSError(f"no room for {n}")

    def put(n):
        with WriteBehind(write, clock=StageClock()) as behind:
            for each in range(n):
                behind.put(each)
                time.sleep(0.2)
                handed.append(each)

    for n, taken in ((5, [0]), (1, [0])):
        handed = []
        with pytest.raises(OSError, match="no room for 0"):
            put(n)
        assert handed == taken
    assert not alive()


def test_an_error_of_the_caller_ends_the_writer_and_is_kept():
    def fail():
        with WriteBehind(lambda _: time.sleep(0.01), clock=StageClock()) as behind:
            behind.put(0)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert not alive()


def test_the_clock_tells_who_waited_for_whom():
    slow, fast = StageClock(), StageClock()

    def items(seconds):
        for n in range(5):
            time.sleep(seconds)
            yield n

    with read_ahead(items(0.1), n_ahead=2, clock=slow) as arriving:
        list(arriving)
    with read_ahead(items(0.0), n_ahead=2, clock=fast) as arriving:
        for _ in arriving:
            time.sleep(0.1)
    assert slow.read_s > 0.4
    assert slow.wait_s > 0.4
    assert fast.wait_s < 0.2
