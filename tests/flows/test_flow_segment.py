from __future__ import annotations

import base64
import re
import socket

import imagecodecs
import numpy as np
import pytest
from instances import whole
from prefect.artifacts import Artifact
from volumes import model_file, scan_file

from flows.archive import segment_archive
from flows.ingest import ingest_scan
from flows.segment import segment_scan
from flows.showing import key_of
from pipeline.errors import ArgumentError, ScanError, TakenError
from pipeline.store.labels import open_labels
from pipeline.store.lease import lease
from pipeline.store.location import Location
from pipeline.unet.settings import Head, Padding, UNetSettings


def test_a_scan_goes_from_ingest_to_report_and_a_second_run_does_nothing(server, tmp_path):
    voxels = scan_file(tmp_path / "scan.tif", (20, 40, 50))
    model = model_file(tmp_path / "model.safetensors")
    settings = {"model": model, "name": "cells", "workers": 2, "precision": "bf16", "tta": "flips"}
    result, figures = segment_scan(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **settings)
    assert (result.n_voxels, result.n_run) == (voxels.size, result.n_blocks)
    assert figures is None
    assert (result.labels.fingerprint["precision"], result.labels.fingerprint["tta"]) == ("bf16", "flips")

    def about(stem, *parts):
        return Artifact.get(key=key_of(str(tmp_path / f"{stem}.zarr"), *parts))

    progress, report = about("scan", "cells", "segment"), about("scan", "cells", "report")
    assert progress.data == 100.0
    assert re.fullmatch(r"segment: (\d+) of \1 blocks, \S+ voxels/s, took \d+ s", progress.description)
    again, _ = segment_scan(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **settings)
    assert again.n_run == 0
    assert "| test-time augmentation | flips, 8 passes |" in about("scan", "cells", "plan").data
    assert f"| blocks | {again.n_blocks}, of which 0 are to be done |" in about("scan", "cells", "plan").data
    assert "| voxels | 40,000 |" in report.data
    png = base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", report.data)[1])
    assert imagecodecs.png_decode(png).shape == (40 * 10, (2 * 50 + 8) * 10, 3)


def test_what_a_network_without_classes_predicts_is_compared_and_shown(server, tmp_path):
    scan_file(tmp_path / "noisy.tif", (8, 16, 20))
    settings = UNetSettings(
        dims=3, width=2, depth=1, padding=Padding.SAME, n_convs=1, n_classes=1, head=Head.LINEAR
    )
    model = str(model_file(tmp_path / "linear.safetensors", settings, target_windows=((128.0, 0.1),)))
    scan, image = str(tmp_path / "noisy.tif"), str(tmp_path / "noisy.zarr")
    result, figures = segment_scan(scan, image, model, name="clean", truth=scan, workers=1)
    assert str(result.result.location) == f"{image}/predictions/clean"
    report = Artifact.get(key=key_of(image, "clean", "report"))
    assert f"- **prediction**: `{image}/predictions/clean`\n" in report.data
    assert f"| PSNR | {figures.figures.psnr_db:.2f} dB |" in report.data
    assert "values differ by at most" in report.data
    png = base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", report.data)[1])
    assert imagecodecs.png_decode(png).shape[1] == (2 * 20 + 8) * 25


def test_objects_get_an_id_each_where_that_is_asked_for(server, tmp_path):
    scan_file(tmp_path / "scan.tif", (40, 50))
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1)
    model = str(model_file(tmp_path / "model.safetensors", settings))
    scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
    result, _ = segment_scan(scan, image, model, name="cells", instances="nuclei", workers=1)
    classes = open_labels(str(result.result.location)).array[:]
    np.testing.assert_array_equal(open_labels(f"{image}/labels/nuclei").array[:], whole(classes, (1,)))
    assert Artifact.get(key=key_of(image, "nuclei", "instances")).data == 100.0
    state = segment_scan(scan, image, model, name="cells", instances="cells", return_state=True)
    assert state.message == "instances need a name of their own, got cells for both; choose another"


def test_what_is_wrong_is_the_state_of_the_run_in_one_line(server, tmp_path, caplog):
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no scan")
    model = str(model_file(tmp_path / "model.safetensors"))
    state = segment_scan(str(tmp_path / "bad.tif"), str(tmp_path / "bad.zarr"), model, return_state=True)
    assert state.is_failed()
    assert isinstance(state.result(raise_on_failure=False), ScanError)
    assert state.message.startswith("a scan must be whole and decodable, got ")
    assert "Traceback" not in caplog.text
    assert "a scan must be whole" in Artifact.get(key=key_of(str(tmp_path / "bad.zarr"), "classes", "failure")).data


def test_a_truth_that_cannot_be_compared_with_is_told_and_fails_nothing(server, tmp_path):
    scan_file(tmp_path / "scan.tif", (8, 16, 16))
    scan_file(tmp_path / "truth.tif", (8, 16, 12))
    model = str(model_file(tmp_path / "model.safetensors"))
    state = segment_scan(
        str(tmp_path / "scan.tif"), str(tmp_path / "other.zarr"), model, truth=str(tmp_path / "truth.tif"),
        return_state=True,
    )  # fmt: skip
    assert state.is_completed()
    assert "- **not evaluated**: predicted labels and truth must have one shape" in Artifact.get(
        key=key_of(str(tmp_path / "other.zarr"), "classes", "report")
    ).data


def test_a_scan_is_worked_on_by_one_run_at_a_time(server, tmp_path):
    scan_file(tmp_path / "scan.tif", (8, 16, 16))
    image, model = tmp_path / "scan.zarr", str(model_file(tmp_path / "model.safetensors"))
    with lease(Location(str(image))):
        scan = str(tmp_path / "scan.tif")
        for state in (
            segment_scan(scan, str(image), model, return_state=True), ingest_scan(scan, str(image), return_state=True),
        ):  # fmt: skip
            assert isinstance(state.result(raise_on_failure=False), TakenError)
    assert not image.exists()


def test_paths_outside_the_roots_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HALOSEG_ROOTS", str(tmp_path / "in"))
    scan_file(tmp_path / "scan.tif", (8, 16, 16))
    state = ingest_scan(str(tmp_path / "scan.tif"), str(tmp_path / "in" / "scan.zarr"), return_state=True)
    with pytest.raises(ArgumentError, match="a path must lie in HALOSEG_ROOTS"):
        state.result()


def test_a_cluster_that_is_not_the_services_is_refused_before_anything_is_sent(server, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        theirs.settimeout(0)
        address = f"tcp://127.0.0.1:{theirs.getsockname()[1]}"
        monkeypatch.setenv("HALOSEG_CLUSTERS", "tls://dask-scheduler:8786")
        scan_file(tmp_path / "scan.tif", (8, 16, 16))
        model = str(model_file(tmp_path / "model.safetensors"))
        scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
        for state in (
            segment_scan(scan, image, model, cluster=address, return_state=True),
            segment_archive(str(tmp_path), model, cluster=address, settle_s=0, return_state=True),
        ):
            assert state.is_failed()
            assert state.message.startswith("cluster must be in HALOSEG_CLUSTERS (tls://dask-scheduler:8786), got ")
        with pytest.raises(BlockingIOError):
            theirs.accept()
    assert not (tmp_path / "scan.zarr").exists()


def test_a_path_with_credentials_is_on_no_page(server, tmp_path):
    image, model = str(tmp_path / "scan.zarr"), str(model_file(tmp_path / "model.safetensors"))
    state = segment_scan("s3://name:secret@bucket/scan.zarr", image, model, return_state=True)
    assert isinstance(state.result(raise_on_failure=False), ArgumentError)
    assert "secret" not in state.message
    assert Artifact.get(key=key_of(image, "classes", "failure")) is None
