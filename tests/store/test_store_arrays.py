import os
import pickle

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.grid import BlockGrid
from pipeline.store.arrays import Layout, create_array, done_shards, open_array, plan_layout, sweep, write_shard
from pipeline.store.location import Location
from pipeline.store.reading import chunk_cache, open_voxels


def tensorstore_read(location):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(location)}}
    return tensorstore.open(spec).result().read().result()


@pytest.mark.parametrize("shape", [(1, 100, 130), (2, 40, 70, 33)])
def test_shards_written_one_by_one_are_read_back_by_tensorstore(tmp_path, shape):
    location = Location(str(tmp_path / "0"))
    layout = Layout((16,) * (len(shape) - 1), (32,) * (len(shape) - 1))
    voxels = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
    create_array(location, shape=shape, dtype=np.uint16, layout=layout, axes=tuple("czyx"[-len(shape) :]))
    array = open_array(location)
    grid = BlockGrid(shape[1:], layout.shard)
    for block in grid:
        assert block.index not in done_shards(location, grid)
        write_shard(array, block.core, voxels[(slice(None), *block.core.slices)], location=location)
        assert block.index in done_shards(location, grid)
    np.testing.assert_array_equal(tensorstore_read(location), voxels)


def test_a_shard_of_zeros_is_stored_since_what_exists_is_done(tmp_path):
    location = Location(str(tmp_path / "0"))
    create_array(location, shape=(64, 64), dtype=np.uint8, layout=Layout((16, 16), (32, 32)), axes=("y", "x"))
    grid = BlockGrid((64, 64), (32, 32))
    write_shard(open_array(location), grid.block(2).core, np.zeros((32, 32), np.uint8), location=location)
    assert done_shards(location, grid) == {2}


def test_a_shard_is_on_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    location, whole = Location(str(tmp_path / "0")), tmp_path / "0" / "c" / "1" / "0"
    create_array(location, shape=(64, 64), dtype=np.uint8, layout=Layout((16, 16), (32, 32)), axes=("y", "x"))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, whole.exists())))
    core = BlockGrid((64, 64), (32, 32)).block(2).core
    voxels = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    write_shard(open_array(location), core, voxels, location=location)
    assert synced == [(whole.stat().st_size, False)]


def test_a_damaged_shard_is_replaced(tmp_path):
    location = Location(str(tmp_path / "0"))
    create_array(location, shape=(40, 64), dtype=np.uint8, layout=Layout((16, 16), (32, 32)), axes=("y", "x"))
    grid = BlockGrid((40, 64), (32, 32))
    for block in grid:
        (tmp_path / "0" / "c" / str(block.position[0])).mkdir(parents=True, exist_ok=True)
        (tmp_path / "0" / "c" / str(block.position[0]) / str(block.position[1])).write_bytes(b"garbage")
        write_shard(open_array(location), block.core, np.full(block.core.shape, 7, np.uint8), location=location)
    assert (open_array(location)[:] == 7).all()


def test_a_flipped_byte_is_found_and_not_read(tmp_path):
    location = Location(str(tmp_path / "0"))
    create_array(location, shape=(32, 32), dtype=np.uint8, layout=Layout((32, 32), (32, 32)), axes=("y", "x"))
    voxels = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    write_shard(open_array(location), BlockGrid((32, 32), (32, 32)).block(0).core, voxels, location=location)
    shard = tmp_path / "0" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        open_array(location)[:]


def test_sweep_removes_what_a_killed_writer_left_and_nothing_else(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.abc.partial").write_bytes(b"half")
    (tmp_path / "c" / "0").write_bytes(b"whole")
    sweep(Location(str(tmp_path)))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["0"]


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=3))
@settings(max_examples=200)
def test_planned_shards_are_multiples_of_chunks(shape):
    layout = plan_layout(tuple(shape))
    assert all(s % c == 0 for s, c in zip(layout.shard, layout.chunk, strict=True))
    assert np.prod([float(s) for s in layout.shard]) <= 256**3


def test_given_shards_choose_chunks_that_divide_them():
    assert plan_layout((500, 500), shard=(96, 100)) == Layout((96, 100), (96, 100))
    assert plan_layout((500, 500, 500), shard=(192, 128, 100)) == Layout((64, 64, 50), (192, 128, 100))
    assert plan_layout((500, 500, 500), shard=(97, 254, 100)) == Layout((97, 127, 50), (97, 254, 100))
    assert plan_layout((500, 500), chunk=(30, 30)).shard == (510, 510)
    with pytest.raises(ArgumentError, match="shard must be a multiple of the chunk 30, got 100; use 90"):
        plan_layout((500, 500), chunk=(30, 30), shard=(100, 100))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(("uint8", "int16", "uint16", "float32")), st.data())
def test_voxels_read_the_fast_way_are_those_that_zarr_reads(tmp_path_factory, dtype, data):
    location = Location(str(tmp_path_factory.mktemp("array")))
    shape = (2, *(data.draw(st.integers(1, 40)) for _ in range(3)))
    create_array(location, shape=shape, dtype=dtype, layout=Layout((8, 8, 8), (16, 8, 24)), axes=("c", "z", "y", "x"))
    written = open_array(location)
    written[:] = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    fast = open_voxels(location)
    assert (fast.shape, fast.dtype, fast.chunks) == (shape, np.dtype(dtype), written.chunks)
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(a, b) for a, b in ends)
    np.testing.assert_array_equal(fast[box], written[box])


def test_chunks_that_were_read_are_kept_as_many_as_the_cache_holds(tmp_path):
    location, shape = Location(str(tmp_path / "array")), (1, 64, 2048)
    create_array(location, shape=shape, dtype="uint8", layout=Layout((64, 64), (64, 64)), axes=("c", "y", "x"))
    written, voxels = open_array(location), np.random.default_rng(0).integers(1, 100, shape, dtype=np.uint8)

    def chunks_left(n_bytes):
        written[:] = voxels
        cached = open_voxels(location, cache=chunk_cache(n_bytes))
        both = (cached, pickle.loads(pickle.dumps(cached)))  # the other one goes on with a cache of its own
        for array in both:
            np.testing.assert_array_equal(array[:, :, :], voxels)
        written[:] = 0
        return [np.count_nonzero(array[:, :, :].any(axis=(0, 1))) // 64 for array in both]

    assert chunks_left(2**20) == [32, 32]
    assert all(8 <= each <= 16 for each in chunks_left(2**16))
    assert chunks_left(0) == [0, 0]


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"chunk": (6400,) * 3}, "a chunk must have at most 268,435,456 voxels, got 6400 x 6400 x 6400; use one such"),
        ({"shard": (10**9,) * 3, "chunk": (64,) * 3}, r"at most 1,048,576 chunks, got 10{9} x .* of 64 x"),
        ({"shard": (10**9,) * 3}, r"a shard must have at most 1,048,576 chunks, got 10{9} x"),
        ({"shard": (1009,) * 3}, "a chunk must have at most 268,435,456 voxels, got 1009 x 1009 x 1009"),
    ],
    ids=["chunk", "chunks", "shard alone", "prime shard"],
)  # fmt: skip
def test_chunks_and_shards_that_no_memory_holds_are_refused_at_once(asked, rule):
    with pytest.raises(ArgumentError, match=rule):
        plan_layout((5, 6, 7), **asked)


@pytest.mark.parametrize(("shard", "chunk"), [(192, 64), (97, 97), (640, 64), (128, 64), (1, 1), (60, 60), (6400, 64)])
def test_a_shard_alone_is_cut_into_chunks_nearest_to_the_usual_ones(shard, chunk):
    assert plan_layout((5, 6, 7), shard=(shard, 64, 64)).chunk == (chunk, 64, 64)
