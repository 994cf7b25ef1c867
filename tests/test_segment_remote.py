"""A scan of many short blocks, several to a task, on a cluster that is there already, parts of which die."""

from __future__ import annotations

from math import inf

import pytest
from clusters import processes
from volumes import model_file, scan_file, tree_digest

from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import run_serial
from pipeline.compute.window import TASKS_PER_WORKER
from pipeline.config import Scheme
from pipeline.errors import RunError
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment

N_WORKERS = 2
N_BLOCKS = 3 * 4 * 4


class Disturbed:
    """Runs blocks by another runner, and once, when some of the tasks in flight are sure to have several, acts."""

    def __init__(self, run, act):
        self._run, self._act, self._n_drawn, self._n_done = run, act, 0, 0
        self.acted = False

    def __call__(self, work, indices, *, on_record):
        return self._run(work, self._drawn(indices), on_record=lambda record: self._recorded(record, on_record))

    def _drawn(self, indices):
        for index in indices:
            self._n_drawn += 1
            yield index

    def _recorded(self, record, on_record):
        on_record(record)
        self._n_done += 1
        if not self.acted and self._n_drawn - self._n_done > N_WORKERS * TASKS_PER_WORKER:
            self.acted = True
            self._act()


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Return what plans a run of short blocks that go in tasks of many, and the bytes of one that nothing disturbs."""
    monkeypatch.setattr("pipeline.compute.window.TASK_S", inf)
    scan_file(tmp_path / "scan.tif", (48, 64, 64))
    image = str(ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), shard=(16,)).location)
    model = str(model_file(tmp_path / "model.safetensors"))

    def plan(name):
        return plan_segment(image, model=model, name=name, scheme=Scheme(column=(1, 1, 1)))

    segment(plan("undisturbed"), run=run_serial)
    return plan, tree_digest(f"{image}/labels/undisturbed", without=("zarr.json",))


def bytes_of(result):
    return tree_digest(result.result.location.url, without=("zarr.json",))


def test_a_worker_that_is_killed_changes_no_byte(planned, tmp_path):
    plan, expected = planned
    with processes(tmp_path) as started:
        workers = [started.worker("--nthreads", "1", "--no-nanny") for _ in range(N_WORKERS)]
        with open_runner(cluster=started.address, n_workers=1) as dask:
            dask.client.wait_for_workers(N_WORKERS, timeout=120)
            run = Disturbed(dask, workers[0].kill)
            result = segment(plan("worker"), run=run)
    assert run.acted
    assert result.n_run == N_BLOCKS
    assert {cause for cause, _ in result.retries.by_cause} <= {"its worker died"}
    assert bytes_of(result) == expected


def test_a_scheduler_that_is_killed_ends_the_run_in_one_line_and_the_next_run_goes_on(planned, tmp_path):
    plan, expected = planned
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with processes(tmp_path / "first") as started:
        for _ in range(N_WORKERS):
            started.worker("--nthreads", "1")
        rule = r"^the Dask scheduler must live as long as the run, [^\n]* run the same command again$"
        with open_runner(cluster=started.address, n_workers=1) as dask:
            dask.client.wait_for_workers(N_WORKERS, timeout=120)
            with pytest.raises(RunError, match=rule):
                segment(plan("scheduler"), run=Disturbed(dask, started.scheduler.kill))
    n_done = len(plan("scheduler").done())
    assert 0 < n_done < N_BLOCKS
    with processes(tmp_path / "second") as started:
        started.worker("--nthreads", "1")
        with open_runner(cluster=started.address, n_workers=1) as dask:
            result = segment(plan("scheduler"), run=dask)
    assert result.n_run == N_BLOCKS - n_done
    assert bytes_of(result) == expected
