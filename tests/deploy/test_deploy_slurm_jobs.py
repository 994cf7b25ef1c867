"""Slurm itself: what deploy/slurm ships, as jobs of a Slurm of this machine, killed in the middle and run again."""

import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from deploy_files import BIN, DEPLOY, ROOT, free_port, until
from slurm_daemons import missing, slurm

from pipeline.ingest import ingest
from pipeline.store.labels import open_labels

MODEL = ROOT / "pipeline/demo/model.safetensors"
N_BEFORE = 3  # shards on disk before a kill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs Slurm and munge on this machine, which lacks {missing()}"),
]


@pytest.fixture(scope="module")
def home():
    """Make the folder that all nodes see: venv, certificates, and an image."""
    with tempfile.TemporaryDirectory(prefix="haloseg") as name:  # sockets have short paths
        folder = Path(name)
        (folder / "venv").symlink_to(BIN.parent)
        (folder / "logs").mkdir()
        subprocess.run([DEPLOY / "make-certificates.sh", folder / "certificates"], check=True, capture_output=True)
        ingest(str(ROOT / "pipeline/demo/scan.tif"), str(folder / "scan.zarr"), shard=(48,))
        yield folder


@pytest.fixture(scope="module")
def cluster(home):
    (home / "slurm").mkdir()
    with slurm(home / "slurm") as made:
        yield made


def shards(labels):
    found = [each for each in sorted((labels / "0/c").rglob("*")) if each.is_file()]
    return {str(each.relative_to(labels)): each.read_bytes() for each in found if not each.name.startswith(".")}


@pytest.fixture(scope="module")
def undisturbed(home):
    words = [BIN / "haloseg", "segment", home / "scan.zarr", "--model", MODEL, "--name", "undisturbed"]
    subprocess.run([*words, "--workers", "2"], check=True, capture_output=True)
    return shards(home / "scan.zarr/labels/undisturbed")


def submitted(cluster, home, name):
    script = [DEPLOY / "slurm/segment.sbatch", home / "scan.zarr", MODEL, name]
    told = [f"--export=ALL,HALOSEG_SHARED={home},PYTHONPATH={ROOT}", f"--output={home}/logs/%j.out"]
    return cluster.told("sbatch", "--parsable", *told, *script)


def field(cluster, job, name):
    told = cluster.told("scontrol", "show", "job", job)
    return next(word.partition("=")[2] for word in told.split() if word.startswith(f"{name}="))


def test_the_batch_script_is_killed_and_submitted_again_and_ends_in_the_same_bytes(cluster, home, undisturbed):
    labels = home / "scan.zarr/labels/cells"
    first = submitted(cluster, home, "cells")
    until(lambda: len(shards(labels)) >= N_BEFORE, what="the first shards")
    cluster.told("scancel", "--full", "--signal=KILL", first)
    until(lambda: not cluster.jobs(), what="the job ends")
    kept = {name: (labels / name).stat().st_mtime_ns for name in shards(labels)}
    assert N_BEFORE <= len(kept) < len(undisturbed)
    again = submitted(cluster, home, "cells")
    until(lambda: not cluster.jobs(), what="the job ends")
    log = (home / f"logs/{again}.out").read_text()
    assert (field(cluster, again, "JobState"), field(cluster, again, "ExitCode")) == ("COMPLETED", "0:0"), log
    assert shards(labels) == undisturbed
    assert open_labels(str(labels)).spatial_shape == (96, 160, 160)
    assert {name: (labels / name).stat().st_mtime_ns for name in kept} == kept
    assert "tcp://" not in log
    for word in ("CRITICAL", "Killed"):
        assert word not in log, log


@contextmanager
def kept_cluster(cluster, home):
    """Run start_cluster.py with the settings of dask.yaml, and yield the scheduler's address."""
    (home / "config").mkdir()
    settings = (DEPLOY / "slurm/dask.yaml").read_text().replace("/shared/haloseg", str(home))
    (home / "config/haloseg.yaml").write_text(settings)
    environment = cluster.environment | {"DASK_CONFIG": str(home / "config"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, DEPLOY / "slurm/start_cluster.py", "--maximum", "3", "--port", str(free_port())]
    with (home / "logs/cluster.log").open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield process, environment, process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()
                process.stdout.close()


def test_a_cluster_of_jobs_grows_loses_one_and_ends_in_the_same_bytes(cluster, home, undisturbed):
    labels = home / "scan.zarr/labels/kept"
    with kept_cluster(cluster, home) as (process, environment, address):
        assert address.startswith("tls://"), (home / "logs/cluster.log").read_text()
        words = [BIN / "haloseg", "segment", home / "scan.zarr", "--model", MODEL, "--name", "kept"]
        with subprocess.Popen(
            [*words, "--cluster", address], env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=home,
        ) as run:  # fmt: skip
            until(lambda: len(shards(labels)) >= N_BEFORE or run.poll() is not None, what="the first shards")
            if run.poll() is None:
                cluster.told("scancel", "--full", "--signal=KILL", cluster.jobs()[0])
            told, _ = run.communicate(timeout=300)
        assert run.returncode == 0, told
        assert shards(labels) == undisturbed
    assert process.returncode == 0
    until(lambda: not cluster.jobs(), what="the workers' jobs end", seconds=60)
