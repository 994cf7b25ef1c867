"""Hosts: large copies go to processes of this machine, small ones and what needs a device stay where they are."""

import os
from itertools import count

import numpy as np
import pytest
import tifffile
from volumes import tree_digest

from pipeline.compute import hosts
from pipeline.compute.hosts import here
from pipeline.compute.runner import BlockRecord
from pipeline.geometry.grid import BlockGrid
from pipeline.ingest import ingest
from pipeline.store.image import open_image


class Pids:
    """Tells in which process each block ran."""

    def __init__(self, *, uses_device):
        self.uses_device, self.grid = uses_device, BlockGrid((40,), (10,))

    def setup(self):
        return None

    def run(self, state, index):
        del state
        return BlockRecord(index, os.getpid(), 0.0, 0.0, 0.0)


def pids(run, work):
    seen = []
    assert run(work, iter(range(4)), on_record=lambda record: seen.append((record.index, record.n_voxels))) == ()
    assert sorted(index for index, _ in seen) == [0, 1, 2, 3]
    return {pid for _, pid in seen}


@pytest.mark.parametrize("worth", [1, 41])
def test_processes_are_started_where_they_are_worth_it_once_and_for_copies_alone(monkeypatch, worth):
    monkeypatch.setattr(hosts, "WORTH_A_HOST", worth)
    monkeypatch.setattr(hosts, "CPU_COUNT", 2)
    own, copies = {os.getpid()}, Pids(uses_device=False)
    with here() as run:
        assert pids(run, Pids(uses_device=True)) == own
        first = pids(run, copies)
        again = pids(run, copies)
        with here() as another:  # of a scan beside it in the same process
            assert worth > 40 or pids(another, copies) == own
    assert (first == own) == (worth > 40)
    if worth <= 40:
        assert own.isdisjoint(first | again)
        assert len(first | again) <= 2
    assert not hosts._IN_USE.locked()


def test_an_image_made_by_processes_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "CPU_COUNT", 2)
    tifffile.imwrite(tmp_path / "scan.tif", np.random.default_rng(0).integers(0, 255, (40, 90, 70), np.uint8))
    numbers = count()

    def made(**how):
        return ingest(str(tmp_path / "scan.tif"), str(tmp_path / f"{next(numbers)}.zarr"), shard=(16, 32, 32), **how)

    alone = made()
    monkeypatch.setattr(hosts, "WORTH_A_HOST", 2**14)
    with here() as run:
        shared = made(run=run)
    digests = [tree_digest(each.location.url, without=("zarr.json",)) for each in (alone, shared)]  # names differ
    assert digests[0] == digests[1]
    assert open_image(shared.location).statistics == alone.statistics
