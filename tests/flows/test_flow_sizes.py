"""What a scan costs the Prefect server: the same few task runs, artifacts and events, however many blocks it has."""

from __future__ import annotations

import time
from collections import Counter
from math import isqrt
from uuid import uuid4

import pytest
from flow_runners import Here, shared
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from volumes import model_file, scan_file

from flows import watching
from flows.segment import segment_scan
from flows.watching import SECONDS_BETWEEN_UPDATES, ArtifactWatcher
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import UNWATCHED
from pipeline.unet.settings import Padding, UNetSettings

MOST_TASK_RUNS = 10


def left_by(run_id):
    """Return what a run has left on the server: its task runs, its artifacts, and the names of its events."""
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
        about = {"any_resource": {"id": [f"prefect.flow-run.{run_id}"]}}
        events = client._client.post("/events/filter", json={"filter": about, "limit": 50}).json()
    assert events["total"] <= len(events["events"]) < 50  # more may have come since they were counted
    return len(tasks), len(artifacts), Counter(each["event"] for each in events["events"])


def settled(run_id):
    """Return what a run has left as soon as the server, which writes it down later, has heard its end."""
    until = time.monotonic() + 300
    while not {"haloseg.scan.published", "prefect.flow-run.Completed"} <= set((left := left_by(run_id))[2]):
        assert time.monotonic() < until, left
        time.sleep(0.2)
    n_tasks, n_artifacts, events = left
    del events["prefect.flow-run.heartbeat"]
    return n_tasks, n_artifacts, events


@pytest.mark.parametrize("n_blocks", [64, pytest.param(2500, marks=pytest.mark.slow)])
def test_a_scan_of_many_blocks_costs_the_server_what_one_of_four_does(server, tmp_path, monkeypatch, n_blocks):
    monkeypatch.setattr(watching, "SECONDS_BETWEEN_UPDATES", 1e6)  # the clock's share is the next test's
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1)
    model = str(model_file(tmp_path / "model.safetensors", settings))
    runs = []
    for n in (4, n_blocks):
        scan_file(tmp_path / f"{n}.tif", (16 * isqrt(n),) * 2)
        scan, image = str(tmp_path / f"{n}.tif"), str(tmp_path / f"{n}.zarr")
        with shared(Here()):
            state = segment_scan(scan, image, model, shard=(16, 16), return_state=True)
        assert state.result()[0].n_run == n
        runs.append(state.state_details.flow_run_id)
    few, many = map(settled, runs)
    assert many == few
    assert 3 <= many[0] <= MOST_TASK_RUNS


class Counted:
    """Counts what is sent to the server about progress."""

    def __init__(self, monkeypatch):
        self.told, self.now_s = list[float](), 0.0
        monkeypatch.setattr(watching, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(watching, "create_progress_artifact", lambda *_args, **_more: uuid4())
        monkeypatch.setattr(watching, "update_progress_artifact", lambda _id, percent, **_: self.told.append(percent))

    def watch(self, *, n_blocks, seconds):
        """Let a run of so many blocks and seconds pass."""
        self.told.clear()
        watcher = ArtifactWatcher(UNWATCHED, key="scan")
        watcher.begin("segment", n_blocks=n_blocks, n_done=0)
        for index in range(n_blocks):
            self.now_s += seconds / n_blocks
            watcher.advance(BlockRecord(index, 1, 0.0, 0.0, 0.0))
        assert self.told[-1] == 100.0
        return len(self.told)


def test_progress_is_told_by_the_clock_however_many_blocks_there_are(monkeypatch):
    counted = Counted(monkeypatch)
    assert counted.watch(n_blocks=100_000, seconds=1000) <= 1000 / SECONDS_BETWEEN_UPDATES + 1
    assert counted.watch(n_blocks=100_000, seconds=0) == 1
    assert counted.watch(n_blocks=1000, seconds=1_000_000) < 600  # of eleven days


def test_blocks_of_columns_at_work_are_counted_once(monkeypatch):
    counted = Counted(monkeypatch)
    ledger = iter((12, 24))  # of columns of ten blocks: four of each of three; then one whole, and seven of two
    watcher = ArtifactWatcher(UNWATCHED, key="scan", count=lambda: next(ledger))
    watcher.begin("segment", n_blocks=30, n_done=0)
    for act in (watcher.count, lambda: watcher.advance(column(0)), watcher.count, lambda: watcher.advance(column(1))):
        counted.now_s += 100
        act()
    assert counted.told == [40.0, 80.0]  # what is told already is not told again
    counted.now_s += 100
    watcher.advance(column(2))
    assert counted.told == [40.0, 80.0, 100.0]


def test_a_count_of_the_ledger_that_takes_long_does_not_undo_what_came_meanwhile(monkeypatch):
    counted = Counted(monkeypatch)

    def count():
        watcher.advance(column(0))
        counted.now_s += 100
        return 4

    watcher = ArtifactWatcher(UNWATCHED, key="scan", count=count)
    watcher.begin("segment", n_blocks=10, n_done=2)
    watcher.count()
    assert counted.told == [100.0]


def column(index):
    return BlockRecord(index, 10, 0.0, 0.0, 0.0, n_blocks=10)
