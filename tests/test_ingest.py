import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import ome_zarr_models
import pytest
import tensorstore
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image as ValidImage
from volumes import as_of_before, scan_file, tree_digest

from pipeline.compute.runner import run_serial
from pipeline.errors import ScanError, StoreError
from pipeline.ingest import ingest, ingest_labels
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.store.scaling import Scaling
from pipeline.store.statistics import Normalisation

RNG = np.random.default_rng(0)

def tensorstore_read(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec).result().read().result()


@given(st.lists(st.integers(1, 70), min_size=2, max_size=3), st.sampled_from([np.uint8, np.int16, np.float32]))
@settings(max_examples=20, deadline=None)
def test_what_is_ingested_is_read_back_and_counted(tmp_path_factory, shape, dtype):
    folder = tmp_path_factory.mktemp("ingest")
    voxels = np.random.default_rng(0).normal(50, 20, shape).astype(dtype)
    np.save(folder / "scan.npy", voxels)
    image = ingest(str(folder / "scan.npy"), str(folder / "scan.zarr"), chunk=(16,), shard=(32,))
    scan = np.load(folder / "scan.npy")
    expected = np.moveaxis(scan, -1, 0) if image.n_channels > 1 else scan
    np.testing.assert_array_equal(image.array[:], expected.reshape(image.n_channels, *image.spatial_shape))
    for channel, statistics in zip(image.array[:].astype(np.float64), image.statistics, strict=True):
        assert statistics.mean == pytest.approx(channel.mean())
        assert statistics.std == pytest.approx(channel.std(), abs=1e-9)


@pytest.mark.parametrize("shape", [(40, 90, 700), (600, 530), (3, 300, 333)])
def test_images_are_valid_ome_zarr_and_other_readers_open_them(tmp_path, shape):
    voxels = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    rgb = shape[0] == 3
    tifffile.imwrite(tmp_path / "scan.ome.tif", voxels, metadata={"axes": "CYX" if rgb else "ZYX"[-len(shape) :]})
    image = ingest(str(tmp_path / "scan.ome.tif"), str(tmp_path / "scan.zarr"), voxel_size_um=(0.5,))
    labels = (voxels[0] if rgb else voxels) > 100
    tifffile.imwrite(tmp_path / "labels.tif", labels.astype(np.uint8) * 255, photometric="minisblack")
    ingest_labels(str(tmp_path / "labels.tif"), image=str(tmp_path / "scan.zarr"), name="bright")
    group = zarr.open_group(tmp_path / "scan.zarr", mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        valid = ValidImage.from_zarr(group)
        ome_zarr_models.open_ome_zarr(group)
        ome_zarr_models.open_ome_zarr(group["labels/bright"])
    assert [axis.name for axis in valid.attributes.ome.multiscales[0].axes] == list(image.axes)
    np.testing.assert_array_equal(tensorstore_read(tmp_path / "scan.zarr" / "0"), voxels.reshape(image.array.shape))
    np.testing.assert_array_equal(tensorstore_read(tmp_path / "scan.zarr" / "labels" / "bright" / "0"), labels * 255)
    for level in image.levels[1:]:
        assert tensorstore_read(tmp_path / "scan.zarr" / level.path).shape == (image.n_channels, *level.shape)
    opened = open_labels(tmp_path / "scan.zarr" / "labels" / "bright") if rgb else None
    assert opened is None or opened.spatial_shape == shape[1:]


def test_an_ingest_that_stops_anywhere_goes_on_and_ends_in_the_same_bytes(tmp_path):
    scan_file(tmp_path / "scan.tif", (20, 40, 300))
    scan = str(tmp_path / "scan.tif")
    ingest(scan, str(tmp_path / "undisturbed.zarr"), chunk=(16,), shard=(32,))
    expected = {k: v for k, v in tree_digest(tmp_path / "undisturbed.zarr").items() if k != "zarr.json"}
    for n_before in (0, 1, 7, 19):

        def stopping(work, indices, *, on_record, n_before=n_before):
            run_serial(work, list(indices)[:n_before], on_record=on_record)
            raise KeyboardInterrupt

        target = str(tmp_path / f"{n_before}.zarr")
        with pytest.raises(KeyboardInterrupt):
            ingest(scan, target, chunk=(16,), shard=(32,), run=stopping)
        with pytest.raises(StoreError, match="unfinished ingest"):
            open_image(target)
        resumed = ingest(scan, target, chunk=(16,), shard=(32,))
        assert {k: v for k, v in tree_digest(target).items() if k != "zarr.json"} == expected
        assert resumed.statistics == open_image(str(tmp_path / "undisturbed.zarr")).statistics


@given(st.tuples(*(st.integers(1, 40),) * 3))
@settings(max_examples=5, deadline=None)
def test_each_slice_of_a_volume_is_measured(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("slices")
    voxels = np.random.default_rng(0).integers(0, 900, shape).astype(np.uint16)
    np.save(folder / "scan.npy", voxels)
    image = ingest(str(folder / "scan.npy"), str(folder / "scan.zarr"), chunk=(16,), shard=(16,))
    if image.has_slices:  # few planes last are channels
        planes = image.array[:].astype(np.float64)
        np.testing.assert_allclose(image.slices.mean, planes.mean(axis=(2, 3)), rtol=1e-13)
        np.testing.assert_allclose(image.slices.std, planes.std(axis=(2, 3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("finished", [True, False])
def test_an_image_of_an_older_haloseg_is_refused_by_slice_until_it_is_ingested_again(tmp_path, finished):
    scan_file(tmp_path / "scan.tif", (20, 40, 70))
    scan, image, by_slice = str(tmp_path / "scan.tif"), tmp_path / "scan.zarr", Scaling(Normalisation.ZSCORE_SLICEWISE)
    ingest(scan, str(image), chunk=(16,), shard=(32,))
    expected = tree_digest(image)
    as_of_before(image, finished=finished)
    if finished:
        assert open_image(image).windows(Scaling())
        with pytest.raises(StoreError, match=r"got an image without them at .*; run the same haloseg ingest again"):
            open_image(image).windows(by_slice)

    def stopping(work, indices, *, on_record):
        run_serial(work, list(indices)[:2], on_record=on_record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(scan, str(image), chunk=(16,), shard=(32,), run=stopping)
    assert len(ingest(scan, str(image), chunk=(16,), shard=(32,)).windows(by_slice)) == 1
    assert tree_digest(image) == expected


def test_what_a_kill_right_after_the_commit_left_is_removed(tmp_path):
    scan_file(tmp_path / "scan.tif", (40, 50))
    scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
    ingest(scan, image)
    expected = tree_digest(image)
    for notes in (".measured", ".histograms"):
        (tmp_path / "scan.zarr" / notes).mkdir()
        (tmp_path / "scan.zarr" / notes / "0.npz").write_bytes(b"left")
    ingest(scan, image)
    assert tree_digest(image) == expected


def test_other_settings_are_not_mixed_into_an_image(tmp_path):
    scan_file(tmp_path / "scan.tif", (40, 50))
    scan, image = str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")
    ingest(scan, image, chunk=(16,), shard=(32,))
    with pytest.raises(StoreError, match="another layout"):
        ingest(scan, image, chunk=(8,), shard=(32,))
    with pytest.raises(StoreError, match="another voxel_size_um"):
        ingest(scan, image, chunk=(16,), shard=(32,), voxel_size_um=(2.0, 2.0))


def test_overwriting_deletes_images_alone_and_never_the_scan(tmp_path):
    scan_file(tmp_path / "scan.tif", (20, 30))
    scan = str(tmp_path / "scan.tif")
    with pytest.raises(StoreError, match="images made by haloseg alone"):
        ingest(scan, str(tmp_path), overwrite=True)
    with pytest.raises(StoreError, match="images made by haloseg alone"):
        ingest(scan, scan, overwrite=True)
    image = str(tmp_path / "scan.zarr")
    ingest(scan, image)
    with pytest.raises(StoreError, match="must not delete the scan itself"):
        ingest(image, f"{image}/", overwrite=True)
    kept = tmp_path / "scan.zarr" / "kept.npy"
    np.save(kept, np.zeros((9, 9), np.uint8))
    with pytest.raises(StoreError, match="must not delete the scan itself"):
        ingest(str(kept), image, overwrite=True)
    assert open_image(image).spatial_shape == (20, 30)


@pytest.mark.parametrize("kind", ["file", "folder", "glob"])
def test_a_scan_that_has_changed_is_not_taken_for_done(tmp_path, kind):
    folder = tmp_path / "slices"
    folder.mkdir()
    for z in range(3):
        tifffile.imwrite(folder / f"{z}.tif", np.zeros((300, 300), np.uint8))
    scan = str({"file": folder / "1.tif", "folder": folder, "glob": folder / "*.tif"}[kind])
    image = str(tmp_path / "image.zarr")
    of_image = scan if kind == "file" else str(folder)
    ingest(of_image, image)
    ingest_labels(scan, image=image, name="truth")
    ingest_labels(scan, image=image, name="truth")
    mended = np.zeros((300, 300), np.uint8)
    mended[150, 150] = 1
    tifffile.imwrite(folder / "1.tif", mended)
    with pytest.raises(StoreError, match="another time_of_change"):
        ingest(of_image, image)
    with pytest.raises(StoreError, match="another time_of_change"):
        ingest_labels(scan, image=image, name="truth")


def test_labels_that_turn_out_to_be_damaged_leave_nothing(tmp_path):
    scan_file(tmp_path / "scan.tif", (200, 300))
    image = tmp_path / "scan.zarr"
    ingest(str(tmp_path / "scan.tif"), str(image), chunk=(16,), shard=(16,))
    before = tree_digest(image)
    labels = tmp_path / "labels.tif"
    voxels = np.random.default_rng(0).integers(0, 2, (200, 300)).astype(np.uint8)
    tifffile.imwrite(labels, voxels, compression="zlib", rowsperstrip=20, photometric="minisblack")
    content = bytearray(labels.read_bytes())
    with tifffile.TiffFile(labels) as file:
        at, n = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    content[at : at + n] = bytes(n)
    labels.write_bytes(content)
    with pytest.raises(ScanError, match=r"labels\.tif"):
        ingest_labels(str(labels), image=str(image), name="truth")
    assert tree_digest(image) == before


def test_file_urls_are_paths(tmp_path):
    scan_file(tmp_path / "scan.tif", (20, 30))
    ingest(str(tmp_path / "scan.tif"), f"file://{tmp_path}/scan.zarr")
    assert open_image(tmp_path / "scan.zarr").spatial_shape == (20, 30)


def written_anew(scan, content, *, by=run_serial):
    """Return a runner after whose first block the scan is another one; ``by`` runs the other blocks."""

    def run(work, indices, *, on_record):
        def on_first(record):
            on_record(record)
            Location(scan).write_bytes(content)
            if by is not run_serial:
                raise StopIteration

        with suppress(StopIteration):
            return run_serial(work, indices, on_record=on_first)
        return by(work)

    return run


def later_worker(work):
    """Open the scan as a worker does that joins in the middle of a run."""
    work.setup()
    return ()


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize(
    ("how", "by"), [("plain", run_serial), ("tiled", run_serial), ("cut", run_serial), ("cut", later_worker)]
)
def test_a_scan_that_is_written_anew_while_it_is_copied_is_refused_in_one_line(where, how, by, tmp_path, request):
    folder = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    voxels, contents = RNG.integers(0, 255, (5, 96, 96), dtype=np.uint8), []
    for each in (voxels, voxels[::-1]):
        tiled = {"compression": "zlib", "tile": (32, 32)} if how == "tiled" else {}
        tifffile.imwrite(tmp_path / "made.tif", each, **tiled)
        contents.append((tmp_path / "made.tif").read_bytes())
    other = contents[1][: len(contents[1]) // 2] if how == "cut" else contents[1]
    assert len(other) == len(contents[0]) or how != "plain"
    scan, image = f"{folder}/scan.tif", f"{folder}/scan.zarr"
    Location(scan).write_bytes(contents[0])
    with pytest.raises(ScanError, match=rf"^a scan must stay as it is .*, got another version of {scan} than .*"):
        ingest(scan, image, shard=(32,), run=written_anew(scan, other, by=by))
    assert not Location(image).exists()
    if how != "cut":
        ingest(scan, image, shard=(32,))
        np.testing.assert_array_equal(open_image(Location(image)).array[0], voxels[::-1])


def test_a_slice_that_is_written_anew_while_a_folder_is_copied_is_noticed_before_the_end(tmp_path):
    (tmp_path / "slices").mkdir()
    for number in range(3):
        tifffile.imwrite(tmp_path / f"slices/{number}.tif", RNG.integers(0, 255, (64, 64), dtype=np.uint8))
    slice_ = str(tmp_path / "slices/1.tif")
    run = written_anew(slice_, Path(slice_).read_bytes())
    with pytest.raises(ScanError, match=r"^a scan must stay as it is while it is copied, got another version of "):
        ingest(str(tmp_path / "slices"), str(tmp_path / "scan.zarr"), shard=(32,), run=run)
    assert not (tmp_path / "scan.zarr").exists()
