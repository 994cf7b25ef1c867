from __future__ import annotations

import os
import re
import threading
import time
from itertools import count
from math import inf
from pathlib import Path

import prometheus_client
import psutil
import pytest
from compute_works import Beating, Environment, Scripted
from dask.system import CPU_COUNT

from pipeline.compute.address import check_cluster
from pipeline.compute.cluster import DaskRunner, open_runner
from pipeline.compute.resident import ResidentWork
from pipeline.compute.runner import BlockRecord, Quarantined, run_serial
from pipeline.compute.window import TASKS_PER_WORKER
from pipeline.errors import ArgumentError, ModelError, RunError, StorageError

N_WORKERS = 2


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(scope="module")
def runner():
    before = environment()
    with open_runner(n_workers=N_WORKERS) as runner:
        yield runner
    assert environment() == before


@pytest.fixture
def run(runner):
    """Return the runner with all its workers, also after a test that killed some."""
    runner.client.wait_for_workers(N_WORKERS, timeout=30)
    return runner


def files(folder: Path, kind: str) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (folder / kind).glob("*")}


def attempts(folder: Path, index: int) -> list[str]:
    return [each.read_text() for each in sorted((folder / "attempts").glob(f"{index}-*"))]


def kept(dask_scheduler) -> dict[str, int]:
    """Return how much the scheduler keeps of tasks, those of now and those that were."""
    spans = dask_scheduler.extensions["spans"]
    return {
        "tasks": len(dask_scheduler.tasks), "groups": len(dask_scheduler.task_groups),
        "spans": len(spans.spans) + len(spans.root_spans) + sum(map(len, spans.spans_search_by_name.values())),
        "notes": sum(len(span.metadata["collections"]) for span in spans.spans.values() if span.metadata),
        "groups of spans": sum(len(span.groups) for span in spans.spans.values()),
        "prefixes": len(dask_scheduler.task_prefixes), "counters": len(dask_scheduler.cumulative_worker_metrics),
    }  # fmt: skip


def spans_counted(dask_worker) -> set[str]:
    return {name[1] for name in list(dask_worker.digests_total) if isinstance(name, tuple) and name[0] == "execute"}


def plugins(dask_scheduler) -> list[str]:
    return [name for name in dask_scheduler.worker_plugins if name.startswith("haloseg-")]


def exposed() -> str:
    return prometheus_client.generate_latest().decode()


def retries(records: list[BlockRecord]) -> dict[int, tuple[str, ...]]:
    return {record.index: record.retries for record in records if record.retries}


def done(records: list[BlockRecord]) -> list[int]:
    return sorted(record.index for record in records)


def test_a_run_on_workers_writes_the_bytes_of_a_serial_run(run, tmp_path):
    records, serial = [], []
    assert run(Scripted(str(tmp_path / "dask")), range(40), on_record=records.append) == ()
    assert run_serial(Scripted(str(tmp_path / "serial")), range(40), on_record=serial.append) == ()
    assert sorted(records, key=lambda record: record.index) == serial
    assert files(tmp_path / "dask", "blocks") == files(tmp_path / "serial", "blocks")


def test_records_come_in_the_callers_thread(run, tmp_path):
    threads = set()
    run(Scripted(str(tmp_path)), range(5), on_record=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_the_state_is_made_once_per_worker_and_dropped_at_the_end(run, tmp_path):
    run(Scripted(str(tmp_path), sleep_s=0.02), range(40), on_record=lambda _: None)
    setups = list(files(tmp_path, "setups").values())
    assert len(setups) == len(set(setups)) == N_WORKERS
    plugins = run.client.run(lambda dask_worker: list(dask_worker.plugins))
    assert not [name for names in plugins.values() for name in names if name.startswith("haloseg")]


def test_no_blocks_is_no_work(run, tmp_path):
    assert run(Scripted(str(tmp_path)), (), on_record=pytest.fail) == ()


def test_a_block_that_fails_twice_is_tried_on_other_workers_until_it_works(run, tmp_path):
    records = []
    work = Scripted(str(tmp_path), acts=((3, "fail twice"),), sleep_s=0.02)
    assert run(work, range(12), on_record=records.append) == ()
    assert done(records) == list(range(12))
    first, second, third = attempts(tmp_path, 3)
    assert first != second != third
    assert retries(records) == {3: ("ValueError: this block fails",) * 2}


def test_retries_are_told_as_in_a_serial_run(run, tmp_path):
    told = []
    for runner, folder in ((run, tmp_path / "dask"), (run_serial, tmp_path / "serial")):
        records = []
        assert runner(Scripted(str(folder), ((3, "fail twice"),)), range(40), on_record=records.append) == ()
        told.append(retries(records))
    assert told[0] == told[1] == {3: ("ValueError: this block fails",) * 2}


def test_a_block_that_always_fails_is_quarantined_as_in_a_serial_run(run, tmp_path):
    records = []
    acts = ((3, "fail"), (7, "fail"))
    failed = run(Scripted(str(tmp_path / "dask"), acts), range(12), on_record=records.append)
    serial = run_serial(Scripted(str(tmp_path / "serial"), acts), range(12), on_record=lambda _: None)
    assert set(failed) == set(serial) == {Quarantined(i, "ValueError: this block fails") for i in (3, 7)}
    assert done(records) == [i for i in range(12) if i not in (3, 7)]
    assert len(attempts(tmp_path / "dask", 3)) == len(attempts(tmp_path / "serial", 3)) == 3


def test_a_run_in_which_a_hundred_blocks_fail_ends_and_says_so_in_few_lines(run, tmp_path, caplog):
    acts = tuple((i, "fail") for i in range(1000))
    with pytest.raises(RunError, match=r"at most 99 blocks of a run may fail, got 100; the last cause: ValueError: "):
        run(Scripted(str(tmp_path), acts), range(1000), on_record=pytest.fail)
    told = [each.getMessage() for each in caplog.records if each.name == "haloseg"]
    assert len(told) == 11
    rest = re.match(r"more attempts that came to nothing since: (\d+), the last: block", told[-1])
    assert int(rest[1]) >= 3 * 100 - 10


def test_a_killed_worker_costs_nothing_but_time(run, tmp_path):
    records = []
    work = Scripted(str(tmp_path), acts=((5, "die once"),), sleep_s=0.02)
    assert run(work, range(30), on_record=records.append) == ()
    assert done(records) == list(range(30))
    assert len(files(tmp_path, "blocks")) == 30
    assert len(set(attempts(tmp_path, 5))) == 2
    assert retries(records)[5] == ("its worker died",)
    assert set(retries(records).values()) == {("its worker died",)}  # others waited on the same worker
    assert 1 <= len(retries(records)) < 30


def test_a_block_that_kills_its_workers_is_quarantined_and_its_neighbours_are_not(run, tmp_path):
    records = []
    work = Scripted(str(tmp_path), acts=((2, "die"),), sleep_s=0.02)
    failed = run(work, range(16), on_record=records.append)
    assert failed == (Quarantined(2, "worker died 3 times on this block (out of memory, or stuck?)"),)
    assert done(records) == [i for i in range(16) if i != 2]


def test_an_error_of_ours_ends_the_run_at_once_unchanged(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", 0.0)
    indices, records = count(), []
    with pytest.raises(StorageError, match=r"^the disk must have room, got none; free some$"):
        run(Scripted(str(tmp_path), acts=((20, "disk full"),)), indices, on_record=records.append)
    assert len(attempts(tmp_path, 20)) == 1
    assert next(indices) < 20 + 1 + 2 * TASKS_PER_WORKER * N_WORKERS


def test_an_error_of_ours_in_setup_ends_the_run_unchanged(run, tmp_path):
    with pytest.raises(ModelError, match=r"^a model must be readable, got none; give another$"):
        run(Scripted(str(tmp_path), setup_fails_with="ours"), range(5), on_record=pytest.fail)


def test_any_other_error_in_setup_ends_the_run_with_its_cause(run, tmp_path):
    with pytest.raises(RunError, match=r"get ready for its blocks, got ValueError: no device on tcp://.*; mend it"):
        run(Scripted(str(tmp_path), setup_fails_with="no device"), range(5), on_record=pytest.fail)


@pytest.mark.parametrize("task_s", [0.0, inf])
def test_few_blocks_are_in_flight_however_many_there_are(run, tmp_path, monkeypatch, task_s):
    n_read, records, most = count(), [], []

    def indices():
        for index in range(200):
            next(n_read)
            most.append(index + 1 - len(records))
            yield index

    monkeypatch.setattr("pipeline.compute.window.TASK_S", task_s)
    monkeypatch.setattr("pipeline.compute.window.LARGEST_TASK", 5)
    run(Scripted(str(tmp_path)), indices(), on_record=records.append)
    assert next(n_read) == len(records) == 200
    tasks = TASKS_PER_WORKER * N_WORKERS
    assert max(most) == tasks if task_s == 0 else tasks < max(most) <= 5 * tasks


def test_short_blocks_go_in_tasks_of_many_and_each_is_settled_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", inf)
    records = []
    failed = run(Scripted(str(tmp_path), ((20, "fail"), (25, "fail twice"))), range(60), on_record=records.append)
    assert failed == (Quarantined(20, "ValueError: this block fails"),)
    assert done(records) == [index for index in range(60) if index != 20]
    assert [len(attempts(tmp_path, index)) for index in (19, 20, 21, 25)] == [1, 3, 1, 3]


def test_a_task_of_many_whose_workers_die_is_taken_apart(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", inf)
    records = []
    assert run(Scripted(str(tmp_path), ((30, "die thrice"),)), range(60), on_record=records.append) == ()
    assert done(records) == list(range(60))
    assert len(attempts(tmp_path, 30)) == 4
    assert retries(records)[30] == ("its worker died",) * 3


def test_an_error_of_ours_in_a_task_of_many_ends_it_and_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", inf)
    records = []
    with pytest.raises(StorageError, match=r"^the disk must have room, got none; free some$"):
        run(Scripted(str(tmp_path), acts=((20, "disk full"),)), count(), on_record=records.append)
    assert len(done(records)) >= 7  # so many must be settled before there is room for it
    assert 20 not in done(records)
    assert len(attempts(tmp_path, 20)) == 1


def test_blocks_of_a_task_that_takes_too_long_go_to_others_and_run_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", inf)
    records = []

    def on_record(record: BlockRecord) -> None:
        records.append(record)
        if len(records) == 50:
            monkeypatch.setattr("pipeline.compute.window.TASK_S", 0.0)

    assert run(Scripted(str(tmp_path)), range(300), on_record=on_record) == ()
    assert done(records) == list(range(300))
    assert len(list((tmp_path / "attempts").iterdir())) == 300


def test_scheduler_and_workers_keep_nothing_that_grows_with_the_blocks_or_the_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.compute.window.TASK_S", 0.0)
    monkeypatch.setattr("pipeline.compute.window.REFRESH_S", 0.05)
    work = Scripted(str(tmp_path))
    run(work, range(20), on_record=lambda _: None)
    before = run.client.run_on_scheduler(kept)
    for _ in range(20):  # between two runs there is no task, and Dask would begin a new span
        run(work, range(20), on_record=lambda _: None)
    until = time.monotonic() + 30
    while (after := run.client.run_on_scheduler(kept))["tasks"] >= 2 * 20 and time.monotonic() < until:
        time.sleep(0.05)  # the client's word that it has let go of the last ones is on its way
    assert [after[name] for name in ("spans", "prefixes")] == [before[name] for name in ("spans", "prefixes")]
    assert after["counters"] < before["counters"] + 20
    assert all(after[name] < 2 * 20 for name in ("tasks", "notes", "groups", "groups of spans"))
    assert set().union(*run.client.run(spans_counted).values()) == {"haloseg"}


def test_a_block_that_runs_ends_soon_when_its_run_is_cancelled(run, tmp_path):
    def stop(_record: BlockRecord) -> None:
        while len(list(tmp_path.glob("begun-*"))) < 3:
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Beating(str(tmp_path)), range(50), on_record=stop)
    begin = time.monotonic()
    assert run(Scripted(str(tmp_path / "next")), range(4), on_record=lambda _: None) == ()
    assert time.monotonic() - begin < 10


def test_a_block_without_a_sign_of_life_ends_its_worker_and_is_named(tmp_path):
    (tmp_path / "stuck").mkdir()
    with open_runner(n_workers=1, stuck_after_s=0.8) as run:
        (failed,) = run(Beating(str(tmp_path / "stuck"), beats=False), range(2), on_record=lambda _: None)
        assert (failed.index, failed.cause) == (1, "worker died 3 times on this block (out of memory, or stuck?)")
        assert run(Scripted(str(tmp_path)), range(3), on_record=lambda _: None) == ()


def test_what_a_killed_run_left_on_the_workers_goes_with_the_next_run(run, tmp_path):
    run.client.register_plugin(ResidentWork(Scripted(str(tmp_path))), name="haloseg-Client-that-died-1")
    run(Scripted(str(tmp_path)), range(4), on_record=lambda _: None)
    assert run.client.run_on_scheduler(plugins) == []


def test_workers_count_what_they_do(run, tmp_path):
    run(Scripted(str(tmp_path), acts=((3, "fail twice"),)), range(5), on_record=lambda _: None)
    counted = "\n".join(run.client.run(exposed).values())
    blocks, failed, voxels = (
        sum(float(n) for n in re.findall(rf'haloseg_{name}_total{{work="Scripted"}} (\S+)', counted))
        for name in ("blocks", "blocks_failed", "voxels")
    )
    assert blocks >= 5
    assert failed >= 2
    assert voxels >= 0 + 1 + 4 + 9 + 16
    assert re.search(r'haloseg_seconds_total{stage="compute",work="Scripted"}', counted)
    assert "haloseg_beats_total" in counted


def test_an_error_in_the_caller_cancels_the_run_and_the_workers_go_on_to_the_next(run, tmp_path):
    def stop(record: BlockRecord) -> None:
        raise KeyboardInterrupt(record.index)

    with pytest.raises(KeyboardInterrupt):
        run(Scripted(str(tmp_path / "first"), sleep_s=0.05), range(1000), on_record=stop)
    records = []
    assert run(Scripted(str(tmp_path / "second")), range(10), on_record=records.append) == ()
    assert done(records) == list(range(10))
    assert len(files(tmp_path / "first", "blocks")) <= TASKS_PER_WORKER * N_WORKERS


def test_workers_share_the_cores(run, tmp_path):
    run(Environment(str(tmp_path / "it"), "OMP_NUM_THREADS"), [0], on_record=lambda _: None)
    expected = os.environ.get("OMP_NUM_THREADS", str(max(1, CPU_COUNT // N_WORKERS)))
    assert (tmp_path / "it").read_text() == expected


def test_a_cluster_that_was_started_for_the_run_is_gone_after_it(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with open_runner(n_workers=1) as own:
        assert isinstance(own, DaskRunner)
        own(Scripted(str(tmp_path)), range(3), on_record=lambda _: None)
        (pid,) = {int(each) for each in files(tmp_path, "setups").values()}
    assert not psutil.pid_exists(pid)
    left = {each for each in psutil.Process().children(recursive=True) if "resource_tracker" not in str(each.cmdline())}
    assert left <= before


@pytest.mark.parametrize("cluster", ["dask", "127.0.0.1:8786", "http://here:8786", "tcp://here", "tcp://here:port"])
def test_a_cluster_is_local_or_an_address(cluster):
    rule = r'^cluster must be "local", tcp://host:port or tls://host:port, got "'
    with pytest.raises(ArgumentError, match=rule), open_runner(cluster=cluster, n_workers=1):
        pytest.fail("opened")


def test_a_service_takes_the_clusters_that_it_is_for_alone(monkeypatch):
    check_cluster("tls://anywhere:8786")
    monkeypatch.setenv("HALOSEG_CLUSTERS", "tls://here:8786, local")
    check_cluster("tls://here:8786")
    check_cluster("local")
    rule = r"^cluster must be in HALOSEG_CLUSTERS \(tls://here:8786, local\), got"
    for other in ("tls://here:8787", "tcp://here:8786", "tls://here.evil:8786", "tls://HERE:8786"):
        with pytest.raises(ArgumentError, match=rule):
            check_cluster(other)
    with pytest.raises(ArgumentError, match=r'^cluster must be "local", tcp://'):
        check_cluster("http://here:8786")


def test_there_is_at_least_one_worker():
    rule = r"^a run needs at least 1 worker, got 0; use 1 or more$"
    with pytest.raises(ArgumentError, match=rule), open_runner(n_workers=0):
        pytest.fail("opened")
