from __future__ import annotations

import logging
import time

import pytest
from prefect import flow
from prefect.artifacts import Artifact

from flows.showing import shown, slug
from flows.watching import duration, logged, watched
from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import BlockRecord


def test_what_workers_log_is_in_the_log_of_the_run(server, caplog):
    class Telling:
        def setup(self):
            return None

        def run(self, _state, index):
            logging.getLogger("haloseg").warning("block %d is odd", index)
            return BlockRecord(index, 1, 0.0, 0.0, 0.0)

    def told():
        return [each.getMessage() for each in caplog.records if each.name == "prefect.flow_runs"]

    @flow
    def telling():
        with logged(), logged(), open_runner(n_workers=1) as run:
            run(Telling(), range(2), on_record=lambda _: None)
            end = time.monotonic() + 60
            while sum("is odd" in each for each in told()) < 2 and time.monotonic() < end:
                time.sleep(0.05)

    telling()
    odd = [each for each in told() if "is odd" in each]
    assert len(odd) == 2
    assert all(each.startswith("worker tcp://127.0.0.1:") for each in odd)


def test_progress_is_that_of_the_ledger_and_the_server_may_be_away(server, monkeypatch):
    monkeypatch.setattr("flows.watching.SECONDS_BETWEEN_UPDATES", 0.05)
    n_done = 0

    @flow
    def watching():
        nonlocal n_done
        with watched(key="ledger", count=lambda: n_done, n_voxels=1000) as watch:
            watch.begin("segment", n_blocks=10, n_done=2)
            n_done = 6
            end = time.monotonic() + 60
            while getattr(seen := Artifact.get(key="ledger-segment"), "data", 0) != 60 and time.monotonic() < end:
                time.sleep(0.05)
            watch.advance(BlockRecord(0, 800, 0.0, 0.0, 0.0, n_blocks=8))
            watch.begin("certify", n_blocks=1, n_done=0)
        return seen

    seen = watching()
    assert seen.data == 60.0
    assert seen.description.startswith("segment: 6 of 10 blocks, ")
    assert seen.description.endswith(" left")
    assert Artifact.get(key="ledger-segment").data == 100.0
    assert Artifact.get(key="ledger-certify") is None

    def fail():
        raise ConnectionRefusedError("no server")

    assert shown(fail) is None


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")]
)
def test_times_are_told_as_people_say_them(seconds, told):
    assert duration(seconds) == told


def test_keys_of_artifacts_are_of_the_letters_that_the_server_takes():
    assert slug("/data/Scan 01_b.OME.tif") == "data-scan-01-b-ome-tif"
    assert slug("___") == "scan"
    assert len(slug("x" * 300)) <= 80
