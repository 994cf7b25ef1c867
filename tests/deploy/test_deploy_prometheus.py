"""Prometheus itself, with the configuration of deploy/, asking a scheduler and workers that segment a scan over TLS."""

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from clusters import children
from deploy_files import BIN, DEPLOY, ROOT, free_port, load, make_certificates, tls_environment, tool, until
from queries import ALERTS, PANEL_QUERIES

from pipeline.geometry.grid import BlockGrid
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.location import Location

DEMO = ROOT / "pipeline/demo"
SHAPE, SHARD, N_BLOCKS = (96, 96, 48), 48, 4

pytestmark = pytest.mark.skipif(
    not (tool("prometheus") and tool("promtool")), reason="needs prometheus and promtool, Debian's package prometheus"
)


class Monitored:
    """A scheduler, two workers as compose starts them, and a Prometheus that asks them every second.

    The workers' certificate is about to expire.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, []
        ports = [free_port() for _ in range(5)]
        self.address = f"tls://127.0.0.1:{ports[0]}"
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | tls_environment(folder / "tls") | {
            name: value for service in ("dask-scheduler", "dask-worker-cpu")
            for name, value in load("compose.yaml")["services"][service]["environment"].items() if "PRELOAD" in name
        }  # fmt: skip
        self._certify(DAYS="31")
        dask, here = [sys.executable, "-m"], ["--host", "127.0.0.1", "--dashboard-address"]
        self._start([*dask, "distributed.cli.dask_scheduler", "--port", ports[0], *here, f"127.0.0.1:{ports[1]}",
                     "--scheduler-file", folder / "scheduler.json"])  # fmt: skip
        until((folder / "scheduler.json").exists, what="the scheduler is up", seconds=60)
        self._certify(DAYS="29")
        for port in ports[2:4]:
            self._start([*dask, "distributed.cli.dask_worker", self.address, "--nthreads", 1, "--memory-limit", 0,
                         "--local-directory", folder, *here, f"127.0.0.1:{port}"])  # fmt: skip
        self.configuration = self._configured(scheduler=ports[1], workers=ports[2:4])
        self.workers = [f"127.0.0.1:{port}" for port in ports[2:4]]
        self._url = f"http://127.0.0.1:{ports[4]}/api/v1"
        self._start([tool("prometheus"), f"--config.file={self.configuration}", f"--storage.tsdb.path={folder}/data",
                     f"--web.listen-address=127.0.0.1:{ports[4]}"])  # fmt: skip

    def _certify(self, **environment: str) -> None:
        done = make_certificates(self.folder / "tls", **environment)
        assert done.returncode == 0, done.stderr

    def _configured(self, *, scheduler: int, workers: list[int]) -> Path:
        """Write prometheus.yml for this machine: other addresses, and seconds for quarters of a minute."""
        made = load("prometheus/prometheus.yml")
        made["global"] = dict.fromkeys(made["global"], "1s")
        made["rule_files"] = [str(DEPLOY / "prometheus" / Path(each).name) for each in made["rule_files"]]
        jobs = {each["job_name"]: each for each in made["scrape_configs"]}
        jobs["dask-scheduler"]["static_configs"][0]["targets"] = [f"127.0.0.1:{scheduler}"]
        del jobs["dask-worker"]["dns_sd_configs"]
        jobs["dask-worker"]["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in workers]}]
        jobs["prefect-server"]["static_configs"][0]["targets"] = [f"127.0.0.1:{free_port()}"]  # where nothing is
        jobs["prefect-server"]["basic_auth"]["password_file"] = str(self.folder / "password")
        (self.folder / "password").write_text("a password")
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(made))
        return self.folder / "prometheus.yml"

    def _start(self, words: list[object]) -> None:
        with (self.folder / f"{len(self._started)}.log").open("w") as log:
            self._started.append(subprocess.Popen(list(map(str, words)), env=self._environment, stdout=log, stderr=log))

    def close(self) -> None:
        for process in reversed(self._started):
            for each in (*children(process), process):
                each.kill()
            process.wait(30)

    def _told(self, what: str, **asked: str) -> dict:
        with urllib.request.urlopen(f"{self._url}/{what}?{urllib.parse.urlencode(asked)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def series(self, text: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return labels, and time and value, of each series that a query finds now."""
        found = self._told("query", query=text.replace("$__rate_interval", "15s"))["result"]
        return [(each["metric"], each["value"]) for each in found]

    def query(self, text: str) -> list[float]:
        return [float(value) for _, (_, value) in self.series(text)]

    def up(self) -> dict[str, list[str]]:
        try:
            targets = self._told("targets")["activeTargets"]
        except OSError:
            return {}
        jobs = {each["labels"]["job"] for each in targets}
        return {job: [each["health"] for each in targets if each["labels"]["job"] == job] for job in jobs}

    def alerts(self) -> dict[str, str]:
        rules = [each for group in self._told("rules")["groups"] for each in group["rules"]]
        assert {each["health"] for each in rules} <= {"ok", "unknown"}, rules
        return {each["name"]: each["state"] for each in rules}

    def haloseg(self, *words: object) -> int:
        program = [BIN / "haloseg", *map(str, words), "--cluster", self.address]
        return subprocess.run(program, capture_output=True, check=False, env=self._environment).returncode

    def segmented(self, name: str) -> int:
        return self.haloseg("segment", self.folder / "scan.zarr", "--model", DEMO / "model.safetensors", "--name", name)


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    made = Monitored(tmp_path_factory.mktemp("monitored"))
    try:
        until(lambda: made.up().get("dask-worker") == ["up", "up"] == 2 * made.up()["dask-scheduler"],
              what="Prometheus has seen every service of Dask", seconds=120)  # fmt: skip
        scan = tifffile.imread(DEMO / "scan.tif")[tuple(slice(n) for n in SHAPE)]
        tifffile.imwrite(made.folder / "scan.tif", np.ascontiguousarray(scan))
        assert made.haloseg("ingest", made.folder / "scan.tif", made.folder / "scan.zarr", "--shard", SHARD) == 0
        yield made
    finally:
        made.close()


def test_promtool_takes_the_configuration(monitored):
    for words in (("--syntax-only", DEPLOY / "prometheus/prometheus.yml"), (monitored.configuration,)):
        command = [tool("promtool"), "check", "config", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_run_is_counted_and_every_panel_shows_something(monitored):
    assert monitored.segmented("classes") == 0
    voxels = 'sum(haloseg_voxels_total{work=~"Segment.*"})'
    until(lambda: monitored.query(voxels) == [np.prod(SHAPE)], what="Prometheus has seen all voxels", seconds=20)
    assert monitored.query('sum(haloseg_blocks_total{work=~"Segment.*"})') == [N_BLOCKS]
    assert {query: monitored.query(query) for query in PANEL_QUERIES if not monitored.query(query)} == {}
    (of_panel,) = [query for query in PANEL_QUERIES if "haloseg_blocks_total" in query]
    (blocks,) = monitored.query(of_panel)
    assert blocks == pytest.approx(N_BLOCKS, rel=0.15)  # Prometheus extrapolates to the ends of its samples


def test_what_does_not_answer_and_blocks_that_fail_alarm_and_nothing_else_does(monitored):
    alerts = until(lambda: (found := monitored.alerts())["PrefectIsDown"] == "pending" and found,
                   what="the server that is not there is missed", seconds=20)  # fmt: skip
    assert alerts == dict.fromkeys(ALERTS, "inactive") | {"PrefectIsDown": "pending", "CertificateExpires": "firing"}
    shard = next(each for each in (monitored.folder / "scan.zarr/0/c").rglob("*") if each.is_file())
    kept = bytearray(shard.read_bytes())
    shard.write_bytes(bytes(each ^ 255 for each in kept[:-100]) + kept[-100:])
    assert monitored.segmented("damaged") == 1
    shard.write_bytes(kept)
    until(lambda: monitored.alerts()["BlocksFail"] == "firing", what="the alert fires", seconds=20)
    alarmed = {name for name, state in monitored.alerts().items() if state != "inactive"}
    assert alarmed == {"BlocksFail", "PrefectIsDown", "CertificateExpires"}


def test_certificates_are_told_of_before_they_expire_as_each_process_read_them(monitored):
    left = {(each["job"], each["certificate"]): float(value) for each, (_, value) in monitored.series(
        "round((haloseg_certificate_expiry_seconds - time()) / 86400)")}  # fmt: skip
    assert left == {("dask-scheduler", "own"): 31, ("dask-worker", "own"): 29} | {
        (job, "authority"): 3650 for job in ("dask-scheduler", "dask-worker")
    }  # fmt: skip
    told = {(each["alertname"], each["instance"]) for each, _ in monitored.series('ALERTS{alertname=~"Cert.*"}')}
    assert told == {("CertificateExpires", each) for each in monitored.workers}


def test_labels_that_are_not_what_the_network_makes_of_the_scan_alarm(monitored):
    at = Location(str(monitored.folder / "scan.zarr")) / "labels" / "classes" / "0"
    labels = open_array(at)
    core = BlockGrid(SHAPE, (SHARD,) * 3).block(0).core
    write_shard(labels, core, 1 - np.asarray(labels[core.slices]), location=at)
    assert monitored.haloseg("verify", monitored.folder / "scan.zarr", "--name", "classes", "--boxes", 4) == 0
    until(lambda: monitored.alerts()["LabelsDiffer"] == "firing", what="the alert fires", seconds=20)
