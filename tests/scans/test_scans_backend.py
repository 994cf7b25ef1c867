"""The door: xarray, the choice of a format, what is imported, and the cache."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import xarray as xr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import ArgumentError, ScanError
from pipeline.scans import backend
from pipeline.scans.backend import open_scan
from pipeline.scans.cache import SegmentCache
from pipeline.scans.lazy import LazyScan
from pipeline.scans.registry import FORMATS, open_lazy

VOXELS = np.random.default_rng(5).integers(0, 255, (6, 40, 50), dtype="u1")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("door") / "scan.tif"
    about = {"axes": "ZYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.3, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(path, VOXELS, ome=True, metadata=about, tile=(16, 16), compression="zlib")
    return path


def test_xarray_opens_a_scan_by_engine_and_by_guess(path):
    for scan in (xr.open_dataarray(path, engine="haloseg"), xr.open_dataarray(path), open_scan(path)):
        assert scan.dims == ("z", "y", "x")
        assert scan.name == "scan"
        assert scan.attrs == {"format": "OME-TIFF", "voxel_size_um": (2.0, 0.3, 0.2)}
        assert {scan[d].attrs["units"] for d in "zyx"} == {"micrometer"}
        np.testing.assert_allclose(scan["y"], np.arange(40) * 0.3)
        np.testing.assert_array_equal(scan.sel(y=slice(3.0, 6.0)), VOXELS[:, 10:21])
        np.testing.assert_array_equal(scan, VOXELS)


def stepped(index):
    return isinstance(index, slice) and index.step is not None


def an_index(size):
    bounds = st.none() | st.integers(-size - 3, size + 3)
    steps = st.none() | st.integers(-4, 4).filter(bool)
    lists = st.lists(st.integers(-size, size - 1), min_size=1, max_size=4)
    return st.integers(-size, size - 1) | st.builds(slice, bounds, bounds, steps) | lists


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.tuples(*map(an_index, VOXELS.shape)), hull_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_every_index_of_xarray_is_numpys(path, key, hull_bytes, monkeypatch):
    # xarray 2026.9 fails by itself on a backward slice that selects nothing.
    assume(all(len(range(n)[k]) or k.step > 0 for k, n in zip(key, VOXELS.shape, strict=True) if stepped(k)))
    monkeypatch.setattr(backend, "_LARGEST_HULL_BYTES", hull_bytes)
    expected = VOXELS
    for axis in reversed(range(3)):  # xarray's lists select along their own axis each, unlike numpy's
        expected = expected[(slice(None),) * axis + (key[axis],)]
    np.testing.assert_array_equal(open_scan(path)[key].values, expected)


def test_nothing_is_read_until_it_is_sliced(path, monkeypatch):
    seen = []
    scan = open_scan(path)
    before = LazyScan.read
    monkeypatch.setattr(LazyScan, "read", lambda self, slices: seen.append(slices) or before(self, slices))
    part = scan[1:3].isel(x=slice(4, 9))
    assert not seen
    assert part.values.shape == (2, 40, 5)
    assert seen == [(slice(1, 3), slice(0, 40), slice(4, 9))]


def test_a_scan_travels_by_pickle_and_is_read_by_many_threads(path):
    scan = pickle.loads(pickle.dumps(open_scan(path)))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: scan[i % 6, i % 7 :].values, range(200)))
    assert all(np.array_equal(part, VOXELS[i % 6, i % 7 :]) for i, part in enumerate(parts))


@pytest.mark.parametrize(
    "part", [(slice(0, 1),), (slice(0, 7), slice(0, 1), slice(0, 1)), (slice(0, 4, 2), slice(0, 1), slice(0, 1))]
)
def test_a_part_outside_the_scan_is_refused(path, part):
    with pytest.raises(ArgumentError, match="a scan is read with"):
        open_lazy(str(path)).read(part)


@pytest.mark.parametrize("name", ["nothing.tif", "nothing.h5::raw", "nothing.zarr", "nothing*.png", "nothing"])
def test_what_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(ScanError, match=r"a scan must exist, got .*nothing.*; check the path"):
        open_scan(tmp_path / name)


def test_what_cannot_be_read_is_told_what_can(tmp_path):
    (tmp_path / "scan.xyz").write_text("a molecule")
    (tmp_path / "folder").mkdir()
    for name in ("scan.xyz", "folder"):
        with pytest.raises(ScanError) as caught:
            open_scan(tmp_path / name)
        assert all(known.name in str(caught.value) for known in FORMATS)
        assert "\n" not in str(caught.value)


def test_content_counts_more_than_the_name(tmp_path, path):
    (tmp_path / "renamed.dat").write_bytes(path.read_bytes())
    np.testing.assert_array_equal(open_scan(tmp_path / "renamed.dat"), VOXELS)


def test_guesses_leave_other_engines_their_files(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    np.save(tmp_path / "a.npy", VOXELS)
    engine = backend.HalosegBackend()
    guessed = {suffix for suffix in ("zarr", "h5", "npy", "nc") if engine.guess_can_open(tmp_path / f"a.{suffix}")}
    assert guessed == {"npy"}
    assert engine.guess_can_open("a.h5::raw")
    assert not engine.guess_can_open(b"bytes")


def test_reading_a_scan_imports_no_machinery(path):
    # xarray itself looks for dask.array as soon as a DataArray is made, hence the LazyScan.
    code = (
        "import sys, pipeline.scans.backend; from pipeline.scans.registry import open_lazy; "
        "open_lazy(sys.argv[1]).read((slice(0, 1),) * 3); "
        "print([m for m in ('zarr', 'dask', 'distributed', 'torch', 'prefect', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=30))
def test_the_cache_returns_what_was_made_and_keeps_its_budget(asked):
    cache = SegmentCache(budget_bytes=50)
    for key, size in asked:
        array = cache.get((key, size), lambda key=key, size=size: np.full(size, key, "u1"))
        np.testing.assert_array_equal(array, np.full(size, key, "u1"))
        assert not array.flags.writeable
        assert cache.n_bytes <= 50


def test_the_cache_makes_one_array_once_for_many_threads():
    cache, made, release = SegmentCache(budget_bytes=1000), [], threading.Event()
    asked = threading.Semaphore(0)

    def make():
        made.append(threading.get_ident())
        release.wait(10)
        return np.arange(10)

    def ask():
        asked.release()
        return cache.get("key", make)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask) for _ in range(8)]
        for _ in futures:
            asked.acquire()
        release.set()
        arrays = [f.result() for f in futures]
    assert len(made) == 1
    assert all(a is arrays[0] for a in arrays)


def test_the_cache_forgets_what_failed():
    cache = SegmentCache(budget_bytes=1000)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", lambda: np.array(1 // 0))
    assert cache.get("key", lambda: np.array(7)) == 7
