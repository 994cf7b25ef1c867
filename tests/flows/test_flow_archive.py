from __future__ import annotations

import os
import time

import pytest
from prefect.artifacts import Artifact
from volumes import model_file, scan_file

from flows.archive import segment_archive
from flows.showing import slug
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


def rows(folder, name="classes"):
    table = Artifact.get(key=f"archive-{slug(str(folder))}-{name}").data
    return {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}


def test_an_archive_is_segmented_scan_by_scan_and_a_second_run_does_nothing(server, archive):
    with lease(Location(str(archive / "c.zarr"))):
        state = run(archive, name="cells")
    assert (state.name, state.is_completed()) == ("Done with failures", True)
    assert state.message.startswith("5 scans: 2 published, 1 failed, 1 growing, 1 taken")
    told = rows(archive, "cells")
    assert "](/runs/flow-run/" in told["a.tif"]
    assert "| 3,200 |" in told["a.tif"]
    assert "| a.zarr/labels/cells |" in told["a.tif"]
    assert "a scan must be whole and decodable" in told["bad.tif"]
    assert "changed" in told["growing.tif"]
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
    assert "published" in rows(archive)["c.tif"]
    state = run(archive, budget_hours=1e-9)
    assert state.message.startswith("4 scans: 3 waiting, 1 done")
    assert "the hours of this run are over" in rows(archive)["a.tif"]


def test_an_archive_that_is_not_there_fails_in_one_line(server, archive):
    state = run(archive / "nowhere")
    assert state.is_failed()
    assert state.message.startswith("an archive must be a folder or prefix that exists, got ")
