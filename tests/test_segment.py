import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from volumes import as_of_before, model_file, n_whole, scan_file, tree_digest, whole_scan

from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Scheme
from pipeline.errors import QuarantineError, RunError, StoreError
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import as_image, image_beside, segment
from pipeline.store.arrays import open_array
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels, published
from pipeline.store.location import Location
from pipeline.store.statistics import Normalisation
from pipeline.unet.onednn import OneDnnEngine
from pipeline.unet.settings import Block, Down, Family, Padding, UNetSettings, closed_form_rule
from pipeline.works.columns import SegmentColumns

CASES = {
    "3-D same": ((33, 34, 20), UNetSettings(dims=3, width=2, depth=2, padding=Padding.SAME, n_convs=1)),
    "3-D valid BatchNorm": (
        (9, 36, 15), UNetSettings(dims=3, width=2, depth=1, padding=Padding.VALID, batch_norm=True)
    ),
    "2-D valid": ((110, 131), UNetSettings(dims=2, width=2, depth=3, padding=Padding.VALID)),
    "2-D same, 3 classes": (
        (70, 77), UNetSettings(dims=2, width=3, depth=2, n_classes=3, padding=Padding.SAME, batch_norm=True)
    ),
    "2-D over a volume": ((5, 60, 41), UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME)),
    "thick slices": (
        (5, 33, 19),
        UNetSettings(dims=3, width=2, depth=2, padding=Padding.SAME, n_convs=1, poolings=((1, 2, 2), (2, 2, 2))),
    ),
    "attention, residual": (
        (50, 37), UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, attention=True, block=Block.RESIDUAL)
    ),
    "V-Net": (
        (7, 21, 12), UNetSettings(dims=3, width=2, depth=1, padding=Padding.SAME, n_convs=1, kernel=5,
                                   block=Block.RESIDUAL, down=Down.STRIDED, batch_norm=True),
    ),
    "U-Net++": (
        (45, 37), UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME, n_convs=1, family=Family.NESTED,
                               block=Block.PREACTIVATED, batch_norm=True, deep_supervision=True),
    ),
    "FCN": ((47, 41), UNetSettings(dims=2, width=2, depth=3, padding=Padding.SAME, n_convs=1, family=Family.FCN)),
    "one voxel": ((1, 1), UNetSettings(dims=2, width=2, depth=2, padding=Padding.VALID)),
    "smaller than the halo": ((3, 2, 4), UNetSettings(dims=3, width=2, depth=2, padding=Padding.SAME)),
}  # fmt: skip


def prepared(tmp_path, shape, settings, **layout):
    scan, image = tmp_path / "scan.npy", str(tmp_path / "scan.zarr")
    voxels = scan_file(tmp_path / "scan.tif", shape)
    np.save(scan, voxels)
    ingest(str(scan), image, **layout)
    return voxels, image, model_file(tmp_path / "model.safetensors", settings)


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_labels_and_probabilities_are_those_of_the_whole_scan(tmp_path, shape, settings):
    n = len(shape)
    voxels, image, model = prepared(tmp_path, shape, settings, chunk=(16,) * n, shard=(32,) * n)
    rule = closed_form_rule(settings)
    smallest = rule.tile_shape(rule.stride)
    expected = whole_scan(voxels[None], model, open_image(image).statistics)
    schemes = {
        "columns": Scheme(), "thin": Scheme(slab=settings.stride, column=(1,) * n), "tiles": Scheme(tile=smallest),
        "reference": Scheme(tile=rule.tile_shape(tuple(2 * s for s in rule.stride)), engine=EngineName.REFERENCE),
        "chosen": Scheme(engine=EngineName.REFERENCE),
    }  # fmt: skip
    assert plan_segment(image, model=model, name="x").columns is not None
    for name, scheme in schemes.items():
        plan = plan_segment(image, model=model, name=name, scheme=scheme, probabilities=True)
        segment(plan, run=run_serial)
        likely = open_image_array(image, f"probabilities/{name}/0")
        assert np.abs(likely - expected).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], expected.argmax(axis=0))
    assert len(np.unique(expected.argmax(axis=0))) > 1 or expected[0].size < 50


@pytest.mark.parametrize("dims", [2, 3])
def test_a_clamped_window_is_clamped_by_every_engine(tmp_path, dims):
    settings = UNetSettings(dims=dims, width=2, depth=1, padding=Padding.SAME, n_convs=1)
    about = {"normalisation": Normalisation.WINDOW, "limits": ((110.0, 140.0),)}
    voxels, image, _ = prepared(tmp_path, (18, 30, 21), settings, chunk=(16,) * 3, shard=(32,) * 3)
    model = model_file(tmp_path / "window.safetensors", settings, **about)
    statistics = open_image(image).statistics
    expected = whole_scan(voxels[None], model, statistics)
    for name, scheme in {"columns": Scheme(slab=2, column=(1,) * 3), "tiles": Scheme(tile=(16,) * dims)}.items():
        done = segment(plan_segment(image, model=model, name=name, scheme=scheme, probabilities=True), run=run_serial)
        assert np.abs(open_image_array(image, f"probabilities/{name}/0") - expected).max() <= 1e-5
        assert done.certificate["max_difference"] <= 1e-5
    clamped = np.clip(voxels, 110, 140)  # the network cannot tell them apart
    assert np.array_equal(whole_scan(clamped[None], model, statistics), expected)
    assert (clamped != voxels).mean() > 0.2


def uneven(voxels):
    """Return the volume as an instrument might have it that changes from slice to slice, uint16."""
    gains, offsets = np.array([1, 3, 2, 5, 4, 7, 6]), 40 * np.array([9, 1, 30, 4, 0, 17, 8])
    return (voxels * gains[:, None, None] + offsets[:, None, None]).astype(np.uint16)


def test_each_slice_is_seen_by_its_own_statistics_alike_by_every_engine(tmp_path):
    settings = UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME)
    about = {"normalisation": Normalisation.ZSCORE_SLICEWISE}
    layout = {"chunk": (4, 16, 16), "shard": (4, 32, 32)}  # the last shard is of three slices
    voxels, even, _ = prepared(tmp_path, (7, 60, 41), settings, **layout)
    model = model_file(tmp_path / "slicewise.safetensors", settings, **about)
    image, changed = str(tmp_path / "uneven.zarr"), uneven(voxels)
    np.save(tmp_path / "uneven.npy", changed)
    ingest(str(tmp_path / "uneven.npy"), image, **layout)
    expected = whole_scan(changed[None], model, None)
    schemes = {
        "columns": Scheme(), "thin": Scheme(slab=4, column=(1,) * 3), "tiles": Scheme(tile=(52, 64)),
        "few": Scheme(tile=(60, 60), budget_bytes=600_000), "reference": Scheme(engine=EngineName.REFERENCE),
    }  # fmt: skip
    for name, scheme in schemes.items():
        done = segment(plan_segment(image, model=model, name=name, scheme=scheme, probabilities=True), run=run_serial)
        assert np.abs(open_image_array(image, f"probabilities/{name}/0") - expected).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], expected.argmax(axis=0))
        assert done.certificate is None or done.certificate["max_difference"] <= 1e-5
    # brightness and contrast of a slice do not matter; by those of the whole scan they do
    segment(plan_segment(even, model=model, name="x", probabilities=True), run=run_serial)
    assert np.abs(open_image_array(even, "probabilities/x/0") - expected).max() <= 1e-5
    of_scan = whole_scan(changed[None], model_file(tmp_path / "m", settings), open_image(image).statistics)
    assert (of_scan.argmax(0) != expected.argmax(0)).mean() > 0.1


def test_statistics_of_slices_are_part_of_what_labels_are_known_by_and_are_added_where_a_scan_was_ingested_before(
    tmp_path,
):
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME)
    _, _, usual = prepared(tmp_path, (3, 30, 31), settings)
    model = model_file(tmp_path / "by-slice.safetensors", settings, normalisation=Normalisation.ZSCORE_SLICEWISE)
    scan, image = str(tmp_path / "scan.npy"), tmp_path / "scan.zarr"
    plans = [plan_segment(str(image), model=each, name="x").result.fingerprint["image"] for each in (usual, model)]
    assert plans[0] != plans[1]
    as_of_before(image)
    assert plan_segment(str(image), model=usual, name="x").result.fingerprint["image"] == plans[0]
    with pytest.raises(StoreError, match="run the same haloseg ingest again"):
        plan_segment(str(image), model=model, name="x")
    before = tree_digest(image)
    assert as_image(scan, model=usual, name="x") == str(image)
    assert tree_digest(image) == before
    assert as_image(scan, model=model, name="x") == str(image)
    assert plan_segment(str(image), model=model, name="x").result.fingerprint["image"] == plans[1]


def open_image_array(image, path):
    return open_array(Location(image) / path)[:]


ONE = Scheme(column=(1, 1, 1))


def test_a_run_that_stops_anywhere_goes_on_and_ends_in_the_same_bytes(tmp_path):
    _, image, model = prepared(tmp_path, (40, 50, 37), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    segment(plan_segment(image, model=model, name="undisturbed"), run=run_serial)
    expected = tree_digest(f"{image}/labels/undisturbed", without=("zarr.json",))
    n_blocks = len(plan_segment(image, model=model, name="x").grid)
    for n_before in (0, 1, n_blocks // 2, n_blocks - 1):
        name = f"stopped-{n_before}"
        plan = plan_segment(image, model=model, name=name, scheme=ONE)
        with pytest.raises(KeyboardInterrupt):
            segment(plan, run=stopping_after(n_before))
        assert name not in published(Location(image) / "labels")
        with pytest.raises(StoreError, match="unfinished run"):
            open_labels(f"{image}/labels/{name}")
        done = segment(plan_segment(image, model=model, name=name, scheme=ONE), run=run_serial)
        assert done.n_run == n_blocks - n_before
        assert tree_digest(f"{image}/labels/{name}", without=("zarr.json",)) == expected


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(column=(3, 1, 2)), Scheme(budget_bytes=600_000)])
def test_a_column_that_lacks_any_shards_computes_those_alone_and_ends_in_the_same_bytes(tmp_path, scheme):
    _, image, model = prepared(tmp_path, (70, 50, 37), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    plan = plan_segment(image, model=model, name="x", scheme=scheme)
    segment(plan, run=run_serial)
    expected = tree_digest(f"{image}/labels/x")
    rng = np.random.default_rng(0)
    for n_lost in (1, 7, len(plan.grid) // 2):
        lost = rng.choice(len(plan.grid), n_lost, replace=False)
        for index in lost:
            position = "/".join(map(str, plan.grid.block(int(index)).position))
            (plan.labels.location / f"0/c/{position}").delete()
        done = segment(plan_segment(image, model=model, name="x", scheme=scheme), run=run_serial)
        assert done.n_run == n_lost
        assert tree_digest(f"{image}/labels/x") == expected


def test_a_column_too_wide_for_the_device_is_run_in_parts_and_ends_in_the_same_bytes(tmp_path, monkeypatch, caplog):
    _, image, model = prepared(tmp_path, (70, 50, 37), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    segment(plan_segment(image, model=model, name="free"), run=run_serial)
    plan, compute, n_calls = plan_segment(image, model=model, name="full"), OneDnnEngine.conv, 0

    def full(self, at, x, *, padding=()):
        nonlocal n_calls
        n_calls += 1
        if n_calls > 20 and x.numel() > 40_000:  # after some slabs have been given already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, at, x, padding=padding)

    monkeypatch.setattr(OneDnnEngine, "conv", full)
    segment(plan, run=run_serial)
    assert "out of device memory: parts of" in caplog.text
    assert tree_digest(f"{image}/labels/full/0") == tree_digest(f"{image}/labels/free/0")


def test_a_plan_is_for_as_many_workers_as_the_whole_run_is_worth_also_when_some_is_done(tmp_path):
    _, image, model = prepared(tmp_path, (70, 50, 37), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    plan = plan_segment(image, model=model, name="x", scheme=Scheme(n_workers=4))
    bare = plan.multiply_adds / plan.halo_tax
    for worth, n_workers in ((None, 4), (bare / 9, 4), (bare * 1.01, 1), (bare / 2.5, 3)):
        scheme = Scheme(n_workers=4, worth_a_worker=worth and round(worth))
        planned = plan_segment(image, model=model, name="x", scheme=scheme)
        assert planned.n_workers == n_workers
        assert planned.columns == plan_segment(image, model=model, name="x", scheme=Scheme(n_workers=n_workers)).columns
    with pytest.raises(KeyboardInterrupt):
        segment(planned, run=stopping_after(1))
    assert 0 < len(planned.done()) < len(planned.grid)
    again = plan_segment(image, model=model, name="x", scheme=scheme)
    assert (again.n_workers, again.columns) == (3, planned.columns)


def stopping_after(n_blocks):
    """Return a runner that is interrupted after some blocks, in the middle of the next one's write."""

    def run(work, indices, *, on_record):
        indices = list(indices)
        run_serial(work, indices[:n_blocks], on_record=on_record)
        if isinstance(work, SegmentColumns):
            partial = work.outputs.labels / "c/0/0/0.0123456789abcdef.partial"
            partial.write_bytes(b"half a shard")
        raise KeyboardInterrupt

    return run


def test_a_killed_process_group_goes_on_where_it_was(tmp_path):
    _, image, model = prepared(tmp_path, (96, 112, 112), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    command = [sys.executable, "-m", "pipeline.cli", "segment", image, "--model", model, "--json", "--workers", "2"]
    segment(plan_segment(image, model=model, name="undisturbed"), run=run_serial)
    victim = subprocess.Popen([*command, "--name", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # fmt: skip
    shards = Location(f"{image}/labels/killed/0/c")
    deadline = time.monotonic() + 60
    while n_whole(shards) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    n_before = n_whole(shards)
    assert 0 < n_before < 294
    again = subprocess.run([*command, "--name", "killed"], check=True, capture_output=True, text=True)
    told = json.loads(again.stdout)
    assert (told["blocks_kept"], told["blocks_retried"], told["retries"]) == (n_before, 0, [])
    assert digest_but_name(image, "killed") == digest_but_name(image, "undisturbed")


def digest_but_name(image, name):
    """Return what tree_digest does of a label volume; its metadata, which hold its name, are compared without it."""
    folder = Path(image) / "labels" / name
    metadata = json.loads((folder / "zarr.json").read_text())
    for each in metadata["attributes"]["ome"]["multiscales"]:
        assert each.pop("name") == name
    return tree_digest(folder) | {"zarr.json": metadata}


def test_blocks_that_fail_are_quarantined_and_a_rerun_does_those_alone(tmp_path):
    _, image, model = prepared(tmp_path, (100, 90), CASES["2-D same, 3 classes"][1], chunk=(16,) * 2, shard=(16,) * 2)
    shard = tmp_path / "scan.zarr" / "0" / "c" / "0" / "0" / "0"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-40] + bytes(40))
    with pytest.raises(QuarantineError, match="failed again and again"):
        segment(plan_segment(image, model=model, name="x"), run=run_serial)
    assert published(Location(image) / "labels") == []
    n_done = len(plan_segment(image, model=model, name="x").done())
    assert 0 < n_done < 42
    shard.write_bytes(kept)
    assert segment(plan_segment(image, model=model, name="x"), run=run_serial).n_run == 42 - n_done


def test_another_model_does_not_mix_into_the_same_labels(tmp_path):
    _, image, model = prepared(tmp_path, (40, 40), CASES["2-D same, 3 classes"][1])
    segment(plan_segment(image, model=model, name="x"), run=run_serial)
    before = tree_digest(image)
    other = model_file(tmp_path / "other.safetensors", CASES["2-D same, 3 classes"][1], seed=5)
    with pytest.raises(StoreError, match="got another model"):
        plan_segment(image, model=other, name="x")
    assert tree_digest(image) == before
    assert segment(plan_segment(image, model=model, name="x"), run=run_serial).n_run == 0
    assert tree_digest(image) == before


def test_probabilities_of_another_model_are_not_taken_for_done(tmp_path):
    settings = CASES["2-D same, 3 classes"][1]
    _, image, model = prepared(tmp_path, (40, 40), settings)
    segment(plan_segment(image, model=model, name="x", probabilities=True), run=run_serial)
    other = model_file(tmp_path / "other.safetensors", settings, seed=5)
    Location(f"{image}/labels/x").delete()
    segment(plan_segment(image, model=other, name="x"), run=run_serial)
    with pytest.raises(StoreError, match="probabilities x must come from one run, got another model"):
        plan_segment(image, model=other, name="x", probabilities=True)


def test_a_model_that_is_replaced_during_a_run_ends_it(tmp_path):
    settings = CASES["2-D same, 3 classes"][1]
    _, image, model = prepared(tmp_path, (40, 40), settings)
    plan = plan_segment(image, model=model, name="x")
    model_file(model, settings, seed=5)
    with pytest.raises(RunError, match="the model must stay the same"):
        segment(plan, run=run_serial)
    assert published(Location(image) / "labels") == []


def test_blocks_run_in_another_folder_whatever_path_was_given(tmp_path, monkeypatch):
    prepared(tmp_path, (40, 40), CASES["2-D same, 3 classes"][1])
    monkeypatch.chdir(tmp_path)
    plan = plan_segment("scan.zarr", model="model.safetensors", name="x")

    def elsewhere(work, indices, *, on_record):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with monkeypatch.context() as other:
            other.chdir(tmp_path / "elsewhere")
            return run_serial(work, indices, on_record=on_record)

    assert segment(plan, run=elsewhere).n_run == 1
    assert open_labels("scan.zarr/labels/x").spatial_shape == (40, 40)


def test_a_killed_worker_costs_nothing_but_time(tmp_path):
    _, image, model = prepared(tmp_path, (64, 96, 96), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    command = [sys.executable, "-m", "pipeline.cli", "segment", image, "--model", model, "--json", "--name"]
    segment(plan_segment(image, model=model, name="undisturbed"), run=run_serial)
    run = subprocess.Popen([*command, "killed", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    shards = Location(f"{image}/labels/killed/0/c")
    deadline = time.monotonic() + 60
    while n_whole(shards) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    out, _ = run.communicate(timeout=120)
    assert (len(workers), run.returncode) == (2, 0)
    assert json.loads(out)["blocks_run"] == 144
    assert digest_but_name(image, "killed") == digest_but_name(image, "undisturbed")


IMAGES = {
    "scan.tif": "scan.zarr", "scan.1.tif": "scan.1.zarr", "scan": "scan.zarr", "scan.NII.gz": "scan.zarr",
    "scan.gz": "scan.zarr", "scan.zarr": "scan.haloseg.zarr", "scan.ome.tif": "scan.ome.zarr",
    "all.h5": "all.zarr", "all.h5::raw": "all.raw.zarr", "all.h5::/raw": "all.raw.zarr",
    "all.h5::truth": "all.truth.zarr", "all.h5::t0/s 1:2/raw": "all.t0-s-1-2-raw.zarr", "all.h5::": "all.zarr",
}  # fmt: skip


@pytest.mark.parametrize("folder", ["a.b/", "s3://bucket/"])
@pytest.mark.parametrize(("scan", "image"), IMAGES.items(), ids=IMAGES)
def test_what_is_named_in_a_file_has_an_image_of_its_own(folder, scan, image):
    assert str(image_beside(f"{folder}{scan}")) == f"{folder}{image}"
