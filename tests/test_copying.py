"""Copying: shards that share what can be read only whole are copied in one process, and fail one by one."""

import numpy as np
import pytest
import tifffile
from volumes import tree_digest

from pipeline import copying
from pipeline.compute.runner import run_serial
from pipeline.copying import IngestBlocks
from pipeline.errors import QuarantineError
from pipeline.ingest import ingest

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
