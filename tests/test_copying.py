"""Copying: shards that share what can be read only whole are copied in one process, and fail one by one."""

from threading import Event

import h5py
import numpy as np
import pytest
import tifffile
from volumes import tree_digest

from pipeline import copying
from pipeline.compute.hosts import here
from pipeline.compute.runner import run_serial
from pipeline.copying import IngestBlocks
from pipeline.errors import GivenUpError, QuarantineError
from pipeline.ingest import ingest
from pipeline.scans.cache import DECODED

VOXELS = np.random.default_rng(0).integers(0, 255, (20, 70, 60), np.uint8)
SHARD = {"shard": (8, 16, 32), "chunk": (8, 16, 16)}


class Recorded:
    """Runs blocks here, and tells how many shards each piece of a copy was."""

    def __init__(self):
        self.sizes = []

    def __call__(self, work, indices, *, on_record):
        def heard(record):
            if isinstance(work, IngestBlocks):
                self.sizes.append(record.n_blocks)
            on_record(record)

        return run_serial(work, indices, on_record=heard)


@pytest.mark.parametrize(("options", "sizes"), [
    ({"compression": "zlib", "rowsperstrip": 70}, [10] * 3),  # a page is one strip
    ({"compression": "zlib", "rowsperstrip": 16}, [2] * 15),  # a strip is as high as a shard
    ({"compression": "zlib", "tile": (16, 16)}, [1] * 30),
    ({"compression": "zlib", "tile": (48, 16)}, [3, 3, 2, 2] * 3),
])  # fmt: skip
def test_shards_that_share_what_is_read_whole_are_one_piece_of_work(tmp_path, options, sizes):
    tifffile.imwrite(tmp_path / "scan.tif", VOXELS, photometric="minisblack", **options)
    run = Recorded()
    image = ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), run=run, **SHARD)
    assert run.sizes == sizes
    np.testing.assert_array_equal(image.array[:], VOXELS[None])


@pytest.mark.parametrize("name", ["scan.tif", "scan.npy", "scan.h5"])
def test_what_can_be_read_in_parts_is_copied_in_parts(tmp_path, name):
    voxels = np.broadcast_to(np.arange(300, dtype=np.uint16), (2, 6, 300))
    if name == "scan.tif":
        tifffile.imwrite(tmp_path / name, voxels, photometric="minisblack")
    elif name == "scan.npy":
        np.save(tmp_path / name, voxels)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["volume"] = voxels
    run = Recorded()
    ingest(str(tmp_path / name), str(tmp_path / "scan.zarr"), run=run, shard=(2, 6, 128), chunk=(2, 6, 64))
    assert run.sizes == [1] * 3


def test_a_copy_that_is_given_up_ends_within_a_group_and_the_next_one_goes_on(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "scan.tif", VOXELS, photometric="minisblack", compression="zlib", rowsperstrip=70)
    given_up, write, written = Event(), copying.write_shard, []

    def counted(array, core, voxels, *, location):
        written.append(core)
        write(array, core, voxels, location=location)
        if len(written) == 3:
            given_up.set()

    monkeypatch.setattr(copying, "write_shard", counted)
    with pytest.raises(GivenUpError), here(given_up=given_up) as run:
        ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), run=run, **SHARD)
    assert len(written) == 3
    image = ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **SHARD)
    assert len(written) == 30
    np.testing.assert_array_equal(image.array[:], VOXELS[None])


def test_what_was_decoded_is_let_go_of_with_the_copy(tmp_path):
    tifffile.imwrite(tmp_path / "scan.tif", VOXELS, photometric="minisblack", compression="zlib", tile=(16, 16))
    ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **SHARD)
    assert DECODED.n_bytes == 0


def test_of_a_group_that_fails_the_other_shards_are_copied_and_a_rerun_does_that_one_alone(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "scan.tif", VOXELS, photometric="minisblack", compression="zlib", rowsperstrip=70)
    made = ingest(str(tmp_path / "scan.tif"), str(tmp_path / "whole" / "scan.zarr"), **SHARD)
    write = copying.write_shard

    def failing(array, core, voxels, *, location):
        if core.start == (8, 32, 32):
            raise ValueError("no such luck")
        write(array, core, voxels, location=location)

    monkeypatch.setattr(copying, "write_shard", failing)
    with pytest.raises(QuarantineError, match=r"got 1 that failed in .*, block 15 with: ValueError: no such luck"):
        ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **SHARD)
    monkeypatch.undo()
    run = Recorded()
    image = ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), run=run, **SHARD)
    assert run.sizes == [1]
    assert tree_digest(image.location.url) == tree_digest(made.location.url)
