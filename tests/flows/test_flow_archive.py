from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from prefect.artifacts import Artifact
from volumes import model_file, scan_file

from flows.archive import segment_archive
from flows.showing import key_of, slug
from pipeline.compute.runner import run_serial
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.labels import open_labels
from pipeline.store.lease import lease
from pipeline.store.location import Location


def aged(path, seconds=600.0):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.tif", "b.tif", "c.tif"):
        scan_file(folder / name, (8, 20, 20))
        aged(folder / name)
    (folder / "bad.tif").write_bytes(b"II*\0 no scan")
    aged(folder / "bad.tif")
    scan_file(folder / "growing.tif", (8, 20, 20))
    model_file(tmp_path / "model.safetensors")
    return folder


def run(folder, **settings):
    return segment_archive(str(folder), str(folder.parent / "model.safetensors"), return_state=True, **settings)


def table(folder, name="classes"):
    """Return the rows of the table by scan, and the causes by scan."""
    lines = Artifact.get(key=f"archive-{slug(str(folder))}-{name}").data.splitlines()
    causes = dict(line.removeprefix("- **").split("**: ", 1) for line in lines if line.startswith("- **"))
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}, causes


def test_an_archive_is_segmented_scan_by_scan_and_a_second_run_does_nothing(server, archive):
    with lease(Location(str(archive / "c.zarr"))):
        state = run(archive, name="cells")
    assert (state.name, state.is_completed()) == ("Done with failures", True)
    assert state.message.startswith("5 scans: 2 published, 1 failed, 1 growing, 1 taken")
    told, causes = table(archive, "cells")
    assert "](/runs/flow-run/" in told["a.tif"]
    assert "| 3,200 |" in told["a.tif"]
    assert told["a.tif"].endswith("| a.zarr/labels/cells |")
    assert told["bad.tif"].startswith("| bad.tif | failed |")
    assert "a scan must be whole and decodable" in causes["bad.tif"]
    assert "changed" in causes["growing.tif"]
    assert set(causes) == {"bad.tif", "growing.tif", "c.tif"}
    assert not (archive / "c.zarr").exists()

    (archive / "bad.tif").unlink()
    aged(archive / "growing.tif")
    before = {name: (archive / name / "labels" / "zarr.json").stat().st_mtime_ns for name in ("a.zarr", "b.zarr")}
    state = run(archive, name="cells")
    assert (state.name, state.message.partition(";")[0]) == ("Completed", "4 scans: 2 done, 2 published")
    begin = time.monotonic()
    state = run(archive, name="cells")
    assert state.message.startswith("4 scans: 4 done")
    assert time.monotonic() - begin < 10
    assert before == {name: (archive / name / "labels" / "zarr.json").stat().st_mtime_ns for name in before}
    for name in ("a", "b", "c", "growing"):
        assert open_labels(Location(str(archive / f"{name}.zarr")) / "labels" / "cells").spatial_shape == (8, 20, 20)
    assert [each.name for each in archive.iterdir() if each.name.endswith(".lease")] == []


def test_limit_and_hours_leave_the_rest_for_the_next_run(server, archive):
    (archive / "bad.tif").unlink()
    aged(archive / "growing.tif")
    state = run(archive, limit=1, priority=["c*"])
    assert state.message.startswith("4 scans: 3 new, 1 published")
    assert "published" in table(archive)[0]["c.tif"]
    state = run(archive, budget_hours=1e-9)
    assert state.message.startswith("4 scans: 3 waiting, 1 done")
    assert "the hours of this run are over" in table(archive)[1]["a.tif"]


def test_a_report_that_a_killed_run_did_not_make_is_made_by_the_next_one(server, archive):
    scan, image = str(archive / "a.tif"), str(archive / "a.zarr")
    ingest(scan, image)
    plan = plan_segment(image, model=str(archive.parent / "model.safetensors"), name="due")
    segment(replace(plan, result=replace(plan.result, report_due=True)), run=run_serial)
    shutil.copytree(archive / "a.zarr" / "labels" / "due" / "0", archive / "truth.zarr")
    before = {each: each.stat().st_mtime_ns for each in (archive / "a.zarr").rglob("c/**/*") if each.is_file()}
    assert Artifact.get(key=key_of(image, "due", "report")) is None
    state = run(archive, name="due", pattern="a.tif", truth="truth.zarr")
    assert state.message.startswith("1 scans: 1 published")
    report = Artifact.get(key=key_of(image, "due", "report"))
    assert "of which 0 were run now" in report.data
    assert "| accuracy | 1.0000 |" in report.data
    assert before == {each: each.stat().st_mtime_ns for each in before}
    assert run(archive, name="due", pattern="a.tif", truth="truth.zarr").message.startswith("1 scans: 1 done")


def test_an_archive_that_is_not_there_fails_in_one_line(server, archive):
    state = run(archive / "nowhere")
    assert state.is_failed()
    assert state.message.startswith("an archive must be a folder or prefix that exists, got ")


def test_what_nobody_has_labelled_in_the_truth_does_not_count(server, archive):
    truth = np.full((8, 20, 20), 255, np.uint8)
    truth[:2] = 0
    np.save(archive / "a-truth.npy", truth)
    for ignore, told in ((255, "| voxels of the truth that do not count | 2,400 |"), (None, "- **not evaluated**: ")):
        name = f"ignored-{ignore}".lower()
        state = run(archive, name=name, pattern="a.tif", truth="{stem}-truth.npy", ignore=ignore)
        assert state.message.startswith("1 scans: 1 published")
        report = Artifact.get(key=key_of(str(archive / "a.zarr"), name, "report")).data
        assert told in report
        assert ("| accuracy | " in report) is bool(ignore)
