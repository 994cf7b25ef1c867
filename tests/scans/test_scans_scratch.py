"""Decoded parts that memory has no room for: kept on a disk, unseen there, and told of where the disk has none."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.scans.cache import SegmentCache
from pipeline.scans.scratch import Scratch, folder, lies_in_memory


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    if lies_in_memory(folder()):
        pytest.skip(f"needs a disk, got {folder()} in memory")
    with TemporaryDirectory(dir=folder()) as place:
        monkeypatch.setenv("TMPDIR", place)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield Path(place)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 8))
def test_the_scratch_gives_back_the_last_arrays_and_keeps_its_bounds(disk, sizes, most_arrays):
    scratch = Scratch(most_bytes=100, most_arrays=most_arrays)
    arrays = [np.arange(size, dtype=">u2").reshape(1, size) + number for number, size in enumerate(sizes)]
    for number, array in enumerate(arrays):
        scratch.put(number, array)
        there = [each for each in range(number + 1) if each in scratch]
        assert there == list(range(there[0], number + 1))
        assert len(there) <= 2 * most_arrays
        assert array.nbytes <= sum(arrays[each].nbytes for each in there) <= 200
        for each in there:
            found = scratch.get(each)
            assert (found.dtype, found.flags.writeable) == (array.dtype, False)
            np.testing.assert_array_equal(found, arrays[each])
    assert scratch.get("none") is None


def test_an_array_that_is_read_stays_readable_when_its_file_is_let_go_of(disk):
    scratch = Scratch(most_bytes=100)
    scratch.put("kept", np.arange(10))
    kept = scratch.get("kept")
    for number in range(5):
        scratch.put(number, np.zeros(10, int))
    assert "kept" not in scratch
    np.testing.assert_array_equal(kept, np.arange(10))
    assert list(disk.iterdir()) == []


def test_a_forked_process_has_files_of_its_own(disk, monkeypatch):
    scratch = Scratch()
    scratch.put("of the parent", np.arange(10))
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: 1)
        assert scratch.get("of the parent") is None
        scratch.put("of the child", np.arange(5))
        np.testing.assert_array_equal(scratch.get("of the child"), np.arange(5))


def test_no_room_is_told_once_and_costs_nothing_else(disk, monkeypatch, caplog):
    cache = SegmentCache(budget_bytes=1, scratch=Scratch(most_bytes=10))
    for _ in range(2):
        assert cache.get("large", lambda: np.arange(100), again=True).sum() == 4950
    monkeypatch.setenv("TMPDIR", str(disk / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(disk / "missing"))
    assert cache.get("lost", lambda: np.arange(1), again=True) == 0
    (told,) = caplog.messages
    assert told == (
        f"parts of the scan that several blocks need are decoded for each, since {disk} has no room: 800 bytes are "
        "wanted; TMPDIR may name another folder"
    )


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a folder in memory, such as Linux has")
def test_memory_is_no_disk(monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    monkeypatch.setattr("tempfile.tempdir", None)
    scratch = Scratch()
    scratch.put("key", np.arange(3))
    assert (scratch.get("key"), "key" in scratch) == (None, False)
    assert "/dev/shm has no room: it lies in memory; TMPDIR may name" in caplog.text


def test_temporary_files_lie_where_the_user_says(disk, monkeypatch):
    assert folder() == str(disk)
    monkeypatch.delenv("TMPDIR")
    assert Path(folder()).is_dir()


def test_the_cache_puts_on_disk_what_will_be_wanted_again_and_that_alone(disk):
    cache, made = SegmentCache(budget_bytes=100), []

    def get(key, *, again):
        def make():
            made.append(key)
            return np.full(10, key)

        np.testing.assert_array_equal(cache.get(key, make, again=again), np.full(10, key))

    for key in range(5):
        get(key, again=key < 3)
    get(3, again=True)  # was never to be wanted again, when memory had no room for it any more
    for key in range(5):
        get(key, again=False)
    assert made == [0, 1, 2, 3, 4, 3, 4]
    assert cache.n_bytes <= 100


FULL = """
import os, resource, sys, threading
import numpy as np
from pipeline.scans import scratch
from pipeline.scans.cache import SegmentCache

os.environ["TMPDIR"] = sys.argv[1]
cache = SegmentCache(budget_bytes=1, scratch=scratch.Scratch())

def get(key, n, made=None):
    return cache.get(key, lambda: np.full(n, made, np.uint8), again=True)

get("first", 1000, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1001, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
assert (get("large", 4000, 2) == 2).all()  # does not fit any more, and costs no more than being made again
assert (get("large", 4000, 3) == 3).all()
assert (get("one", 1, 4) == 4).all()
assert (get("first", 1000) == 1).all()
assert (get("one", 1) == 4).all()
assert not cache._coming
"""


def test_a_disk_that_fills_up_costs_what_did_not_fit_and_no_more(disk):
    """A limit of a file's size stands for it."""
    subprocess.run([sys.executable, "-c", FULL, str(disk)], check=True, timeout=60)
