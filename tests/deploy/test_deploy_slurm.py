"""Slurm: the batch script for real, with an srun that starts one task here; dask-jobqueue's settings where it is."""

import os
import re
import stat
import subprocess
import sys

import dask
import psutil
import pytest
import tifffile
from deploy_files import BIN, DEPLOY, ROOT, load, until
from distributed import Security

from pipeline.ingest import ingest
from pipeline.store.labels import open_labels

SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 3
shift
exec "$@"
"""


def is_of(folder, process):
    return (process.info["environ"] or {}).get("HALOSEG_SHARED") == str(folder)


def test_the_batch_script_segments_an_image_over_tls_and_leaves_nothing_running(tmp_path):
    voxels = tifffile.imread(ROOT / "pipeline/demo/scan.tif")[:8, :32, :32]
    tifffile.imwrite(tmp_path / "scan.tif", voxels, photometric="minisblack")
    ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), shard=(64,))
    subprocess.run([DEPLOY / "make-certificates.sh", tmp_path / "certificates"], check=True, capture_output=True)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/bin").symlink_to(BIN)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(stat.S_IRWXU)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HALOSEG_SHARED": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
        "DASK_LOGGING__DISTRIBUTED": "info",
    }  # fmt: skip
    words = [DEPLOY / "slurm/segment.sbatch", tmp_path / "scan.zarr", ROOT / "pipeline/demo/model.safetensors", "cells"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert open_labels(str(tmp_path / "scan.zarr/labels/cells")).spatial_shape == (8, 32, 32)
    assert "tls://" in done.stderr
    assert "tcp://" not in done.stderr
    until(lambda: not [each for each in psutil.process_iter(["environ"]) if is_of(tmp_path, each)], what="all end")


def test_the_batch_script_gives_each_task_one_gpu():
    text = (DEPLOY / "slurm/segment.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert directives["gpus-per-task"] == "1"
    assert {"time", "partition", "cpus-per-task", "ntasks-per-node"} <= set(directives)
    assert text.index("#SBATCH") < text.index("set -e")  # Slurm reads none after the first command


def test_a_job_of_dask_jobqueue_is_a_worker_with_one_gpu_over_tls():
    slurm = pytest.importorskip("dask_jobqueue.slurm", reason="needs dask-jobqueue")
    with dask.config.set(dask.config.merge(dask.config.config, load("slurm/dask.yaml"))):
        job = slurm.SLURMJob(scheduler="tls://login:8786", name="w", security=Security(), protocol="tls://")
        script = job.job_script()
    assert "#SBATCH --gres=gpu:1" in script
    command = script.strip().splitlines()[-1]
    assert command.startswith("/shared/haloseg/venv/bin/python -m distributed.cli.dask_worker tls://login:8786")
    for words in ("--nthreads 1 ", "--resources GPU=1", "--tls-ca-file /shared/haloseg/certificates/ca.pem"):
        assert words in command


def test_settings_of_dask_are_ones_that_dask_knows():
    known = dask.config.get("distributed.comm")
    comm = load("slurm/dask.yaml")["distributed"]["comm"]
    assert set(comm) <= set(known)
    assert set(comm["tls"]) <= set(known["tls"])
    names = re.findall(r"/certificates/([\w-]+\.pem)", (DEPLOY / "slurm/dask.yaml").read_text())
    assert set(names) == {"ca.pem", "dask.pem", "dask-key.pem"}


def test_the_program_that_keeps_the_cluster_says_how_it_is_used():
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue")
    done = subprocess.run(
        [sys.executable, DEPLOY / "slurm/start_cluster.py", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--maximum" in done.stdout
