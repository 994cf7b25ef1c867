from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from clusters import children, processes
from compute_works import Copying, Scripted

from pipeline.compute import cluster
from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import run_serial
from pipeline.compute.window import TASKS_PER_WORKER
from pipeline.errors import ClusterError, RunError


def blocks(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (folder / "blocks").iterdir()}


def spans(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return per worker process when it was busy, in order."""
    found: dict[str, list[tuple[float, float]]] = {}
    for each in (folder / "spans").iterdir():
        begin, end = map(float, each.read_text().split())
        found.setdefault(each.name.partition("-")[0], []).append((begin, end))
    return {pid: sorted(of) for pid, of in found.items()}


def overlaps(of: list[tuple[float, float]]) -> bool:
    return any(begin < end for (_, end), (begin, _) in pairwise(of))


def test_connecting_takes_less_than_half_a_minute():
    assert cluster.CONNECT_TIMEOUT_S * 2 < 30


@pytest.mark.parametrize("options", [("--nthreads", "4", "--resources", "GPU=1"), ("--nthreads", "4")])
def test_a_cluster_that_is_there_runs_one_block_at_a_time_on_each_worker(tmp_path, options):
    with processes(tmp_path) as started:
        for _ in range(2):
            started.worker(*options)
        with open_runner(cluster=started.address, n_workers=1) as run:
            run.client.wait_for_workers(2, timeout=30)
            records = []
            assert run(Scripted(str(tmp_path / "dask"), sleep_s=0.03), range(24), on_record=records.append) == ()
        run_serial(Scripted(str(tmp_path / "serial")), range(24), on_record=lambda _: None)
        assert sorted(record.index for record in records) == list(range(24))
        assert blocks(tmp_path / "dask") == blocks(tmp_path / "serial")
        busy = spans(tmp_path / "dask")
        assert len(busy) == 2
        assert not any(overlaps(of) for of in busy.values())


def test_blocks_go_to_gpu_workers_alone_where_there_are_any(tmp_path):
    with processes(tmp_path) as started:
        started.worker("--nthreads", "1")
        started.worker("--nthreads", "1", "--resources", "GPU=1")
        with open_runner(cluster=started.address, n_workers=1) as run:
            run.client.wait_for_workers(2, timeout=30)
            acts = ((3, "fail twice"),)
            assert run(Scripted(str(tmp_path), acts), range(12), on_record=lambda _: None) == ()
            every = run.client.scheduler_info()["workers"]
            (gpu,) = [address for address, each in every.items() if each["resources"]]
            pid = run.client.run(os.getpid)[gpu]
        assert list(spans(tmp_path)) == [str(pid)]


def test_what_needs_no_device_is_kept_off_the_gpu_workers_where_there_are_others(tmp_path, caplog):
    acts = ((3, "fail twice"),)
    with processes(tmp_path) as started:
        started.worker("--nthreads", "1", "--resources", "GPU=1")
        with open_runner(cluster=started.address, n_workers=1) as run:
            assert run(Copying(str(tmp_path / "alone"), acts), range(4), on_record=lambda _: None) == ()
            assert len(spans(tmp_path / "alone")) == 1  # on the GPU worker, the only one
            assert not run.can_copy(str(tmp_path))
            hosts = [started.worker("--nthreads", "1", "--no-nanny") for _ in range(2)]
            run.client.wait_for_workers(3, timeout=30)
            assert run.can_copy(str(tmp_path))
            assert run.can_copy(f"{tmp_path}/alone*")
            assert run.can_copy("s3://bucket/scan.tif")
            assert not run.can_copy(str(tmp_path / "nowhere.tif"))
            assert "nowhere.tif, since 2 of 2 workers do not see it: mount it there, too" in caplog.text
            assert run(Copying(str(tmp_path / "hosts"), acts, sleep_s=0.25), range(16), on_record=lambda _: None) == ()
            assert set(spans(tmp_path / "hosts")) == {str(each.pid) for each in hosts}
            seen = []

            def on_record(record):
                seen.append(record.index)
                if len(seen) == 4:
                    for each in hosts:
                        each.kill()

            assert run(Copying(str(tmp_path / "gone"), sleep_s=0.03), range(24), on_record=on_record) == ()
        assert sorted(seen) == list(range(24))
        assert len(spans(tmp_path / "gone")) == 3  # and the GPU worker has done what these left


def test_a_worker_that_joins_during_the_run_takes_blocks(tmp_path):
    with processes(tmp_path) as started:
        started.worker("--nthreads", "1")
        with open_runner(cluster=started.address, n_workers=1) as run:
            seen = []

            def on_record(record):
                seen.append(record.index)
                if len(seen) == 1:
                    started.worker("--nthreads", "1")
                    run.client.wait_for_workers(2, timeout=30)

            assert run(Scripted(str(tmp_path), sleep_s=0.1), range(40), on_record=on_record) == ()
        assert sorted(seen) == list(range(40))
        assert len(spans(tmp_path)) == 2


def test_a_dead_scheduler_ends_the_run_in_one_line(tmp_path):
    with processes(tmp_path) as started:
        started.worker("--nthreads", "1")
        begin = time.monotonic()
        rule = r"^the Dask scheduler must live as long as the run, .* start the scheduler and run the same command"
        with pytest.raises(RunError, match=rule), open_runner(cluster=started.address, n_workers=1) as run:
            run(Scripted(str(tmp_path), sleep_s=0.05), range(1000), on_record=lambda _: started.scheduler.kill())
        assert time.monotonic() - begin < 20


def test_a_run_that_loses_every_worker_ends(tmp_path):
    with processes(tmp_path) as started:
        worker = started.worker("--nthreads", "1", "--no-nanny")
        rule = r"^a run needs at least one worker, got none for 1 s; what is done is kept, start workers and run"
        with (
            pytest.raises(RunError, match=rule),
            open_runner(cluster=started.address, n_workers=1, worker_timeout_s=1) as run,
        ):
            run(Scripted(str(tmp_path), sleep_s=0.05), range(1000), on_record=lambda _: worker.kill())


def kill_with_results(worker: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill a worker with the results of blocks of which the client has heard, and which it has not fetched."""
    until = time.monotonic() + 60
    while len(list((folder / "blocks").iterdir())) < TASKS_PER_WORKER and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)  # the client hears that they are done
    worker.kill()
    worker.wait()


def test_blocks_whose_results_die_with_a_worker_are_run_by_the_next_one(tmp_path):
    with processes(tmp_path) as started:
        worker = started.worker("--nthreads", "1", "--no-nanny")
        records = []

        def on_record(record):
            records.append(record)
            if len(records) == 1:
                kill_with_results(worker, tmp_path)
                started.worker("--nthreads", "1", "--no-nanny")

        with open_runner(cluster=started.address, n_workers=1) as run:
            assert run(Scripted(str(tmp_path), sleep_s=0.3), range(12), on_record=on_record) == ()
        assert sorted(record.index for record in records) == list(range(12))
        again = {record.index: record.retries for record in records if record.retries}
        assert 2 <= len(again) <= TASKS_PER_WORKER
        assert set(again.values()) == {("its worker died",)}


def test_a_run_whose_results_die_with_the_last_worker_ends(tmp_path):
    with processes(tmp_path) as started:
        worker = started.worker("--nthreads", "1", "--no-nanny")

        def kill(_record):
            kill_with_results(worker, tmp_path)

        rule = r"^a run needs at least one worker, got none for 1 s"
        with (
            pytest.raises(RunError, match=rule),
            open_runner(cluster=started.address, n_workers=1, worker_timeout_s=1) as run,
        ):
            run(Scripted(str(tmp_path), sleep_s=0.3), range(1000), on_record=kill)


def test_a_scheduler_without_workers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "FIRST_WORKER_TIMEOUT_S", 0.5)
    with processes(tmp_path) as started:
        rule = r"^the scheduler at tcp://\S+ must have a worker within 0.5 s, got none; start some: dask worker tcp://"
        with pytest.raises(ClusterError, match=rule), open_runner(cluster=started.address, n_workers=1):
            pytest.fail("opened")


PROGRAM = """
import sys
from pathlib import Path
from clusters import children, processes
from compute_works import Scripted
from pipeline.compute import cluster
from pipeline.errors import PipelineError

cluster.CONNECT_TIMEOUT_S = 3

if __name__ == "__main__":
    Path(sys.argv[2], "ready").touch()
    try:
        with cluster.open_runner(cluster=sys.argv[1], n_workers=2) as run:
            run(Scripted(sys.argv[2], sleep_s=float(sys.argv[3])), range(1000), on_record=lambda _: None)
    except (PipelineError, KeyboardInterrupt) as error:
        print(type(error).__name__, error, file=sys.stderr)
"""


@contextmanager
def program(folder: Path, address: str, *, sleep_s: float):
    """Run the program in a process group of its own, as a shell does."""
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-W", "error", str(folder / "program.py"), address, str(folder), str(sleep_s)]
    here = Path(__file__).parent
    where = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True, env=where)
    try:
        yield process
    finally:
        for each in (*children(process), process):
            each.kill()
        process.communicate()


def began(folder: Path, *, n_workers: int) -> list[int]:
    """Wait until the workers run their first blocks; return their process ids."""
    until = time.monotonic() + 30
    while len(found := list((folder / "attempts").glob("*"))) < n_workers or not all(p.read_text() for p in found):
        assert time.monotonic() < until, "no block began"
        time.sleep(0.05)
    return sorted({int(each.read_text()) for each in found})


def test_a_scheduler_that_is_not_there_or_mute_is_said_in_one_line(tmp_path):
    (tmp_path / "mute").mkdir()
    with socket.socket() as unused, socket.socket() as mute:
        unused.bind(("127.0.0.1", 0))
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        addresses = [f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in (unused, mute)]
        with (
            program(tmp_path, addresses[0], sleep_s=0) as first,
            program(tmp_path / "mute", addresses[1], sleep_s=0) as second,
        ):
            until = time.monotonic() + 60
            while not all((each / "ready").exists() for each in (tmp_path, tmp_path / "mute")):
                assert time.monotonic() < until, "the programs did not begin"
                time.sleep(0.05)
            begin = time.monotonic()
            said = [each.communicate(timeout=60)[1] for each in (first, second)]
    assert time.monotonic() - begin < 3 + 8
    for address, line in zip(addresses, said, strict=True):
        assert line.startswith(f"ClusterError a Dask scheduler must answer at {address} within 3 s, got ")
        assert line.endswith("; start it or mend the address\n")
        assert line.count("\n") == 1


def test_ctrl_c_ends_run_and_workers_quickly_without_noise(tmp_path):
    with program(tmp_path, "local", sleep_s=60) as process:
        workers = began(tmp_path, n_workers=2)
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - begin < 3
        assert said == "KeyboardInterrupt \n"
        assert len(workers) == 2
        assert not any(psutil.pid_exists(pid) for pid in workers)


def test_workers_die_with_a_process_that_is_killed(tmp_path):
    with program(tmp_path, "local", sleep_s=60) as process:
        workers = [psutil.Process(pid) for pid in began(tmp_path, n_workers=2)]
        process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert len(gone) == 2
        assert not alive
