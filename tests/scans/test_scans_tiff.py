"""TIFF scans against tifffile's own reading of the whole file."""

import logging
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ScanError
from pipeline.scans import tiff_inflate, tiff_segments
from pipeline.scans.backend import open_scan
from pipeline.scans.cache import SegmentCache
from pipeline.scans.tiff import open_tiff

RANDOM = np.random.default_rng(7)
SHARED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(*shape, dtype="u1"):
    return RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def write(path, voxels, **options):
    tifffile.imwrite(path, voxels, **{"photometric": "minisblack"} | options)


# name, voxels as they are written, options, axes of the scan, how the written voxels become the scan's
LAYOUTS = {
    "strips": (noise(37, 53, dtype="u2"), {"compression": "zlib", "rowsperstrip": 5}, "yx", None),
    "big endian": (noise(37, 53, dtype="u2"), {"byteorder": ">", "compression": "lzw", "predictor": True}, "yx", None),
    "big endian mapped": (noise(5, 37, 53, dtype="i4"), {"byteorder": ">"}, "zyx", None),
    "float tiles": (RANDOM.normal(size=(40, 70)).astype("f4"), {"tile": (16, 32), "compression": "zstd"}, "yx", None),
    "half floats": (RANDOM.normal(size=(40, 70)).astype("f2"), {"compression": "zlib"}, "yx", None),
    "bilevel": (noise(37, 53) > 100, {}, "yx", None),
    "bigtiff": (noise(4, 37, 53), {"bigtiff": True, "tile": (16, 16)}, "zyx", None),
    "rgb tiles": (noise(40, 70, 3), {"photometric": "rgb", "tile": (16, 16)}, "cyx", (2, 0, 1)),
    "rgba strips": (
        noise(40, 70, 4),
        {"photometric": "rgb", "rowsperstrip": 7, "compression": "zlib", "extrasamples": ["unassalpha"]},
        "cyx", (2, 0, 1),
    ),
    "rgb planes": (
        noise(3, 40, 70),
        {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 16), "compression": "zlib"}, "cyx", None,
    ),
    "rgb pages": (noise(5, 40, 70, 3), {"photometric": "rgb", "compression": "zlib"}, "czyx", (3, 0, 1, 2)),
    "rgb planes in pages": (
        noise(5, 3, 40, 70), {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}, "czyx",
        (1, 0, 2, 3),
    ),
    "pages": (noise(6, 33, 47), {"compression": "zlib", "rowsperstrip": 10}, "zyx", None),
    "two page axes": (noise(2, 6, 33, 47), {"compression": "zlib"}, "czyx", None),
    "cubic tiles": (noise(32, 40, 70), {"tile": (16, 16, 16), "volumetric": True, "compression": "zlib"}, "zyx", None),
    "imagej": (noise(4, 2, 33, 47, dtype="u2"), {"imagej": True, "metadata": {"axes": "ZCYX"}}, "czyx", (1, 0, 2, 3)),
    "ome": (noise(2, 6, 33, 47), {"ome": True, "metadata": {"axes": "CZYX"}, "tile": (16, 16)}, "czyx", None),
    "ome z before c": (
        noise(6, 2, 33, 47), {"ome": True, "metadata": {"axes": "ZCYX"}, "compression": "zlib"}, "czyx", (1, 0, 2, 3),
    ),
    "one voxel": (noise(1, 1), {}, "yx", None),
    "one row in pages": (noise(5, 1, 40), {"compression": "zlib"}, "zyx", None),
}


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def layout(request, tmp_path_factory):
    written, options, dims, order = LAYOUTS[request.param]
    path = tmp_path_factory.mktemp("tiff") / "scan.tif"
    write(path, written, **options)
    return path, tuple(dims), written if order is None else written.transpose(order)


@SHARED
@given(st.data())
def test_any_part_is_what_was_written(layout, data):
    path, dims, expected = layout
    scan = open_tiff(str(path))
    assert scan.dims == dims
    assert scan.shape == expected.shape
    assert scan.dtype == expected.dtype.newbyteorder("=")
    parts = []
    for size in scan.shape:
        start = data.draw(st.integers(0, size))
        parts.append(slice(start, data.draw(st.integers(start, size))))
    got = scan.read(tuple(parts))
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, expected[tuple(parts)])


def test_the_whole_is_what_tifffile_reads_also_after_a_pickle(layout):
    path, _, expected = layout
    whole = tuple(slice(0, n) for n in expected.shape)
    scan = open_tiff(str(path))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(scan)).read(whole), expected)
    np.testing.assert_array_equal(np.sort(tifffile.imread(path), axis=None), np.sort(scan.read(whole), axis=None))


@pytest.fixture
def by_rows(monkeypatch):
    """Have all strips that can be decoded by rows decoded so, a few at a time, and nothing kept in memory."""
    for name, number in {"_LONG_BYTES": 1, "_READ_BYTES": 100, "_PIECE_BYTES": 1000}.items():
        monkeypatch.setattr(tiff_inflate, name, number)
    monkeypatch.setattr(tiff_segments, "DECODED", SegmentCache(budget_bytes=0))


class ByRowsAlone(SegmentCache):
    """Has nothing decoded whole."""

    def get(self, key, make, **how):
        del make
        return super().get(key, lambda: pytest.fail("decoded whole"), **how)


def test_voxels_do_not_depend_on_how_strips_are_decoded(layout, by_rows):
    path, _, expected = layout
    np.testing.assert_array_equal(open_scan(path).values, expected)


@pytest.mark.parametrize("rows", [61, 20, 1])
@pytest.mark.parametrize(("dtype", "options"), [
    ("u1", {}), (">u2", {}), ("<u2", {"predictor": 2}), (">u2", {"predictor": 2}), ("i4", {"predictor": 2}), ("f4", {}),
    ("u2", {"photometric": "rgb", "predictor": 2}), ("u2", {"photometric": "rgb", "planarconfig": "separate"}),
])  # fmt: skip
def test_long_strips_are_decoded_by_rows_and_no_other_way(tmp_path, by_rows, monkeypatch, dtype, options, rows):
    voxels = RANDOM.integers(0, 120, (3, 61, 47)).astype(dtype)
    as_written = np.moveaxis(voxels, 0, -1) if "planarconfig" not in options and "photometric" in options else voxels
    about = {"byteorder": ">" if ">" in dtype else "<", "compression": "zlib", "rowsperstrip": rows}
    write(tmp_path / "scan.tif", as_written, **about | options)
    monkeypatch.setattr(tiff_segments, "DECODED", ByRowsAlone(budget_bytes=0))
    scan = open_tiff(str(tmp_path / "scan.tif"))
    np.testing.assert_array_equal(scan.read((slice(0, 3), slice(0, 61), slice(0, 47))), voxels)
    np.testing.assert_array_equal(scan.read((slice(1, 2), slice(19, 42), slice(5, 6))), voxels[1:2, 19:42, 5:6])


def test_lossy_tiles_decode_as_tifffile_decodes_them(tmp_path):
    path = tmp_path / "slide.tif"
    write(path, noise(100, 130, 3), photometric="rgb", tile=(32, 32), compression="jpeg")
    np.testing.assert_array_equal(open_scan(path).values, tifffile.imread(path).transpose(2, 0, 1))


def test_a_pyramid_is_read_at_full_resolution(tmp_path):
    path, full = tmp_path / "pyramid.ome.tif", noise(3, 128, 160)
    with tifffile.TiffWriter(path) as writer:
        options = {"tile": (32, 32), "compression": "zlib"}
        about = {"axes": "CYX", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
        writer.write(full, subifds=2, metadata=about, photometric="minisblack", **options)
        for step in (2, 4):
            writer.write(full[:, ::step, ::step], subfiletype=1, photometric="minisblack", **options)
    scan = open_scan(path)
    assert scan.attrs["voxel_size_um"] == (0.5, 0.25)
    assert scan.attrs["format"] == "OME-TIFF"
    np.testing.assert_array_equal(scan.values, full)


def test_a_small_part_costs_few_segments(tmp_path, monkeypatch):
    path, voxels = tmp_path / "large.tif", noise(1024, 1024)
    write(path, voxels, tile=(64, 64), compression="zlib")
    scan = open_scan(path)
    n_read, read_before = [], tiff_segments.SegmentSource._decoded

    def counted(self, file, **which):
        n_read.append(which["segment"])
        return read_before(self, file, **which)

    monkeypatch.setattr(tiff_segments.SegmentSource, "_decoded", counted)
    np.testing.assert_array_equal(scan[100:140, 500:600].values, voxels[100:140, 500:600])
    assert sorted(n_read) == [r * 16 + c for r in (1, 2) for c in (7, 8, 9)]


def test_segments_that_were_never_written_show_nothing(tmp_path):
    path = tmp_path / "sparse.tif"
    tile = noise(16, 16)
    write(
        path, iter([tile, None, None, tile]), shape=(32, 32), dtype="u1", tile=(16, 16), compression="zlib"
    )
    expected = np.zeros((32, 32), "u1")
    expected[:16, :16] = expected[16:, 16:] = tile
    np.testing.assert_array_equal(open_scan(path).values, expected)


@pytest.fixture(
    scope="module",
    params=[
        {"compression": "zlib", "tile": (16, 16)}, {"metadata": None, "compression": "zlib"}, {}, {"imagej": True},
        {"ome": True, "compression": "zlib"}, {"bigtiff": True, "rowsperstrip": 3}, {"metadata": None},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def cuttable(request, tmp_path_factory):
    path, voxels = tmp_path_factory.mktemp("cut") / "whole.tif", noise(5, 24, 32)
    write(path, voxels, **request.param)
    return path.read_bytes(), path.with_name("cut.tif"), voxels


def read_or_refused(path):
    try:
        scan = open_scan(path)
    except ScanError as error:
        return str(error)
    return scan.values


@SHARED
@given(where=st.floats(0, 1))
def test_a_cut_file_is_refused_in_one_line_or_lost_nothing(cuttable, where, caplog):
    content, path, voxels = cuttable
    caplog.clear()
    path.write_bytes(content[: int(where * (len(content) - 1))])
    with caplog.at_level(logging.DEBUG, logger="tifffile"):
        voxels_or_line = read_or_refused(path)
    if isinstance(voxels_or_line, str):
        assert "\n" not in voxels_or_line
        assert str(path) in voxels_or_line
    else:
        np.testing.assert_array_equal(voxels_or_line, voxels)
    assert not caplog.records


def test_a_file_cut_by_half_is_refused_at_the_start(cuttable):
    content, path, _ = cuttable
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ScanError, match=r"whole and decodable, got .*cut\.tif"):
        open_scan(path)


def test_a_description_that_is_damaged_hides_no_slices(tmp_path):
    path, voxels = tmp_path / "stack.tif", noise(5, 20, 30)
    write(path, voxels, metadata={"truncate": True})  # one page, the description says how many slices follow it
    np.testing.assert_array_equal(open_scan(path).values, voxels)
    before, start, after = path.read_bytes().partition(b'"shape"')
    path.write_bytes(before + start + after.replace(b"}", b";", 1))
    with pytest.raises(ScanError, match=r"whole and decodable, got .*stack\.tif"):
        open_scan(path)


def test_damage_inside_a_segment_names_the_file(tmp_path):
    path = tmp_path / "damaged.tif"
    write(path, noise(64, 64), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[3]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    scan = open_scan(path)
    assert scan[:32, :32].shape == (32, 32)
    with pytest.raises(ScanError, match=r"damaged\.tif"):
        scan[40:, 40:].load()


@pytest.mark.parametrize(("first", "cause"), [(40, "Error -3"), (-200, "lacks [0-9]+ of 64 rows")])
def test_damage_inside_a_long_strip_names_the_file(tmp_path, by_rows, first, cause):
    path, voxels = tmp_path / "damaged.tif", noise(64, 64)
    write(path, voxels, compression="zlib", rowsperstrip=64, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray(path.read_bytes())
    if first > 0:
        content[offset + first : offset + first + 9] = bytes(9)
    else:
        content[offset : offset + count] = zlib.compress(voxels.tobytes()[:first]).ljust(count, b"\0")
    path.write_bytes(content)
    with pytest.raises(ScanError, match=rf"damaged\.tif: .*{cause}"):
        open_scan(path).load()


def test_time_points_are_refused(tmp_path):
    write(tmp_path / "t.tif", noise(3, 20, 30), imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(ScanError, match=r"no other axis longer than 1, got T=3, .* save each time point"):
        open_scan(tmp_path / "t.tif")


GEOGRAPHIC = (34735, "H", 4, (1, 1, 0, 0), True)


@pytest.mark.parametrize("tags", [(), (GEOGRAPHIC,)], ids=["plain", "geographic"])
def test_two_images_in_one_file_are_refused(tmp_path, tags):
    with tifffile.TiffWriter(tmp_path / "two.tif") as writer:
        for shape in ((30, 40), (20, 30)):
            writer.write(noise(*shape), metadata=None, extratags=tags)
    with pytest.raises(ScanError, match="must hold one image, got 2 of shapes"):
        open_scan(tmp_path / "two.tif")


def test_a_part_of_a_multi_file_image_is_refused(tmp_path):
    write(tmp_path / "a.ome.tif", noise(2, 20, 30), ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    content = (tmp_path / "a.ome.tif").read_bytes()
    assert b'SizeZ="2"' in content
    (tmp_path / "a.ome.tif").write_bytes(content.replace(b'SizeZ="2"', b'SizeZ="4"'))
    with pytest.raises(ScanError, match=r"in one file, got .*a\.ome\.tif that lacks 2 of 4; save it as one file"):
        open_scan(tmp_path / "a.ome.tif")


def imagej(resolution=(4, 2), **about):
    return {"imagej": True, "resolution": resolution, "metadata": {"axes": "ZYX"} | about}


def ome(**about):
    return {"ome": True, "metadata": {"axes": "ZYX"} | about}


SIZES = [
    (imagej(spacing=3.0, unit="micron"), (3, 0.5, 0.25)),
    (imagej((0.25, 0.5), spacing=8, unit="nm"), (0.008, 0.002, 0.004)),
    (imagej(spacing=3.0, unit="\\u00B5m"), (3, 0.5, 0.25)),
    (imagej(unit="micron"), None),
    (imagej(spacing=3.0, unit="pixel"), None),
    (ome(PhysicalSizeX=0.25, PhysicalSizeY=0.5, PhysicalSizeZ=0.003, PhysicalSizeZUnit="mm"), (3, 0.5, 0.25)),
    (ome(PhysicalSizeX=0.25, PhysicalSizeY=0.5), None),
    (ome(), None),
]


@pytest.mark.parametrize(("options", "size_um"), SIZES)
def test_a_volume_tells_its_voxel_size(tmp_path, options, size_um):
    write(tmp_path / "scan.tif", noise(3, 20, 30), **options)
    scan = open_scan(tmp_path / "scan.tif")
    assert scan.attrs.get("voxel_size_um") == (None if size_um is None else pytest.approx(size_um, rel=1e-6))


@pytest.mark.parametrize(
    ("options", "size_um"),
    [
        ({"resolution": (20000, 10000), "resolutionunit": "CENTIMETER"}, (1.0, 0.5)),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (50000, 50000), "resolutionunit": "INCH"}, None),
        ({"resolution": (72 / 2.54, 72 / 2.54), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (20000, 10000), "resolutionunit": "NONE"}, None),
        ({"description": "Aperio Image Library v1\r\n32x24 |AppMag = 20|MPP = 0.4990"}, (0.499, 0.499)),
    ],
)
def test_a_picture_tells_its_pixel_size(tmp_path, options, size_um):
    write(tmp_path / "scan.tif", noise(24, 32), metadata=None, **options)
    scan = open_scan(tmp_path / "scan.tif")
    assert scan.attrs.get("voxel_size_um") == (None if size_um is None else pytest.approx(size_um, rel=1e-6))
    unit = "voxel" if size_um is None else "micrometer"
    assert {scan[d].attrs["units"] for d in "yx"} == {unit}
    np.testing.assert_allclose(scan["y"], np.arange(24) * (1.0 if size_um is None else size_um[0]), rtol=1e-6)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = Path(tmp_path / "none.tif")
    path.write_bytes(b"this is no TIFF at all")
    with pytest.raises(ScanError, match=r"none\.tif: not a TIFF file"):
        open_scan(path)
