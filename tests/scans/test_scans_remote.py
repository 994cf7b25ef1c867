"""Scans in one file in a bucket: read as on a disk, by the ranges that are wanted; see tests/objects.py."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import fsspec
import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
from objects import digests

from pipeline.errors import ScanError
from pipeline.identity import check_unchanged, stamps
from pipeline.ingest import ingest
from pipeline.scans.backend import open_scan
from pipeline.scans.registry import format_of
from pipeline.scans.scratch import folder, lies_in_memory

RNG = np.random.default_rng(0)
SLIDE = RNG.integers(0, 255, (1500, 2100), dtype=np.uint8)
VOLUME = RNG.integers(0, 60_000, (5, 70, 90), dtype=np.uint16)
LONG = RNG.integers(0, 60_000, (3, 1000, 1300), dtype=np.uint16)
OME = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1, "PhysicalSizeZ": 0.3}
TIFFS = {
    "tiled.tif": (SLIDE, {"tile": (128, 128), "compression": "zlib"}),
    "plain.tif": (SLIDE, {}),
    "rgb.svs": (np.stack([SLIDE[:300, :300]] * 3, axis=-1), {"tile": (64, 64), "compression": "jpeg"}),
    "strips.tiff": (VOLUME, {"rowsperstrip": 16, "compression": "lzw"}),
    "volume.ome.tif": (VOLUME, {"ome": True, "metadata": OME}),
    "big.tif": (VOLUME, {"bigtiff": True, "byteorder": ">"}),
    "imagej.tif": (VOLUME, {"imagej": True}),
    "apart.tif": (LONG, {"apart": True}),
    "apart-strips.tif": (LONG, {"apart": True, "rowsperstrip": 450, "byteorder": ">"}),
    "apart-planes.tif": (LONG, {"apart": True, "planarconfig": "separate", "photometric": "rgb"}),
    "apart-lzw.tif": (LONG, {"apart": True, "compression": "lzw"}),
}

INGEST = """
import sys
from pipeline.scans import cache, pictures, tiff_segments
tiff_segments.DECODED = cache.SegmentCache(budget_bytes=3_000_000)  # one page of three
from pipeline.ingest import ingest
ingest(sys.argv[1], sys.argv[2], shard=(3, 256, 256), chunk=(3, 64, 64))
"""
CORNER = """
import sys
import numpy
from pipeline.scans.backend import open_scan
from pipeline.scans.scratch import folder, lies_in_memory
numpy.save(sys.argv[2], open_scan(sys.argv[1])[-100:, -100:].values)
"""


def write(path, voxels, *, apart=False, byteorder=None, bigtiff=False, imagej=False, ome=None, **settings):
    """Write a TIFF; ``apart`` keeps its pages from lying in one piece, so that it is read strip by strip."""
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff, imagej=imagej, ome=ome) as tiff:
        pages = voxels if apart else [voxels]
        for page in [np.stack([each] * 3) for each in pages] if "planarconfig" in settings else pages:
            tiff.write(page, **{"contiguous": False, "metadata": None} if apart else {}, **settings)


def put(file, url):
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    fs.put_file(str(file), path)
    return url


@contextmanager
def counted(address):
    """Yield the address of a proxy of a server, and a list of the numbers of bytes that came through it."""
    seen, server = list[int](), urlsplit(address)

    def pump(client):
        with client, socket.create_connection((server.hostname, server.port)) as behind:
            while True:
                for ready in select.select([client, behind], [], [])[0]:
                    if not (data := ready.recv(1 << 16)):
                        return
                    (behind if ready is client else client).sendall(data)
                    if ready is behind:
                        seen.append(len(data))

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=pump, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)


def test_strips_that_many_blocks_need_are_fetched_and_decoded_once(bucket, objects, tmp_path, monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    if lies_in_memory(folder()):
        pytest.skip(f"needs a disk, got {folder()} in memory")
    write(tmp_path / "pages.tif", LONG // 256, apart=True, rowsperstrip=1000, compression="lzw")
    url = put(tmp_path / "pages.tif", f"{bucket}/pages.tif")
    with counted(objects) as (proxy, seen):
        words = [sys.executable, "-c", INGEST, url, str(tmp_path / "image.zarr")]
        subprocess.run(words, env=os.environ | {"AWS_ENDPOINT_URL": proxy}, check=True)
    np.testing.assert_array_equal(open_scan(f"{tmp_path}/image.zarr").values, LONG // 256)
    n_bytes = (tmp_path / "pages.tif").stat().st_size
    assert n_bytes < sum(seen) < 1.3 * n_bytes


def test_every_kind_is_read_as_from_a_disk(bucket, tmp_path):
    for name, (voxels, settings) in TIFFS.items():
        write(tmp_path / name, voxels, **settings)
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file.create_dataset("a/b", data=VOLUME, chunks=(1, 32, 32), compression="gzip")
    for name in (*TIFFS, "volume.h5"):
        here, there = open_scan(tmp_path / name), open_scan(put(tmp_path / name, f"{bucket}/{name}"))
        assert (here.dims, here.shape, here.dtype, here.attrs) == (there.dims, there.shape, there.dtype, there.attrs)
        front = (slice(0, 1),) * (here.ndim - 2)
        for part in ((slice(None),) * here.ndim, (*front, slice(3, 65), slice(21, 88)), (-1,) * here.ndim):
            np.testing.assert_array_equal(there[part].values, here[part].values, err_msg=f"{name} {part}")
    dataset = open_scan(f"{bucket}/volume.h5::a/b")
    np.testing.assert_array_equal(dataset.values, VOLUME)


@pytest.mark.parametrize("strip", [1000, 450, 37])
def test_rows_of_long_strips_are_those_of_the_file_wherever_they_are_read(tmp_path, strip):
    write(tmp_path / "scan.tif", LONG, apart=True, rowsperstrip=strip)
    scan = open_scan(tmp_path / "scan.tif")
    assert scan.shape == LONG.shape
    for begin, stop in ((0, 1), (99, 101), (449, 451), (0, 1000), (999, 1000), (377, 912)):
        np.testing.assert_array_equal(scan[1:, begin:stop, 5:99].values, LONG[1:, begin:stop, 5:99])


def test_of_long_strips_rows_alone_are_fetched(bucket, objects, tmp_path):
    write(tmp_path / "slide.tif", LONG, apart=True)
    put(tmp_path / "slide.tif", f"{bucket}/slide.tif")
    with counted(objects) as (proxy, seen):
        words = [sys.executable, "-c", CORNER.replace("[-100:", "[-1, -100:"), f"{bucket}/slide.tif",
                 str(tmp_path / "corner.npy")]  # fmt: skip
        subprocess.run(words, env=os.environ | {"AWS_ENDPOINT_URL": proxy}, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "corner.npy"), LONG[-1, -100:, -100:])
    most = 2 * (256 << 10) + 100 * 2 * 1300 + 3 * (64 << 10)  # the first and last short strips, and the structure
    assert 100 * 100 * 2 < sum(seen) < most < LONG[0].nbytes / 2


@pytest.mark.parametrize("settings", [{"tile": (128, 128), "compression": "zlib"}, {"tile": (128, 128)}, {}])
def test_of_a_corner_little_more_than_the_corner_is_fetched(bucket, objects, tmp_path, settings):
    tifffile.imwrite(tmp_path / "slide.tif", SLIDE, **settings)
    n_bytes = (tmp_path / "slide.tif").stat().st_size
    put(tmp_path / "slide.tif", f"{bucket}/slide.tif")
    with counted(objects) as (proxy, seen):
        words = [sys.executable, "-c", CORNER, f"{bucket}/slide.tif", str(tmp_path / "corner.npy")]
        subprocess.run(words, env=os.environ | {"AWS_ENDPOINT_URL": proxy}, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "corner.npy"), SLIDE[-100:, -100:])
    lines = 0 if settings else 100 * SLIDE.shape[1]  # without tiles, what lies between the lines comes along
    most = 4 * 128 * 128 + lines + 3 * (64 << 10)  # the segments; the file's structure, in blocks of 64 KiB
    assert 100 * 100 < sum(seen) < most < n_bytes / 5


def test_whether_it_is_still_the_same_is_one_question(bucket, tmp_path, caplog):
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME)
    put(tmp_path / "scan.tif", f"{bucket}/scan.tif")
    before = stamps(f"{bucket}/scan.tif")
    caplog.set_level("DEBUG", "s3fs")
    check_unchanged(f"{bucket}/scan.tif", before)
    asked = [each.getMessage().split()[1] for each in caplog.records if each.getMessage().startswith("CALL:")]
    assert asked == ["head_object"]


@pytest.mark.parametrize(("name", "n"), [("scan.tif", 1), ("scan.svs", 1), ("scan.h5", 0), ("hdf5.tif", 1)])
def test_of_what_kind_it_is_is_one_question_or_none(bucket, tmp_path, caplog, name, n):
    is_hdf5 = "h" in name
    if is_hdf5:
        with h5py.File(tmp_path / name, "w") as file:
            file["a"] = VOLUME
    else:
        tifffile.imwrite(tmp_path / name, VOLUME)
    put(tmp_path / name, f"{bucket}/{name}")
    caplog.set_level("DEBUG", "s3fs")
    assert format_of(f"{bucket}/{name}").name == format_of(str(tmp_path / name)).name
    assert format_of(f"{bucket}/{name}").name.startswith("HDF5" if is_hdf5 else "TIFF")
    assert sum(each.getMessage().startswith("CALL: get_object") for each in caplog.records) == 2 * n


def test_a_picture_that_calls_itself_a_tiff_is_refused_in_one_line(bucket, tmp_path):
    (tmp_path / "scan.tif").write_bytes(imagecodecs.png_encode(VOLUME[0]))
    with pytest.raises(ScanError, match=r"scan.tif: .*TIFF") as caught:
        open_scan(put(tmp_path / "scan.tif", f"{bucket}/scan.tif"))
    assert "\n" not in str(caught.value)


def test_an_image_of_it_has_the_bytes_of_one_from_a_disk(bucket, tmp_path):
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME, tile=(32, 32), compression="zlib")
    put(tmp_path / "scan.tif", f"{bucket}/scan.tif")
    ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), shard=(32,), chunk=(16,))
    ingest(f"{bucket}/scan.tif", f"{bucket}/scan.zarr", shard=(32,), chunk=(16,))
    here, there = (
        {name: digest for name, digest in digests(url).items() if "/c/" in name}
        for url in (str(tmp_path / "scan.zarr"), f"{bucket}/scan.zarr")
    )
    assert len(here) > 6
    assert there == here
    was = stamps(f"{bucket}/scan.tif")
    assert was["n_bytes"] == (tmp_path / "scan.tif").stat().st_size
    assert stamps(f"{bucket}/scan.tif") == was
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME[::-1], tile=(32, 32), compression="zlib")
    put(tmp_path / "scan.tif", f"{bucket}/scan.tif")
    assert stamps(f"{bucket}/scan.tif") != was


def test_what_is_cut_off_gone_or_of_another_kind_is_refused_in_one_line(bucket, tmp_path):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    for name, settings in (("tiled.tif", {"tile": (64, 64), "compression": "zlib"}), ("plain.tif", {})):
        tifffile.imwrite(tmp_path / name, SLIDE[:400, :400], **settings)
        content = (tmp_path / name).read_bytes()
        url = f"{bucket}/{name}"
        for kept in (0, 4, len(content) // 2):
            fs.pipe_file(url, content[:kept])
            with pytest.raises(ScanError, match=rf"a scan must be whole and decodable, got {url}: .+; copy or export"):
                open_scan(url)
        fs.pipe_file(url, content)
        scan = open_scan(url)
        fs.pipe_file(url, content[: len(content) // 2])
        with pytest.raises(ScanError, match=rf"a scan must be whole and decodable, got {url}: "):
            scan[-100:, -100:].load()
        fs.rm_file(url)
        with pytest.raises(ScanError, match=rf"a scan must exist, got {url}; check the path"):
            scan[:100, :100].load()
        with pytest.raises(ScanError, match=rf"a scan must exist, got {url}; check the path"):
            open_scan(url)
    fs.pipe_file(f"{bucket}/photo.png", b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ScanError, match=r"must be a Zarr, a TIFF or HDF5, got .*photo\.png, .*copy it to a disk"):
        open_scan(f"{bucket}/photo.png")
