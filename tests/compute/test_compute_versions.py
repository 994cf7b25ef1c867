"""Workers that have another version than the flow, on a real scheduler."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from clusters import processes

import pipeline
from pipeline.compute.cluster import open_runner
from pipeline.compute.versions import installed
from pipeline.errors import ClusterError

HERE = Path(pipeline.__file__).parent


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
