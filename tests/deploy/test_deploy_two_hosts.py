"""Two hosts, each a network namespace of its own, TLS between them, and one of them cut off in the middle of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from deploy_files import DEPLOY, make_certificates, tls_environment, until

from pipeline.ingest import ingest

DEMO = DEPLOY.parent / "pipeline" / "demo"
DESK, NODE = "10.77.0.1", "10.77.0.2"
ADDRESS = f"tls://{DESK}:8786"

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip, of iproute2"),
]  # fmt: skip


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts():
    """Make two hosts with a cable between them."""
    for name in ("desk", "node"):
        ip("netns", "del", f"haloseg-{name}")
        made = ip("netns", "add", f"haloseg-{name}")
        if made.returncode:
            pytest.skip(f"needs network namespaces: {made.stderr.strip()}")
    ip("-n", "haloseg-desk", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", "haloseg-node")
    for name, device, address in (("desk", "cable0", DESK), ("node", "cable1", NODE)):
        for words in (("link", "set", "lo", "up"), ("addr", "add", f"{address}/24", "dev", device),
                      ("link", "set", device, "up")):  # fmt: skip
            done = ip("-n", f"haloseg-{name}", *words)
            assert done.returncode == 0, done.stderr
    yield
    for name in ("desk", "node"):
        ip("netns", "del", f"haloseg-{name}")


@pytest.fixture(scope="module")
def cluster(hosts, tmp_path_factory):
    """Run a scheduler and a worker on one host, and another worker on the other one."""
    folder = tmp_path_factory.mktemp("hosts")
    assert make_certificates(folder / "certificates", DESK, NODE).returncode == 0
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | tls_environment(folder / "certificates") | threads
    started = []

    def on(host, *command):
        with (folder / f"{len(started)}.log").open("w") as log:
            words = ["ip", "netns", "exec", f"haloseg-{host}", sys.executable, "-m", *map(str, command)]
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process

    on("desk", "distributed.cli.dask_scheduler", "--host", DESK, "--port", "8786", "--protocol", "tls",
       "--no-dashboard")  # fmt: skip
    for host, address in (("desk", DESK), ("node", NODE)):
        on(host, "distributed.cli.dask_worker", ADDRESS, "--host", address, "--nthreads", "1", "--memory-limit", "0",
           "--no-dashboard", "--local-directory", folder / host)  # fmt: skip
    yield on
    for process in reversed(started):
        subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
        process.wait(30)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    tifffile.imwrite(folder / "scan.tif", np.tile(tifffile.imread(DEMO / "scan.tif"), (1, 2, 3)))
    ingest(str(folder / "scan.tif"), str(folder / "scan.zarr"), shard=(64,))
    return folder / "scan.zarr"


def shards(image, name):
    folder = image / "labels" / name / "0" / "c"
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_a_host_that_is_cut_off_costs_time_alone(cluster, image):
    def segment(name):
        return cluster("desk", "pipeline.cli", "segment", image, "--model", DEMO / "model.safetensors", "--name", name,
                       "--cluster", ADDRESS, "--json")  # fmt: skip

    begin = time.monotonic()
    assert segment("undisturbed").wait(300) == 0
    took_s = time.monotonic() - begin
    n_shards = len(shards(image, "undisturbed"))
    run = segment("cut")
    until(lambda: len(shards(image, "cut")) > n_shards // 8, what="some shards", seconds=120)
    assert ip("-n", "haloseg-node", "link", "set", "cable1", "down").returncode == 0
    cut = len(shards(image, "cut"))
    assert cut < n_shards
    assert run.wait(400) == 0
    print(f"{took_s:.0f} s undisturbed, {time.monotonic() - begin - took_s:.0f} s when cut off at {cut} of {n_shards}")
    assert shards(image, "cut") == shards(image, "undisturbed")
