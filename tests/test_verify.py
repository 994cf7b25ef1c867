"""Certificates: of right labels they say so, of wrong ones too, and of lower precision its difference."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from volumes import model_file, scan_file, tree_digest, whole_scan

from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Precision, Scheme
from pipeline.errors import BudgetError, ModelError, StoreError
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.unet.onednn import OneDnnEngine
from pipeline.unet.settings import Head, Padding, UNetSettings
from pipeline.verify import verify
from pipeline.works.certify import sample_boxes

CASES = {
    "3-D same": ((40, 33, 50), UNetSettings(dims=3, width=4, depth=1, padding=Padding.SAME, batch_norm=True)),
    "2-D valid": ((90, 210), UNetSettings(dims=2, width=4, depth=2)),
    "2-D sigmoid on slices": ((3, 50, 60), UNetSettings(dims=2, width=4, depth=1, head=Head.SIGMOID, n_classes=2)),
    "one voxel": ((1, 1), UNetSettings(dims=2, width=2, depth=1)),
}


def segmented(tmp_path, shape, settings, **scheme):
    voxels = scan_file(tmp_path / "scan.tif", shape)
    image = str(ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")).location)
    model = model_file(tmp_path / "model.safetensors", settings)
    done = segment(plan_segment(image, model=model, name="x", scheme=Scheme(**scheme)), run=run_serial)
    return voxels, image, model, done


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("engine", EngineName)
def test_right_labels_are_certified_and_a_rerun_leaves_the_certificate(tmp_path, shape, settings, engine):
    _, image, model, done = segmented(tmp_path, shape, settings, engine=engine)
    certificate = done.certificate
    assert certificate["max_difference"] <= 1e-5
    assert (certificate["n_flipped_decided"], certificate["engine"]) == (0, engine)
    assert open_labels(f"{image}/labels/x").certificate == certificate
    before = tree_digest(image)
    again = segment(plan_segment(image, model=model, name="x", scheme=Scheme(engine=engine)), run=run_serial)
    assert again.certificate == certificate
    assert verify(image, name="x", run=run_serial).n_flipped_decided == 0
    assert tree_digest(image) == before


def test_wrong_labels_are_found_counted_and_told(tmp_path, caplog):
    shape, settings = CASES["3-D same"]
    _, image, _, _ = segmented(tmp_path, shape, settings)
    labels = open_labels(f"{image}/labels/x")
    right = labels.array[:]
    wrong = right.copy()
    wrong[:8, :8, :8] = 1 - wrong[:8, :8, :8]
    at = Location(image) / "labels" / "x" / "0"
    core = plan_segment(image, model=str(tmp_path / "model.safetensors"), name="x").grid.block(0).core
    write_shard(open_array(at), core, wrong[core.slices], location=at)
    found = verify(image, name="x", run=run_serial, n_boxes=1)
    assert found.n_flipped == min(512, found.n_voxels)
    assert 0.95 * found.n_flipped < found.n_flipped_decided
    assert found.max_difference <= 1e-5
    assert "float32 must differ from the reference by at most 1e-05" in caplog.text
    assert not found.is_rounding


def test_the_difference_of_lower_precision_is_measured_and_kept(tmp_path):
    shape, settings = (64, 80), UNetSettings(dims=2, width=8, depth=2, padding=Padding.SAME, batch_norm=True)
    voxels, image, model, done = segmented(tmp_path, shape, settings, precision=Precision.BF16)
    expected = whole_scan(voxels[None], model, open_image(image).statistics).argmax(0)
    certificate = done.certificate
    assert certificate["precision"] == "bf16"
    assert 1e-4 < certificate["max_difference"] < 0.1
    n_flipped = (open_labels(f"{image}/labels/x").array[:] != expected).sum()
    found = verify(image, name="x", n_boxes=400, run=run_serial)
    assert found.n_voxels > certificate["n_voxels"]
    assert n_flipped >= certificate["n_flipped"]
    assert 0.3 < (found.n_flipped / found.n_voxels) / (n_flipped / (64 * 80)) < 3
    with pytest.raises(StoreError, match="got another precision"):
        plan_segment(image, model=model, name="x")


@pytest.mark.parametrize("case", ["3-D same", "2-D sigmoid on slices"])
def test_boxes_that_do_not_fit_the_device_are_computed_in_parts(tmp_path, monkeypatch, caplog, case):
    shape, settings = CASES[case]
    _, image, _, _ = segmented(tmp_path, shape, settings)
    monkeypatch.setattr("pipeline.verify.LARGEST_SHARE", 1000.0)
    compute, sizes, most = OneDnnEngine.conv, [0], math.inf

    def limited(self, at, x, *, padding=()):
        sizes.append(x.numel())
        if x.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, at, x, padding=padding)

    monkeypatch.setattr(OneDnnEngine, "conv", limited)
    expected = verify(image, name="x", run=run_serial, n_boxes=8)
    most = max(sizes) // 2
    found = verify(image, name="x", run=run_serial, n_boxes=8)
    assert "out of device memory: parts of" in caplog.text
    assert replace(found, max_difference=0.0) == replace(expected, max_difference=0.0)
    assert found.max_difference <= 1e-5
    most = 1
    rule = r"^the device needs memory for the narrowest column, got out of memory; free it"
    with pytest.raises(BudgetError, match=rule):
        verify(image, name="x", run=run_serial, n_boxes=1)


def test_boxes_lie_in_the_scan_on_the_stride_with_both_corners():
    boxes = sample_boxes((100, 37), largest=(16, 16), stride=(8, 4), n=20, seed=0)
    assert boxes[0].start == (0, 0)
    assert boxes[1].start[0] + 16 > 96
    assert len(set(boxes)) == len(boxes) > 10
    for box in boxes:
        assert all(a % s == 0 and a < b <= n for a, b, s, n in zip(box.start, box.stop, (8, 4), (100, 37), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 59, 60, 61, 100_000])
def test_as_many_boxes_as_are_asked_for_or_all_that_there_are(n):
    boxes = sample_boxes((100, 37), largest=(16, 24), stride=(8, 4), n=n, seed=0)  # 12 x 5 places
    assert len(set(boxes)) == len(boxes) == min(n, 60)
    covered = np.zeros((100, 37), int)
    for box in boxes:
        covered[box.slices] += 1
    assert n < 60 or covered.all()


def test_more_boxes_than_there_are_is_told_in_one_line(tmp_path, capsys):
    shape, settings = (20, 24), UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME)
    segmented(tmp_path, shape, settings)
    for n, told in ((2, 0), (100_000, 1)):
        assert main(["verify", str(tmp_path / "scan.zarr"), "--name", "x", "--boxes", str(n), "--json"]) == 0
        out, err = capsys.readouterr()
        computed = json.loads(out)["n_boxes"]
        line = f"{computed:,} boxes are computed again, all that the volume has, not 100,000"
        assert (computed == n, " ".join(err.split()).count(line)) == (not told, told)


def test_the_command_prints_the_certificate_and_refuses_what_it_cannot_verify(tmp_path, capsys):
    shape, settings = CASES["2-D valid"]
    _, image, _, _ = segmented(tmp_path, shape, settings)
    assert main(["verify", image, "--name", "x", "--boxes", "3", "--workers", "1"]) == 0
    assert "max difference" in capsys.readouterr().out
    assert main(["verify", image, "--name", "y"]) == 2
    assert "labels must exist" in capsys.readouterr().err
    np.testing.assert_equal(main(["verify", image, "--name", "x", "--budget", "10K"]), 2)
    assert "raise --budget" in capsys.readouterr().err
    np.save(tmp_path / "truth.npy", np.zeros(shape, np.uint8))
    assert main(["ingest", "--labels-of", image, "--name", "truth", str(tmp_path / "truth.npy")]) == 0
    capsys.readouterr()
    for model in ([], ["--model", str(tmp_path / "model.safetensors")]):
        assert main(["verify", image, "--name", "truth", *model]) == 2
    (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        verify(image, name="x", run=run_serial)
    assert verify(image, name="x", model=str(tmp_path / "moved.safetensors"), run=run_serial).n_flipped_decided == 0


def test_the_command_fails_where_labels_are_not_those_of_the_network(tmp_path, capsys):
    shape, settings = CASES["2-D valid"]
    _, image, model, _ = segmented(tmp_path, shape, settings)
    command = ["verify", image, "--name", "x", "--json"]
    assert (main(command), json.loads(capsys.readouterr().out)["verified"]) == (0, True)
    labels = open_labels(f"{image}/labels/x")
    wrong, at = 1 - labels.array[:], Location(image) / "labels" / "x" / "0"
    for block in plan_segment(image, model=model, name="x").grid:
        write_shard(open_array(at), block.core, wrong[block.core.slices], location=at)
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert (found := json.loads(out))["verified"] is False
    assert found["n_flipped_decided"] > 0
    assert "float32 must differ" in err


def test_lower_precision_is_measured_but_not_judged(tmp_path, capsys):
    settings = UNetSettings(dims=2, width=8, depth=2, padding=Padding.SAME, batch_norm=True)
    _, image, _, _ = segmented(tmp_path, (64, 80), settings, precision=Precision.BF16)
    assert main(["verify", image, "--name", "x", "--boxes", "400", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_flipped_decided"] > 0
    assert "verified" not in found


def test_a_wrong_model_and_a_negative_seed_are_refused_in_one_line(tmp_path, capsys):
    shape, settings = CASES["2-D valid"]
    _, image, _, _ = segmented(tmp_path, shape, settings)
    other = model_file(tmp_path / "other.safetensors", settings, seed=7)
    assert main(["verify", image, "--name", "x", "--model", other]) == 2
    err = capsys.readouterr().err
    assert "a result must be verified with the model that made it, sha256" in err
    assert f"in {other}; give that one" in err
    assert "delete" not in err
    assert main(["verify", image, "--name", "x", "--seed", "-5"]) == 2
    assert "seed must be at least 0, got -5; use 0" in capsys.readouterr().err
