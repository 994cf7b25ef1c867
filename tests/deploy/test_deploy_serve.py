"""Everything on one machine, started by deploy/serve.py, and what happens to an archive when parts of it die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
from deploy_files import until

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "pipeline" / "demo"
EVERY_S = 15
N_BLOCKS = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def free_ports(n: int) -> int:
    """Return the first of n ports in a row that are free."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + n):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


class Site:
    """A running serve.py with its archive."""

    def __init__(self, home: Path) -> None:
        self.home, self.archive = home, home / "archive"
        self.port = free_ports(1)
        dask = free_ports(6)
        self.archive.mkdir(parents=True)
        self.command = [
            sys.executable, str(ROOT / "deploy" / "serve.py"), "--home", str(home), "--archive", str(self.archive),
            "--port", str(self.port), "--dask-port", str(dask), "--every", str(EVERY_S), "--settle", "2",
            *os.environ.get("HALOSEG_SERVE", "").split(),
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        with (self.home / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        said = self.home / "serve.log"
        until(lambda: b"Ctrl-C" in said.read_bytes(), seconds=400, what="serve.py says that all is up")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0

    def die(self) -> None:
        """Kill every process at once, as a machine does that loses power."""
        every = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for each in every:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGSTOP)  # so that nobody starts or tells anything any more
        for each in every:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait(60)
        psutil.wait_procs(every[1:], timeout=60)

    def slots(self) -> dict[str, int]:
        """Return how many slots of each limit are taken."""
        every = self.post("/v2/concurrency_limits/filter", {})
        return {each["name"]: each["active_slots"] for each in every}

    def post(self, path: str, document: dict[str, Any]) -> Any:
        url, body = f"http://127.0.0.1:{self.port}/api{path}", json.dumps(document).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.loads(reply.read() or "null")

    def runs(self, flow: str, *states: str) -> list[dict[str, Any]]:
        wanted = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 100}
        if states:
            wanted["flow_runs"] = {"state": {"name": {"any_": list(states)}}}
        found: list[dict[str, Any]] = self.post("/flow_runs/filter", wanted)
        return found

    def children(self, *words: str) -> list[psutil.Process]:
        every = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in every if all(word in " ".join(_command(each)) for word in words)]

    def put(self, name: str, voxels: np.ndarray) -> None:
        path = self.archive / name
        tifffile.imwrite(path, voxels)
        os.utime(path, (time.time() - 60,) * 2)

    def shards(self, stem: str) -> dict[str, bytes]:
        folder = self.archive / f"{stem}.zarr" / "labels" / "classes" / "0" / "c"
        return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    def published(self, stem: str) -> bool:
        listed = self.archive / f"{stem}.zarr" / "labels" / "zarr.json"
        return listed.exists() and "classes" in json.loads(listed.read_bytes())["attributes"]["ome"]["labels"]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("serve"))
    yield site
    site.stop()
    left = [each for each in psutil.process_iter() if str(site.home) in " ".join(_command(each))]
    assert left == []


@pytest.fixture(scope="module")
def voxels():
    return np.tile(tifffile.imread(DEMO / "scan.tif"), (1, 2, 3))


@pytest.fixture(scope="module")
def undisturbed(site, voxels):
    site.put("undisturbed.tif", voxels)
    until(lambda: site.published("undisturbed"), seconds=900, what="labels of the scan")
    shards = site.shards("undisturbed")
    assert len(shards) == N_BLOCKS
    return shards


def kill(site: Site, *words: str) -> None:
    found = site.children(*words)
    assert found, f"no process {words}"
    for process in found:
        process.kill()


def kill_flow(site: Site) -> None:
    kill(site, "prefect.engine")


def kill_worker(site: Site) -> None:
    """Kill the process that computes, not the nanny above it."""
    nannies = site.children("dask_worker")
    workers = [each for nanny in nannies for each in nanny.children() if "spawn_main" in " ".join(_command(each))]
    workers[0].kill()


def kill_scheduler(site: Site) -> None:
    kill(site, "dask_scheduler")


def kill_server(site: Site) -> None:
    kill(site, "prefect", "server", "start")


FAULTS = {"worker": kill_worker, "scheduler": kill_scheduler, "flow": kill_flow, "server": kill_server}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_costs_time_alone(site, voxels, undisturbed, fault):
    site.put(f"{fault}.tif", voxels)
    until(lambda: len(site.shards(fault)) > 0, seconds=400, what="the first shard")
    assert len(site.shards(fault)) < N_BLOCKS
    FAULTS[fault](site)
    until(lambda: site.published(fault), seconds=900, what="labels in spite of the fault")
    assert site.shards(fault) == undisturbed
    assert "haloseg-gpu" in site.slots()
    until(lambda: site.slots()["haloseg-gpu"] == 0, seconds=300, what="all slots are given back")


def test_a_cancelled_run_stops_within_ten_seconds_and_the_next_one_goes_on(site, voxels, undisturbed):
    site.put("cancelled.tif", voxels)
    until(lambda: len(site.shards("cancelled")) > 0, seconds=400, what="the first shard")
    (run,) = site.runs("archive", "Running")
    site.post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    begin = time.monotonic()
    until(lambda: [each for each in site.runs("archive", "Cancelled") if each["id"] == run["id"]], seconds=300,
          what="the run is cancelled")  # fmt: skip
    took = time.monotonic() - begin
    n_done = len(site.shards("cancelled"))
    time.sleep(3)
    assert n_done == len(site.shards("cancelled")) < N_BLOCKS
    assert not site.published("cancelled")
    print(f"cancelled after {took:.1f} s, {n_done} of {N_BLOCKS} shards were done")
    assert took < 10
    until(lambda: site.published("cancelled"), seconds=900, what="labels in spite of the cancellation")
    assert site.shards("cancelled") == undisturbed


def test_a_paused_run_stops_and_resumed_it_takes_up_what_is_missing(site, voxels, undisturbed):
    stems = ("paused-1", "paused-2", "paused-3")
    for stem in stems:
        site.put(f"{stem}.tif", voxels)
    until(lambda: site.published("paused-1"), seconds=900, what="the first one's labels")
    (run,) = site.runs("archive", "Running")
    site.post(f"/deployments/{run['deployment_id']}/pause_deployment", {})
    later = datetime.now(UTC) + timedelta(hours=1)
    details = {"pause_timeout": later.isoformat(), "pause_reschedule": True}  # as the UI's button does
    site.post(f"/flow_runs/{run['id']}/set_state", {"state": {
        "type": "PAUSED", "name": "Suspended", "state_details": details,
    }})  # fmt: skip
    begin = time.monotonic()
    until(lambda: not site.children("prefect.engine"), seconds=300, what="the flow's process ends")
    done = {stem: len(site.shards(stem)) for stem in stems}
    print(f"paused after {time.monotonic() - begin:.1f} s with shards {done} of {N_BLOCKS} each")
    assert done["paused-3"] < N_BLOCKS
    assert [each["id"] for each in site.runs("archive", "Suspended")] == [run["id"]]
    assert site.runs("archive", "Scheduled", "Late", "Running") == []
    assert site.runs("segment", "Running", "Pending") == []
    assert [each.name for each in site.archive.iterdir() if each.name.endswith(".lease")] == []
    time.sleep(3)
    assert done == {stem: len(site.shards(stem)) for stem in stems}
    before = {each["id"] for each in site.runs("segment")}

    assert site.post(f"/flow_runs/{run['id']}/resume", {})["status"] == "ACCEPT"
    until(lambda: all(map(site.published, stems)), seconds=900, what="labels after the pause")
    for stem in stems:
        assert site.shards(stem) == undisturbed
    until(lambda: [each for each in site.runs("archive", "Completed") if each["id"] == run["id"]], seconds=300,
          what="the same run is completed")  # fmt: skip
    site.post(f"/deployments/{run['deployment_id']}/resume_deployment", {})
    after = {each["name"]: each for each in site.runs("segment") if each["id"] not in before}
    for stem in ("paused-2", "paused-3"):
        again = after[f"classes of {site.archive / stem}.tif"]
        assert (again["state_name"], again["parameters"]["scan"]) == ("Completed", f"{site.archive / stem}.tif")
        assert f"scan:{stem}.tif" in again["tags"]
        (plan,) = site.post("/artifacts/filter", {"artifacts": {
            "flow_run_id": {"any_": [again["id"]]}, "key": {"like_": "%-plan"},
        }})  # fmt: skip
        assert f"| blocks | {N_BLOCKS}, of which {N_BLOCKS - done[stem]} are to be done |" in plan["data"]


def test_when_all_is_done_a_run_does_nothing_and_is_quick(site, undisturbed):
    until(lambda: not site.runs("archive", "Running"), seconds=300, what="no run is at work")
    begun = {each["id"] for each in site.runs("segment")}
    ended = {each["id"] for each in site.runs("archive", "Completed")}

    def new() -> list[float]:
        every = site.runs("archive", "Completed")
        return [each["total_run_time"] for each in every if each["id"] not in ended]

    took = until(lambda: new() if len(new()) >= 2 else None, seconds=400, what="two more runs")
    assert {each["id"] for each in site.runs("segment")} == begun
    print("seconds of runs that find all done:", took)
    assert max(took) < 10


def test_a_bad_scan_and_one_that_grows_stop_no_other(site, undisturbed):
    before = {each["id"] for each in site.runs("archive", "Done with failures")}  # where a scheduler died
    (site.archive / "bad.tif").write_bytes(b"II*\0 this is no scan")
    os.utime(site.archive / "bad.tif", (time.time() - 60,) * 2)
    small = tifffile.imread(DEMO / "scan.tif")[:40, :80, :80]
    site.put("small.tif", small)
    growing = site.archive / "growing.tif"
    end = time.monotonic() + 600
    content = (DEMO / "scan.tif").read_bytes()
    while not site.published("small") and time.monotonic() < end:
        with growing.open("ab") as file:
            file.write(content[:1000])
        time.sleep(0.5)
    assert site.published("small")
    assert not (site.archive / "growing.zarr").exists()
    until(lambda: {each["id"] for each in site.runs("archive", "Done with failures")} - before, seconds=300,
          what="a run that tells of the bad scan")  # fmt: skip
    (table,) = site.post("/artifacts/latest/filter", {"artifacts": {"key": {"like_": "archive-%"}}})
    rows = {row.split("|")[1].strip(): row for row in table["data"].splitlines() if row.startswith("| ")}
    assert "| failed |" in rows["bad.tif"]
    assert "- **bad.tif**: a scan must be whole and decodable" in table["data"]
    (site.archive / "bad.tif").unlink()
    shutil.copyfile(DEMO / "scan.tif", growing)


def test_a_machine_that_dies_and_comes_back_goes_on(site, voxels, undisturbed):
    site.put("power.tif", voxels)
    until(lambda: len(site.shards("power")) > 0, seconds=400, what="the first shard")
    site.die()
    assert not site.published("power")
    begin = time.monotonic()
    site.start()
    until(lambda: site.published("power"), seconds=900, what="labels in spite of the power cut")
    print(f"published {time.monotonic() - begin:.0f} s after the machine came back")
    assert site.shards("power") == undisturbed
    until(lambda: not any(site.slots().values()), seconds=600, what="all slots are given back")
    until(lambda: site.runs("archive", "Crashed"), seconds=600, what="the dead run is told as crashed")
