"""Blocks that were run again are told in the report, in the archive's table, and beside those that failed for good."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from itertools import count

import numpy as np
from flow_runners import Here, shared
from prefect.artifacts import Artifact
from volumes import model_file, scan_file

from flows.archive import segment_archive
from flows.reports import plain
from flows.segment import segment_scan
from flows.showing import key_of, slug


def test_a_report_tells_which_blocks_were_run_again_and_why(server, tmp_path):
    scan_file(tmp_path / "scan.tif", (8, 40, 40))
    scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
    model = str(model_file(tmp_path / "model.safetensors"))

    def page(name, kind):
        return Artifact.get(key=key_of(image, name, kind)).data

    with shared(Here(attempts={0: 3})):
        result, _ = segment_scan(scan, image, model, name="flaky", shard=(16,))
    assert result.retries.n_blocks
    assert result.retries.by_cause == (("ValueError: a flake", 2 * 2),)  # of the labels, and of the certificate
    assert f"- **blocks retried**: {result.retries.told}\n" in page("flaky", "report")
    assert f"| blocks retried | {result.retries.n_blocks} |" in page("flaky", "report")
    with shared(Here()):
        result, _ = segment_scan(scan, image, model, name="sound", shard=(16,))
    assert result.retries.told == ""
    assert "| blocks retried | 0 |" in page("sound", "report")
    assert "**blocks retried**" not in page("sound", "report")
    with shared(Here(attempts={0: 4, 1: 3})):
        state = segment_scan(scan, image, model, name="bad", shard=(16,), return_state=True)
    assert state.is_failed()
    assert "- **block 0**: ValueError: a flake\n" in page("bad", "failure")
    assert "- **blocks retried**: " in page("bad", "failure")


def test_blocks_that_were_copied_again_are_told_too(server, tmp_path, monkeypatch):
    scan_file(tmp_path / "scan.tif", (8, 40, 40))
    scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
    model, calls, mapped = str(model_file(tmp_path / "model.safetensors")), count(), np.memmap

    def flaky(*args, **kwargs):
        if next(calls) in (1, 2):
            raise OSError(errno.EIO, "Input/output error")
        return mapped(*args, **kwargs)

    monkeypatch.setattr(np, "memmap", flaky)  # a disk that fails twice
    with shared(Here(attempts={0: 2})):
        result, _ = segment_scan(scan, image, model, name="copied", shard=(16,))
    assert ("ingest: OSError: [Errno 5] Input/output error", 2) in result.retries.by_cause
    page = Artifact.get(key=key_of(image, "copied", "report")).data
    assert f"- **blocks retried**: {plain(result.retries.told)}\n" in page
    assert "ingest: OSError" in page
    assert "ValueError: a flake" in page


def test_the_table_of_an_archive_tells_it_too(server, tmp_path, monkeypatch):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.tif", "b.tif"):
        scan_file(folder / name, (8, 20, 20))
    monkeypatch.setattr("flows.archive.open_runner", lambda **_: nullcontext(Here(attempts={0: 3})))
    model = str(model_file(tmp_path / "model.safetensors"))
    state = segment_archive(str(folder), model, settle_s=0, limit=1, return_state=True)
    assert state.message.startswith("2 scans: 1 new, 1 published")
    page = Artifact.get(key=f"archive-{slug(str(folder))}-classes").data
    assert page.count("blocks retried: ") == 1
    assert "**: blocks retried: " in page.partition("## Causes")[2]
    assert "ValueError: a flake (" in page
