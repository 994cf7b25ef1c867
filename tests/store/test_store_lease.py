import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.store.lease import holder, lease
from pipeline.store.location import Location

HOLD = """
import sys, time
from pipeline.store.lease import lease
from pipeline.store.location import Location
with lease(Location(sys.argv[1]), lasts_s=float(sys.argv[2])) as taken:
    print(taken, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def image(tmp_path):
    return Location(str(tmp_path / "scan.zarr"))


def test_a_lease_is_held_once_and_leaves_nothing_behind(image, tmp_path):
    with lease(image) as mine:
        assert mine
        assert "process" in holder(image)
        with lease(image) as other:
            assert not other
        assert holder(image)
    assert holder(image) is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_of_writing_its_lease_holds_nobody_up(image, tmp_path):
    folder = tmp_path / "scan.zarr.lease"
    folder.mkdir()
    old, fresh = folder / ".a.json.0f.partial", folder / ".b.json.0f.partial"
    for left in (old, fresh):
        left.write_bytes(b'{"holder"')
    os.utime(old, (1, 1))
    with lease(image) as taken:
        assert taken
    assert list(folder.iterdir()) == [fresh]


def test_of_many_at_once_at_most_one_holds_it_and_all_get_their_turn(image):
    held, most, turns = [], [], []

    def work():
        while True:
            with lease(image) as taken:
                if taken:
                    held.append(1)
                    most.append(len(held))
                    time.sleep(0.02)
                    held.pop()
                    turns.append(1)
                    return
            time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (max(most), len(turns)) == (1, 6)


def test_the_lease_of_a_killed_process_ends_here_at_once_and_elsewhere_when_it_lapses(image, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(image), "1.5"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    time.sleep(2.0)  # it is renewed, and so outlives its own length
    with lease(image) as taken:
        assert not taken
    process.kill()
    process.wait()
    process.stdout.close()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pipeline.store.lease._me", lambda: "another host")
        assert holder(image)
    assert holder(image) is None


def test_a_lease_that_was_not_renewed_lapses(image):
    folder = Path(f"{image}.lease")
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps({"holder": "another host", "process": 1, "lapses": time.time() + 0.4}))
    assert holder(image) == "another host, process 1"
    time.sleep(0.5)
    with lease(image) as taken:
        assert taken


def test_a_file_that_a_kill_left_half_written_counts_until_it_is_old(image, tmp_path, monkeypatch):
    folder = tmp_path / "scan.zarr.lease"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps({"holder": "a", "lapses": 1e12})[:7])
    assert holder(image) == "unknown"
    monkeypatch.setattr("pipeline.store.lease.LEASE_S", 0.0)
    assert holder(image) is None
    assert not (folder / "x.json").exists()
