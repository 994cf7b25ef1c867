"""Workers that have another version than the flow, on a real scheduler."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from clusters import children, processes
from compute_works import Scripted

import pipeline
from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import BlockRecord
from pipeline.compute.versions import compared, installed, of_this_process, of_worker
from pipeline.errors import ClusterError, RunError
from pipeline.unet.device import pick_device

HERE = Path(pipeline.__file__).parent


@pytest.mark.parametrize("older", ["compute/versions.py", "compute/resident.py", "report.py"])
def test_a_worker_of_another_version_that_joins_later_ends_the_run_in_one_line_and_does_no_block(tmp_path, older):
    shutil.copytree(HERE, tmp_path / "old/pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.tif"))
    (tmp_path / "old/pipeline" / older).unlink()  # so that it can be asked, or take work, by less or more of its code
    with processes(tmp_path) as started:
        started.worker()
        with open_runner(cluster=started.address, n_workers=1) as run:
            late = []

            def join(_record) -> None:
                if not late:
                    late.append(started.worker(PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path / "old")))
                    run.client.wait_for_workers(2, timeout=60)

            work = Scripted(str(tmp_path / "run"), sleep_s=0.05)
            with pytest.raises(RunError, match=r"^workers must have the versions .* on 1 of 1 .* again$"):
                run(work, range(100_000), on_record=join)
            with pytest.raises(ClusterError, match=r"^workers must have the versions .* on 1 of 2 "):
                run.check()
            foreign = {str(each.pid) for each in children(late[0])}
            did = {each.read_text() for each in (tmp_path / "run/attempts").iterdir()}
    assert len(did) == 1
    assert not did & foreign


def test_workers_of_an_older_version_are_refused_in_one_line_and_those_of_the_same_are_not(tmp_path):
    shutil.copytree(HERE, tmp_path / "same/pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.tif"))
    shutil.copytree(tmp_path / "same/pipeline", tmp_path / "old/pipeline")
    (tmp_path / "old/pipeline/compute/versions.py").unlink()  # such a worker cannot be asked through its own code
    with processes(tmp_path) as started:
        started.worker(PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path / "same"))
        with open_runner(cluster=started.address, n_workers=1) as run:
            run.client.wait_for_workers(1, timeout=60)
            started.worker(PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path / "old"))
            run.client.wait_for_workers(2, timeout=60)
        with pytest.raises(ClusterError, match="restart the workers") as refused, open_runner(
            cluster=started.address, n_workers=1
        ):
            pytest.fail("it was let in")
    ours = re.escape(installed()["haloseg"])
    assert re.fullmatch(
        r"workers must have the versions of the flow or command, got haloseg [\d.]+ of code [0-9a-f]{8} on 1 of 2 "
        rf"workers, {ours} here; install the same on both and restart the workers",
        str(refused.value),
    )


def test_versions_are_of_what_decides_the_bytes():
    assert set(installed()) == {"python", "haloseg", "torch", "zarr"}
    assert not [each for each in installed().values() if "+" in each or "none" in each]


def test_what_is_installed_under_a_worker_that_runs_is_not_what_it_runs(tmp_path):
    shutil.copytree(HERE, tmp_path / "its/pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.tif"))
    with processes(tmp_path) as started:
        started.worker(PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path / "its"))
        with open_runner(cluster=started.address, n_workers=1) as run:
            assert compared(run.client).others == ""
            (tmp_path / "its/pipeline/report.py").write_text("# of another version")
            assert compared(run.client).others == ""
            (told,) = run.client.run(of_worker).values()
    assert told == of_this_process() == installed()


def test_a_worker_that_joins_and_freezes_holds_no_run_and_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "5s")  # else 5 minutes, until Dask drops it
    for each in ("asking.ANSWER", "devices.DEVICE", "versions.JOIN"):
        monkeypatch.setattr(f"pipeline.compute.{each}_TIMEOUT_S", 2.0)
    records: list[BlockRecord] = []
    with processes(tmp_path) as started:
        first, frozen = started.worker("--no-nanny"), ""
        with open_runner(cluster=started.address, n_workers=1) as run:
            run.client.run(pick_device, "auto")  # which imports torch

            def join(record) -> None:
                nonlocal frozen
                records.append(record)
                if len(records) == 1:
                    here = set(run.client.scheduler_info()["workers"])
                    late = started.worker("--no-nanny")
                    run.client.wait_for_workers(2, timeout=60)
                    (frozen,) = set(run.client.scheduler_info()["workers"]) - here
                    late.send_signal(signal.SIGSTOP)
                    begin = time.monotonic()
                    run.check()
                    assert run.device() == "cpu"
                    assert time.monotonic() - begin < 10

            assert run(Scripted(str(tmp_path / "run"), sleep_s=0.02), range(300), on_record=join) == ()
            first.send_signal(signal.SIGSTOP)
            with pytest.raises(ClusterError, match=r"^a worker must answer within \S+ s, got none that does of 1; "):
                run.check()
            with pytest.raises(ClusterError, match=r"^the workers must tell what they compute on, .* within 2 s; "):
                run.device()
    assert len(records) == 300
    for what in ("the others go on", "the others tell what all compute on"):
        lines = [each for each in caplog.messages if what in each]
        assert lines
        assert all(line.startswith("workers must answer within 2 s, got none from tcp:") for line in lines)
        assert all(frozen in line for line in lines)
