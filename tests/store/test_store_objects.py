"""Everything that a run touches, on a server that speaks S3; see tests/objects.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import fsspec
import pytest
import zarr
from objects import KEY, SECRET, ask, digests, environment, new_bucket, upload
from volumes import model_file, scan_file

from pipeline.archive import Archive, State, survey
from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.identity import stamps
from pipeline.ingest import ingest, ingest_labels
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.labels import open_labels, published
from pipeline.store.lease import holder, lease
from pipeline.store.location import Location

SHAPE, N_BLOCKS = (16, 32, 48), 6
KILLED = """
import os, signal, sys
from pipeline.compute.runner import run_serial
from pipeline.compute.watch import Watcher
from pipeline.config import Scheme
from pipeline.plan import plan_segment
from pipeline.segment import segment

class Deadly(Watcher):
    left = 3
    def advance(self, record):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

image, model = sys.argv[1:]
plan = plan_segment(image, model=model, name="killed", scheme=Scheme(column=(1, 1, 1)))
segment(plan, run=run_serial, watch=Deadly())
"""


@pytest.fixture(scope="module")
def image(objects, tmp_path_factory):
    """Return an image in a bucket with the labels "whole", its scan on a disk, and a model in the bucket."""
    with pytest.MonkeyPatch.context() as user:
        for name, value in environment(objects).items():
            user.setenv(name, value)
        bucket, scan = new_bucket(objects), str(tmp_path_factory.mktemp("scans") / "scan.tif")
        scan_file(scan, SHAPE)
        model = model_file(f"{bucket}/models/m.safetensors")
        url = str(ingest(scan, f"{bucket}/scan.zarr", chunk=(16,), shard=(16,)).location)
        assert segment(plan_segment(url, model=model, name="whole"), run=run_serial).n_run == N_BLOCKS
        yield url, scan, model


def haloseg(capsys, *command):
    """Run a command and return its document."""
    code, told = main([*command, "--json"]), capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys, *command):
    """Run a command that is refused and return its line, and the exit code."""
    code, told = main([*map(str, command)]), capsys.readouterr()
    line, = told.err.strip().splitlines()
    assert "Traceback" not in line
    assert SECRET not in line
    return code, line


def test_every_command_works_in_a_bucket_and_gives_the_bytes_of_a_disk(image, tmp_path, capsys):
    url, scan, model = image
    local = str(ingest(scan, str(tmp_path / "scan.zarr"), chunk=(16,), shard=(16,)).location)
    segment(plan_segment(local, model=model, name="cells"), run=run_serial)
    command = ("segment", url, "--model", model, "--name", "cells")
    assert haloseg(capsys, *command, "--workers", "2", "--column", "1,1,1")["blocks_run"] == N_BLOCKS
    for part in ("0", "labels/cells/0"):
        assert digests(f"{url}/{part}") == digests(f"{local}/{part}")
    assert digests(f"{url}/labels/whole/0") == digests(f"{url}/labels/cells/0")
    assert {"cells", "whole"} <= set(haloseg(capsys, "info", url)["labels"])
    assert haloseg(capsys, "verify", url, "--name", "cells")["n_flipped_decided"] == 0
    figures = haloseg(capsys, "evaluate", f"{url}/labels/cells", f"{local}/labels/cells")
    assert [each["dice"] for each in figures["classes"]] == [1.0, 1.0]
    assert haloseg(capsys, *command)["blocks_run"] == 0


def test_a_killed_run_goes_on_to_the_same_bytes(image):
    url, _, model = image
    command = [sys.executable, "-c", KILLED, url, model]
    assert subprocess.run(command, check=False).returncode == -9
    assert "killed" not in published(Location(url) / "labels")
    plan = plan_segment(url, model=model, name="killed")
    n_kept = len(plan.done())
    assert 0 < n_kept < N_BLOCKS
    assert segment(plan, run=run_serial).n_run == N_BLOCKS - n_kept
    assert digests(f"{url}/labels/whole/0") == digests(f"{url}/labels/killed/0")
    assert "killed" in published(Location(url) / "labels")


def test_two_runs_that_publish_in_one_image_are_both_listed(image):
    url, _, _ = image
    begin = threading.Barrier(2)

    def run(name):
        begin.wait()
        while True:
            with lease(Location(url)) as taken:
                if taken:
                    ingest_labels(f"{url}/labels/whole/0", image=url, name=name)
                    return

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"one", "two"} <= set(published(Location(url) / "labels"))
    assert open_labels(f"{url}/labels/two").spatial_shape == SHAPE


def test_of_many_at_once_at_most_one_holds_a_lease_and_all_get_their_turn(bucket):
    place = Location(bucket) / "scan.zarr"
    begin, held, most, turns = threading.Barrier(3), [], [], []

    def work():
        begin.wait()
        while True:
            with lease(place) as taken:
                if taken:
                    held.append(1)
                    most.append(len(held))
                    assert holder(place)
                    held.pop()
                    turns.append(1)
                    return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(turns)) == (1, 3)
    assert list(Location(bucket).files()) == []


def test_a_lease_of_another_host_holds_until_it_lapses(bucket):
    place = Location(bucket) / "scan.zarr"
    other = Location(f"{place}.lease") / "x.json"
    other.write_bytes(json.dumps({"holder": "another host", "process": 1, "lapses": time.time() + 1e6}).encode())
    with lease(place) as taken:
        assert not taken
    assert holder(place) == "another host, process 1"
    other.write_bytes(json.dumps({"holder": "another host", "process": 1, "lapses": time.time() - 1}).encode())
    with lease(place) as taken:
        assert taken
    assert not other.exists()


def test_an_archive_in_a_bucket_tells_what_has_become_of_each_scan(image, tmp_path):
    url, _, model = image
    root = url.removesuffix("/scan.zarr")
    for name in ("new", "changed"):
        plain = zarr.create_array(str(tmp_path / name), shape=SHAPE, chunks=(16,) * 3, dtype="uint8")
        plain[:] = 7
        upload(tmp_path / name, f"{root}/deep/{name}.zarr")
    ingest(f"{root}/deep/changed.zarr", f"{root}/deep/changed.haloseg.zarr")
    was = stamps(f"{root}/deep/changed.zarr")
    plain.attrs["cut"] = True
    upload(tmp_path / "changed", f"{root}/deep/changed.zarr")
    assert was["n_bytes"] < stamps(f"{root}/deep/changed.zarr")["n_bytes"]
    upload(tmp_path / "changed", f"{root}/deep/new-truth.zarr")
    for name in ("slide.tif", "photo.png", "notes.txt"):
        (Location(root) / name).write_bytes(b"II*\0")
    archive = Archive(f"{root}/", model, name="whole", truth="{stem}-truth.zarr", settle_s=0)
    found = survey(archive)
    assert {each.relative: each.state for each in found.scans} == {
        "scan.zarr": State.DONE, "deep/new.zarr": State.NEW, "deep/changed.zarr": State.BLOCKED,
        "slide.tif": State.NEW, "photo.png": State.BLOCKED,
    }  # fmt: skip
    details = {each.relative: each.detail for each in found.scans}
    assert "the scan was changed after its image was made" in details["deep/changed.zarr"]
    one_file = f"a scan at a URL must be a Zarr, a TIFF or HDF5, got {root}/photo.png, which is another file; "
    assert details["photo.png"] == f"{one_file}copy it to a disk and ingest it from there"
    assert set(found.others) == {"notes.txt", "models/m.safetensors"}
    new, slide = found.todo
    assert (slide.image, slide.changed_s > 0) == (f"{root}/slide.zarr", True)
    assert (new.truth, new.image) == (f"{root}/deep/new-truth.zarr", f"{root}/deep/new.haloseg.zarr")
    assert new.changed_s > 0
    with lease(Location(new.image)):
        assert State.TAKEN in {each.state for each in survey(archive).scans}
    growing = Archive(root, model, pattern="deep/new.zarr", name="whole", settle_s=1e6)
    assert [each.state for each in survey(growing).scans] == [State.GROWING]
    images = Archive(root, model, pattern="deep/new.zarr", name="whole", settle_s=0, images=f"{root}/images")
    assert survey(images).scans[0].image == f"{root}/images/deep/new.haloseg.zarr"


def test_what_cannot_be_used_is_told_in_one_line(bucket, objects, tmp_path, capsys, monkeypatch):
    code, line = refused(capsys, "info", f"{bucket}/none.zarr")
    assert (code, line) == (2, f"haloseg: a scan must exist, got {bucket}/none.zarr; check the path")
    scan = tmp_path / "scan.tif"
    scan_file(scan, SHAPE)
    code, line = refused(capsys, "ingest", scan, "s3://haloseg-nowhere/scan.zarr")
    assert (code, line.partition("; ")[0]) == (2, f"haloseg: a bucket must exist, got 'haloseg-nowhere' at {objects}")
    assert "haloseg-nowhere" not in fsspec.filesystem("s3", use_listings_cache=False).ls("")  # nor made

    elsewhere = bucket.replace("haloseg-", "another-")  # a bucket that this process has not asked yet
    with monkeypatch.context() as wrong:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            wrong.delenv(name)
        wrong.setenv("AWS_EC2_METADATA_DISABLED", "true")
        wrong.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        code, line = refused(capsys, "info", f"{elsewhere}/x.zarr")
    assert code == 2
    assert "must let us in, got NoCredentialsError: Unable to locate credentials" in line
    ask(f"{objects}/moto-api/reset-auth", b"0", method="POST")
    try:
        code, line = refused(capsys, "info", f"{elsewhere}/x.zarr")
    finally:
        ask(f"{objects}/moto-api/reset-auth", b"inf", method="POST")
    assert code == 2
    assert "must let us in, got PermissionError: The AWS Access Key Id you provided does not exist" in line
    assert KEY not in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    code, line = refused(capsys, "segment", f"{elsewhere}/x.zarr", "--model", "m.safetensors", "--name", "x")
    assert code == 1
    assert "an object store must answer, got EndpointConnectionError" in line
    assert line.endswith("mend AWS_ENDPOINT_URL or the network, and run the same command again")

