import base64
import re

import imagecodecs
import pytest

pytest.importorskip("prefect")

from prefect.artifacts import Artifact
from prefect.testing.utilities import prefect_test_harness
from volumes import model_file, scan_file

from flows.segment import segment_scan


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


def test_a_scan_goes_from_ingest_to_report_and_a_second_run_does_nothing(server, tmp_path):
    voxels = scan_file(tmp_path / "scan.tif", (20, 40, 50))
    model = model_file(tmp_path / "model.safetensors")
    settings = {"model": model, "name": "cells", "workers": 2}
    result, figures = segment_scan(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **settings)
    assert (result.n_voxels, result.n_run) == (voxels.size, result.n_blocks)
    assert figures is None
    again, _ = segment_scan(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **settings)
    assert again.n_run == 0
    progress, report = Artifact.get(key="segment"), Artifact.get(key="report")
    assert progress.data == 100.0
    assert "| voxels | 40,000 |" in report.data
    png = base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", report.data)[1])
    assert imagecodecs.png_decode(png).shape == (40 * 10, (2 * 50 + 8) * 10, 3)
