import json
import os
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tifffile
from clusters import processes
from volumes import model_file, scan_file, tree_digest

from pipeline.cli import main
from pipeline.compute.cluster import CONNECT_TIMEOUT_S
from pipeline.console import readable
from pipeline.store.labels import open_labels
from pipeline.unet.settings import Padding, UNetSettings


def fails(capsys, *arguments):
    """Run a command that must be refused: exit code 2, nothing on stdout, one line on stderr; return that line."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("haloseg:")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert "Traceback" not in err
    return lines[0]


def printed(capsys, *arguments):
    """Run a command that must succeed with --json; return its document."""
    code = main([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def scan(tmp_path):
    scan_file(tmp_path / "scan.tif", (20, 40, 50))
    return tmp_path / "scan.tif"


@pytest.fixture
def image(scan, capsys):
    path = scan.with_suffix(".zarr")
    printed(capsys, "ingest", scan, path, "--chunk", "16", "--shard", "16")
    return path


SCHEMES = [
    [], ["--workers", 1], ["--workers", 2, "--tile", "22"], ["--slab", 2], ["--slab", 14, "--column", "1,3,2"],
    ["--workers", 2, "--column", "2,1,1"], ["--tile", "34,26,30"], ["--engine", "reference"], ["--budget", "150K"],
]  # fmt: skip


def test_every_slab_column_tile_and_number_of_workers_gives_the_same_bytes(tmp_path, image, capsys):
    settings = UNetSettings(dims=3, width=2, depth=1, padding=Padding.SAME, batch_norm=True)
    model = model_file(tmp_path / "model.safetensors", settings)
    digests = []
    for number, extra in enumerate(SCHEMES):
        document = printed(capsys, "segment", image, "--model", model, "--name", f"n{number}", *extra)
        assert document["blocks_run"] == document["blocks"] == 24
        digests.append(tree_digest(image / "labels" / f"n{number}", without=("zarr.json",)))
    assert all(digest == digests[0] for digest in digests)
    assert len(digests[0]) == 24


def test_a_running_cluster_gives_the_same_bytes_also_for_relative_paths(tmp_path, image, capsys, monkeypatch):
    model_file(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    segment = ["segment", image.name, "--model", "model.safetensors", "--name"]
    printed(capsys, *segment, "here", "--workers", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with processes(elsewhere) as cluster:
        cluster.worker()
        cluster.worker()
        assert printed(capsys, *segment, "there", "--cluster", cluster.address)["blocks_run"] == 24
    here, there = (tree_digest(image / "labels" / name, without=("zarr.json",)) for name in ("here", "there"))
    assert here == there


def test_an_ingest_by_workers_gives_the_same_bytes(tmp_path, scan, image, capsys):
    again = tmp_path / "again.zarr"
    printed(capsys, "ingest", scan, again, "--chunk", "16", "--shard", "16", "--workers", "2")
    ours, theirs = (tree_digest(each, without=("zarr.json",)) for each in (again, image))
    assert ours == theirs
    assert len(ours) == 25  # the last one holds the statistics of slices


def test_a_scan_is_ingested_beside_itself(tmp_path, scan, capsys):
    model = model_file(tmp_path / "model.safetensors")
    document = printed(capsys, "segment", scan, "--model", model, "--name", "x")
    assert document["labels"] == str(tmp_path / "scan.zarr" / "labels" / "x")
    assert printed(capsys, "info", tmp_path / "scan.zarr")["labels"] == ["x"]
    assert printed(capsys, "segment", scan, "--model", model, "--name", "x")["blocks_run"] == 0


def test_plan_tells_what_segment_does_and_writes_nothing(tmp_path, image, capsys):
    model = model_file(tmp_path / "model.safetensors")
    before = tree_digest(tmp_path)
    document = printed(capsys, "plan", image, "--model", model)
    assert document["blocks"] == 24
    assert document["halo_tax"] > 1
    assert document["peak_bytes"] <= document["budget_bytes"]
    assert (document["normalisation"], document["limits"]) == ("zscore", [])
    timed = printed(capsys, "plan", image, "--model", model, "--calibrate")
    assert timed["voxels_per_s"] == pytest.approx(20 * 40 * 50 / timed["seconds"])
    assert "seconds" not in printed(capsys, "plan", image, "--model", model, "--calibrate", "--engine", "reference")
    for scheme, told in ((["--tile", "22"], True), ([], False)):
        assert main(["plan", str(image), "--model", str(model), "--calibrate", *scheme]) == 0
        assert ("no time is told: slabs of columns are timed" in capsys.readouterr().err) is told
    assert tree_digest(tmp_path) == before


def test_labels_are_ingested_and_evaluated_against_themselves(tmp_path, image, capsys):
    truth = np.where(np.random.default_rng(0).random((20, 40, 50)) < 0.3, 0, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "truth.tif", truth)
    printed(capsys, "ingest", "--labels-of", image, "--name", "truth", tmp_path / "truth.tif")
    figures = printed(capsys, "evaluate", image / "labels" / "truth", tmp_path / "truth.tif")
    assert (figures["mean_dice"], figures["pixel_error"], figures["voxels"]) == (1.0, 0.0, 40_000)


def test_a_dataset_of_a_file_is_told_of_compared_and_segmented(tmp_path, scan, image, capsys):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["raw"] = tifffile.imread(scan)
        file["truth"] = (file["raw"][:] > 128).astype(np.uint8)
    raw, truth = (f"{tmp_path}/all.h5::{name}" for name in ("raw", "truth"))
    assert printed(capsys, "info", truth)["shape"] == [20, 40, 50]
    printed(capsys, "ingest", "--labels-of", image, "--name", "truth", truth)
    assert printed(capsys, "evaluate", image / "labels" / "truth", truth)["mean_dice"] == 1.0
    model = model_file(tmp_path / "model.safetensors")
    assert printed(capsys, "segment", raw, "--model", model, "--name", "x")["voxels"] == 40_000


def test_tables_are_for_people_and_progress_is_not_on_stdout(image, capsys):
    assert main(["info", str(image)]) == 0
    out, _ = capsys.readouterr()
    assert "20 x 40 x 50" in out


def test_bad_scans_are_refused_and_nothing_is_written(tmp_path, scan, capsys):
    image = tmp_path / "new.zarr"
    assert "nothing.tif" in fails(capsys, "ingest", tmp_path / "nothing.tif", image)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(scan.read_bytes()[: scan.stat().st_size * 2 // 3])
    assert "cut.tif" in fails(capsys, "ingest", cut, image)
    prose = tmp_path / "prose.tif"
    prose.write_text("this is no picture")
    assert "prose.tif" in fails(capsys, "ingest", prose, image)
    nan = tmp_path / "nan.npy"
    np.save(nan, np.full((20, 20), np.nan, np.float32))
    assert "finite" in fails(capsys, "ingest", nan, image)
    assert "voxel size needs 3 numbers" in fails(capsys, "ingest", scan, image, "--voxel-size-um", "1,1")
    assert not image.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "holds other files" in fails(capsys, "ingest", scan, other)
    assert [p.name for p in other.iterdir()] == ["notes.txt"]


def test_another_scan_is_not_mixed_into_an_image(tmp_path, image, capsys):
    before = tree_digest(image)
    scan_file(tmp_path / "second.tif", (20, 40, 50), seed=1)
    assert "must be of this scan" in fails(capsys, "ingest", tmp_path / "second.tif", image)
    assert tree_digest(image) == before
    assert printed(capsys, "ingest", tmp_path / "second.tif", image, "--overwrite")["complete"]
    assert tree_digest(image) != before


def test_labels_that_are_none_are_refused(tmp_path, image, capsys):
    before = tree_digest(image)
    np.save(tmp_path / "float.npy", np.full((20, 40, 50), 0.5, np.float32))
    np.save(tmp_path / "small.npy", np.zeros((20, 40, 49), np.uint8))
    labels = ["ingest", "--labels-of", image, "--name", "x"]
    assert "must be integers" in fails(capsys, *labels, tmp_path / "float.npy")
    assert fails(capsys, *labels, tmp_path / "small.npy").endswith("small.npy; pad or crop them")
    np.save(tmp_path / "colours.npy", np.zeros((20, 40, 50, 3), np.uint8))
    assert fails(capsys, *labels, tmp_path / "colours.npy").endswith("npy; save one value per voxel, without channels")
    assert "label name" in fails(capsys, "ingest", "--labels-of", image, "--name", "../x", tmp_path / "small.npy")
    assert tree_digest(image) == before


def test_models_that_do_not_fit_are_refused(tmp_path, image, capsys):
    before = tree_digest(image)
    rgb = model_file(tmp_path / "rgb.safetensors", UNetSettings(dims=3, in_channels=3, width=2, depth=1))
    assert "channels" in fails(capsys, "segment", image, "--model", rgb, "--name", "x")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((tmp_path / "rgb.safetensors").read_bytes()[:-100])
    assert "broken.safetensors" in fails(capsys, "segment", image, "--model", broken, "--name", "x")
    assert "scan.tif" in fails(capsys, "segment", image, "--model", tmp_path / "scan.tif", "--name", "x")
    assert "nothing" in fails(capsys, "segment", image, "--model", tmp_path / "nothing", "--name", "x")
    flat = tmp_path / "flat.npy"
    np.save(flat, np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8))
    volume = model_file(tmp_path / "volume.safetensors")
    assert "3-D network needs a volume" in fails(capsys, "segment", flat, "--model", volume, "--name", "x")
    assert not flat.with_suffix(".zarr").exists()
    assert tree_digest(image) == before


def test_settings_that_cannot_be_are_refused(tmp_path, image, capsys):
    model, before = model_file(tmp_path / "model.safetensors"), tree_digest(image)
    segment = ["segment", image, "--model", model, "--name", "x"]
    assert "narrowest columns need" in fails(capsys, *segment, "--budget", "10K")
    assert "smallest tile" in fails(capsys, *segment, "--budget", "100K", "--engine", "reference")
    assert "slab must be a multiple of the stride" in fails(capsys, *segment, "--slab", "3")
    assert "a column needs 3 numbers" in fails(capsys, *segment, "--column", "3")
    assert "by tiles or by columns" in fails(capsys, *segment, "--slab", "4", "--tile", "22")
    assert "reference engine runs tiles in float32" in fails(
        capsys, *segment, "--engine", "reference", "--precision", "bf16"
    )
    assert "precision fp16 needs a GPU" in fails(capsys, *segment, "--precision", "fp16", "--device", "cpu")
    assert "tile must be twice the halo" in fails(capsys, *segment, "--tile", "21")
    assert "must fit the budget" in fails(capsys, *segment, "--tile", "22", "--budget", "60K")
    assert "cluster must be" in fails(capsys, *segment, "--cluster", "nowhere")
    for bad in (["--budget", "much"], ["--tile", "0"], ["--workers", "-1"], ["--no-such-thing"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(a) for a in (*segment, *bad)])
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree_digest(image) == before


def test_an_unreachable_scheduler_is_refused_soon(tmp_path, image, capsys, monkeypatch):
    assert CONNECT_TIMEOUT_S <= 30
    monkeypatch.setattr("pipeline.compute.cluster.CONNECT_TIMEOUT_S", 1.0)
    model, before = model_file(tmp_path / "model.safetensors"), tree_digest(image)
    begin = time.monotonic()
    line = fails(capsys, "segment", image, "--model", model, "--name", "x", "--cluster", "tcp://127.0.0.1:9")
    assert "tcp://127.0.0.1:9 within 1 s" in line
    assert time.monotonic() - begin < 20
    assert tree_digest(image) == before


def test_a_scan_is_not_ingested_for_a_segmentation_that_cannot_be(tmp_path, scan, capsys):
    segment = ["segment", scan, "--model", model_file(tmp_path / "model.safetensors")]
    assert "label name" in fails(capsys, *segment, "--name", "../x")
    assert "label name" in fails(capsys, *segment, "--name", "zarr.json")
    assert "tile must be twice the halo" in fails(capsys, *segment, "--name", "x", "--tile", "21")
    assert "slab must be a multiple of the stride" in fails(capsys, *segment, "--name", "x", "--slab", "3")
    assert "by tiles or by columns" in fails(capsys, *segment, "--name", "x", "--slab", "4", "--tile", "22")
    assert not scan.with_suffix(".zarr").exists()


def test_images_lie_beside_their_scans(tmp_path, capsys):
    model = model_file(tmp_path / "model.safetensors")
    folder = tmp_path / "day.1"
    folder.mkdir()
    for z in range(2):
        tifffile.imwrite(folder / f"{z}.tif", np.full((20, 30), z, np.uint8))
    for path in (f"{folder}/", folder / "*.tif"):
        document = printed(capsys, "segment", path, "--model", model, "--name", "x")
        assert document["labels"] == str(tmp_path / "day.1.zarr" / "labels" / "x")
        shutil.rmtree(tmp_path / "day.1.zarr")
    assert sorted(p.name for p in folder.iterdir()) == ["0.tif", "1.tif"]


def test_an_image_beside_its_scan_is_taken_with_its_own_settings(tmp_path, image, scan, capsys):
    model = model_file(tmp_path / "model.safetensors")
    assert printed(capsys, "segment", scan, "--model", model, "--name", "x")["blocks"] == 24


def test_a_truth_that_names_its_own_classes_is_not_translated(tmp_path, capsys):
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1)
    np.save(tmp_path / "scan.npy", np.ones((20, 20), np.uint8))
    image = tmp_path / "scan.zarr"
    printed(capsys, "ingest", tmp_path / "scan.npy", image)
    for name, values in (("a", (1, 2)), ("b", (7, 8))):
        model = model_file(tmp_path / f"{name}.safetensors", settings, seed=2, class_values=values)
        printed(capsys, "segment", image, "--model", model, "--name", name)
    assert np.unique(open_labels(image / "labels" / "b").array[:]).tolist() == [1]
    figures = printed(capsys, "evaluate", image / "labels" / "a", image / "labels" / "b")
    assert figures["accuracy"] == 1.0


def test_an_empty_argument_is_not_this_folder(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((9, 9), np.uint8))
    tifffile.imwrite(tmp_path / "0.tif", np.zeros((9, 9), np.uint8))
    monkeypatch.chdir(tmp_path)
    for arguments in (["info", ""], ["ingest", "", "x.zarr"], ["ingest", "a.npy", "x.zarr", "--labels-of", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert "an argument must not be empty" in line
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(("value", "told"), [
    (65535.0, "65,535"), (-32768.0, "-32,768"), (343178.4, "343,178"), (0.0008626, "0.0008626"), (3e38, "3e+38"),
])  # fmt: skip
def test_numbers_are_told_as_people_read_them(value, told):
    assert readable("max", value) == told


def test_paths_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "[old]"
    folder.mkdir()
    np.save(folder / "a.npy", np.zeros((9, 9), np.uint8))
    assert main(["info", str(folder / "a.npy")]) == 0
    assert "[old]" in capsys.readouterr()[0]


def test_storage_that_cannot_be_used_is_one_line(tmp_path, scan, capsys):
    assert "Protocol not known" in fails(capsys, "ingest", scan, "nowhere://x/y.zarr")
    assert main(["ingest", str(scan), str(scan / "below.zarr")]) == 1
    out, err = capsys.readouterr()
    assert (out, "haloseg: " in err, "Traceback" in err) == ("", True, False)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, scan):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.decode().strip()}")
    command = [sys.executable, "-m", "pipeline.cli", "ingest", scan, small / "scan.zarr", "--shard", "16"]
    try:
        full = subprocess.run(command, check=False, capture_output=True, text=True)
        assert full.returncode == 1
        assert [line for line in full.stderr.splitlines() if "full disk" in line and line.startswith("haloseg:")]
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([*command[:4], scan, tmp_path / "scan.zarr", "--shard", "16"], check=True, capture_output=True)
        ours, theirs = tree_digest(small / "scan.zarr"), tree_digest(tmp_path / "scan.zarr")
        assert ours == theirs
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_stack_that_is_cut_off_is_refused_and_not_read_as_its_first_slice(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "whole.tif", np.arange(5 * 24 * 32, dtype=np.uint8).reshape(5, 24, 32), imagej=True)
    content = (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    assert main(["info", str(tmp_path / "cut.tif")]) == 2
    assert "a scan must be whole and decodable, got " in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["labels/x", "labels/x/0", "0", "labels"])
def test_what_lies_in_an_image_is_no_scan_that_an_image_is_made_of_there(tmp_path, image, capsys, inside):
    model = model_file(tmp_path / "model.safetensors")
    printed(capsys, "segment", image, "--model", model, "--name", "x")
    before = tree_digest(tmp_path)
    told = fails(capsys, "segment", image / inside, "--model", model, "--name", "y")
    assert told == f"haloseg: a scan must not lie in an image, got {image / inside} in {image}; name the image instead"
    assert tree_digest(tmp_path) == before


def test_a_scan_that_has_changed_is_refused_with_what_to_do(tmp_path, scan, capsys):
    model = model_file(tmp_path / "model.safetensors")
    printed(capsys, "segment", scan, "--model", model, "--name", "x")
    scan_file(scan, (20, 40, 50), seed=1)
    told = fails(capsys, "segment", scan, "--model", model, "--name", "x")
    assert "haloseg ingest SCAN IMAGE --overwrite" in told
    printed(capsys, "ingest", scan, scan.with_suffix(".zarr"), "--overwrite")
    assert printed(capsys, "segment", scan, "--model", model, "--name", "x")["blocks_run"] > 0


def test_labels_that_somebody_has_drawn_are_not_to_be_deleted(tmp_path, image, capsys):
    model = model_file(tmp_path / "model.safetensors")
    np.save(tmp_path / "truth.npy", np.zeros((20, 40, 50), np.uint8))
    printed(capsys, "ingest", "--labels-of", image, "--name", "truth", tmp_path / "truth.npy")
    told = fails(capsys, "segment", image, "--model", model, "--name", "truth")
    assert "must come from one run, got haloseg segment where those of haloseg ingest are" in told
    assert told.endswith("; choose another name")
