from __future__ import annotations

import pytest
import zarr
from objects import KEY, SECRET, upload
from prefect.artifacts import Artifact
from volumes import model_file, scan_file

from flows.archive import segment_archive
from flows.showing import key_of, slug
from pipeline.ingest import ingest
from pipeline.store.labels import published
from pipeline.store.lease import lease
from pipeline.store.location import Location

SHAPE = (8, 20, 20)


@pytest.fixture
def archive(bucket, tmp_path, monkeypatch):
    """Return an archive in a bucket: a Zarr with its truth, an image of ours, a damaged Zarr, a TIFF and a picture."""
    root = f"{bucket}/archive"
    for name, value in (("a", 7), ("a-truth", 0)):
        zarr.create_array(str(tmp_path / name), shape=SHAPE, chunks=SHAPE, dtype="uint8")[:] = value
        upload(tmp_path / name, f"{root}/{name}.zarr")
    ingest(f"{root}/a.zarr", f"{root}/ours.zarr")
    (Location(root) / "bad.zarr" / "zarr.json").write_bytes(b"{")
    scan_file(tmp_path / "slide.tif", SHAPE)
    for name in ("slide.tif", "photo.png"):
        (Location(root) / name).write_bytes((tmp_path / "slide.tif").read_bytes())
    model_file(f"{bucket}/models/m.safetensors")
    monkeypatch.setenv("HALOSEG_ROOTS", f"{root},{bucket}/models")
    return root


def run(root, **settings):
    model = f"{root.partition('/archive')[0]}/models/m.safetensors"
    settings = {"truth": "{stem}-truth.zarr", "settle_s": 0, "workers": 1} | settings
    return segment_archive(root, model, return_state=True, **settings)


def test_an_archive_in_a_bucket_is_segmented_once_and_its_secrets_are_kept(server, archive, caplog):
    assert run(archive, settle_s=1e6).message.startswith("5 scans: 4 growing, 1 blocked")
    with lease(Location(archive) / "ours.zarr"):
        state = run(f"{archive}/")
    assert state.message.startswith("5 scans: 2 published, 1 blocked, 1 failed, 1 taken")
    page = Artifact.get(key=f"archive-{slug(f'{archive}/')}-classes").data
    assert "| a.haloseg.zarr/labels/classes |" in page
    assert "- **bad.zarr**: a scan must be whole and decodable, got " in page
    assert "| slide.zarr/labels/classes |" in page
    assert f"- **photo.png**: a scan at a URL must be a Zarr, a TIFF or HDF5, got {archive}/photo.png, " in page
    report = Artifact.get(key=key_of(f"{archive}/a.haloseg.zarr", "classes", "report")).data
    assert "| accuracy |" in report

    Location(f"{archive}/bad.zarr").delete()
    assert run(archive).message.startswith("4 scans: 2 done, 1 blocked, 1 published")
    state = run(archive)
    assert state.message.startswith("4 scans: 3 done, 1 blocked")
    assert published(Location(archive) / "ours.zarr" / "labels") == ["classes"]
    written = (Location(archive) / "ours.zarr" / "labels" / "classes" / "zarr.json").read_bytes().decode()
    for text in (page, report, written, caplog.text, state.message):
        assert not {word for word in (KEY, SECRET) if word in text}
    assert not [name for name in Location(archive).files() if ".lease" in name]

    state = run(f"{archive}-of-others")
    assert state.is_failed()
    assert state.message.startswith("a path must lie in HALOSEG_ROOTS")
