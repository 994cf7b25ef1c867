"""Networks that make images of images: learnt from pairs, predicted as on the whole scan, resumed, certified."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import Image as OmeImage
from volumes import model_file, n_whole, scan_file, tree_digest, whole_scan

from pipeline import cli
from pipeline.archive import Archive, State, survey
from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Precision, Scheme
from pipeline.errors import ArgumentError, ModelError, ScanError, StoreError
from pipeline.evaluate import evaluate
from pipeline.info import info
from pipeline.ingest import ingest, ingest_labels
from pipeline.plan import plan_segment
from pipeline.report import picture
from pipeline.segment import segment
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.image import open_image
from pipeline.store.location import Location
from pipeline.store.pyramid import Downsampling, downsample
from pipeline.store.results import is_published, open_result, read_result
from pipeline.train import train
from pipeline.unet.model import load_model
from pipeline.unet.settings import Head, Padding, UNetSettings, closed_form_rule
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.recipe import Recipe
from pipeline.verify import verify
from pipeline.works.certify import VALUE_TOLERANCE

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = (500.0, 0.01)
LINEAR = {"head": Head.LINEAR, "n_classes": 1}
CASES = {
    "3-D same": ((17, 21, 12), UNetSettings(dims=3, width=2, depth=2, padding=Padding.SAME, n_convs=1, **LINEAR)),
    "2-D valid, 2 channels": ((150, 71), UNetSettings(dims=2, width=2, depth=2, head=Head.LINEAR, n_classes=2)),
    "2-D over a volume": ((5, 60, 41), UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME, **LINEAR)),
    "one voxel": ((1, 1), UNetSettings(dims=2, width=2, depth=2, **LINEAR)),
}


def prepared(tmp_path, shape, settings, **layout):
    voxels = scan_file(tmp_path / "scan.tif", shape)
    image = str(ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), **layout).location)
    windows = (WINDOW,) * settings.n_classes
    return voxels, image, model_file(tmp_path / "model.safetensors", settings, target_windows=windows)


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_predictions_are_those_of_the_whole_scan_in_the_targets_intensities(tmp_path, shape, settings):
    n = len(shape)
    voxels, image, model = prepared(tmp_path, shape, settings, chunk=(16,) * n, shard=(32,) * n)
    offset, scale = WINDOW
    expected = whole_scan(voxels[None], model, open_image(image).statistics) / scale + offset
    rule = closed_form_rule(settings)
    smallest = rule.tile_shape(rule.stride)
    schemes = {
        "columns": Scheme(), "thin": Scheme(slab=settings.stride, column=(1,) * n), "tiles": Scheme(tile=smallest),
        "reference": Scheme(tile=smallest, engine=EngineName.REFERENCE),
    }  # fmt: skip
    for name, scheme in schemes.items():
        done = segment(plan_segment(image, model=model, name=name, scheme=scheme), run=run_serial)
        got = open_result(Location(image), name).array[:]
        assert got.dtype == np.float32
        assert np.abs(got - expected).max() <= VALUE_TOLERANCE / scale
        assert done.certificate["n_beyond_rounding"] == 0
    assert not (tmp_path / "scan.zarr" / "labels").exists()


def test_a_prediction_is_an_ome_zarr_image_with_a_pyramid_of_means(tmp_path):
    settings = CASES["2-D valid, 2 channels"][1]
    _, image, model = prepared(tmp_path, (300, 40), settings)
    plan = plan_segment(image, model=model, name="x")
    segment(plan, run=run_serial)
    group = zarr.open_group(f"{image}/predictions/x", mode="r")
    described = OmeImage.from_zarr(group).attributes.ome.multiscales[0]
    assert [axis.name for axis in described.axes] == ["c", "y", "x"]
    assert [dataset.path for dataset in described.datasets] == ["0", "1"]
    np.testing.assert_array_equal(group["1"][:], downsample(group["0"][:], (2, 2), Downsampling.MEAN))
    again = ingest(f"{image}/predictions/x", str(tmp_path / "again.zarr"))
    np.testing.assert_array_equal(again.array[:], group["0"][:])
    drawn = imagecodecs.png_decode(picture(open_image(image), open_result(Location(image), "x")))
    assert drawn.shape[2] == 3
    assert len(np.unique(drawn[:, -40:])) > 20


def stopping_after(n_blocks):
    def run(work, indices, *, on_record):
        run_serial(work, list(indices)[:n_blocks], on_record=on_record)
        (work.outputs.reals / "c/0/0/0/0.0123456789abcdef.partial").write_bytes(b"half a shard")
        raise KeyboardInterrupt

    return run


def test_a_run_that_stops_anywhere_ends_in_the_same_bytes(tmp_path):
    _, image, model = prepared(tmp_path, (40, 20, 37), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    one = Scheme(column=(1, 1, 1))
    segment(plan_segment(image, model=model, name="undisturbed", scheme=one), run=run_serial)
    expected = tree_digest(f"{image}/predictions/undisturbed", without=("zarr.json",))
    n_blocks = len(plan_segment(image, model=model, name="x").grid)
    for n_before in (0, n_blocks // 2):
        name = f"stopped-{n_before}"
        with pytest.raises(KeyboardInterrupt):
            segment(plan_segment(image, model=model, name=name, scheme=one), run=stopping_after(n_before))
        assert not is_published(read_result(Location(image), name))
        with pytest.raises(StoreError, match="a prediction must be complete, got an unfinished run"):
            evaluate(f"{image}/predictions/{name}", image)
        done = segment(plan_segment(image, model=model, name=name, scheme=one), run=run_serial)
        assert done.n_run == n_blocks - n_before
        assert tree_digest(f"{image}/predictions/{name}", without=("zarr.json",)) == expected
    before = tree_digest(image)
    assert segment(plan_segment(image, model=model, name=name, scheme=one), run=run_serial).n_run == 0
    assert tree_digest(image) == before


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(budget_bytes=600_000)])
def test_a_column_that_lacks_any_shards_computes_those_alone_and_ends_in_the_same_bytes(tmp_path, scheme):
    _, image, model = prepared(tmp_path, (70, 34, 20), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    plan = plan_segment(image, model=model, name="x", scheme=scheme)
    segment(plan, run=run_serial)
    expected = tree_digest(f"{image}/predictions/x")
    for index in np.random.default_rng(0).choice(len(plan.grid), 7, replace=False):
        position = "/".join(map(str, plan.grid.block(int(index)).position))
        (plan.result.location / f"0/c/0/{position}").delete()
    done = segment(plan_segment(image, model=model, name="x", scheme=scheme), run=run_serial)
    assert done.n_run == 7
    assert tree_digest(f"{image}/predictions/x") == expected


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    _, image, model = prepared(tmp_path, (64, 64, 128), CASES["3-D same"][1], chunk=(16,) * 3, shard=(16,) * 3)
    one = Scheme(column=(1, 1, 1))
    segment(plan_segment(image, model=model, name="undisturbed", scheme=one), run=run_serial)
    command = ["segment", image, "--model", model, "--json", "--workers", "1", "--column", "1,1,1", "--name", "killed"]
    victim = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    shards = Location(f"{image}/predictions/killed/0/c")
    deadline = time.monotonic() + 60
    while n_whole(shards) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    n_before = n_whole(shards)
    assert 5 <= n_before < 128
    plan = plan_segment(image, model=model, name="killed", scheme=one)
    assert segment(plan, run=run_serial).n_run == 128 - n_before
    digests = [tree_digest(f"{image}/predictions/{each}", without=("zarr.json",)) for each in ("killed", "undisturbed")]
    assert digests[0] == digests[1]


def test_wrong_values_and_lower_precision_are_found_and_counted(tmp_path):
    settings = replace(CASES["3-D same"][1], width=4)
    _, image, model = prepared(tmp_path, (40, 33, 50), settings)
    plan = plan_segment(image, model=model, name="x")
    segment(plan, run=run_serial)
    right, at = plan.result.array[:], plan.result.location / "0"
    wrong = right.copy()
    wrong[0, :8, :8, :8] += 7
    write_shard(open_array(at), plan.grid.block(0).core, wrong, location=at)
    found = verify(image, name="x", run=run_serial, n_boxes=1)
    assert found.n_beyond_rounding == min(512, found.n_voxels)
    assert (found.max_difference, found.max_difference_std) == (7.0, 0.07)
    low = segment(plan_segment(image, model=model, name="l", scheme=Scheme(precision=Precision.BF16)), run=run_serial)
    assert 1e-4 < low.certificate["max_difference_std"] < 0.2
    assert low.certificate["n_beyond_rounding"] > 0


def test_a_name_stands_for_one_volume(tmp_path):
    _, image, model = prepared(tmp_path, (40, 40), CASES["2-D valid, 2 channels"][1])
    segment(plan_segment(image, model=model, name="x"), run=run_serial)
    of_classes = model_file(tmp_path / "classes.safetensors", UNetSettings(dims=2, width=2, depth=1))
    with pytest.raises(StoreError, match=r"a name stands for one volume of an image, got x, .*predictions/x"):
        plan_segment(image, model=of_classes, name="x")
    np.save(tmp_path / "truth.npy", np.zeros((40, 40), np.uint8))
    with pytest.raises(StoreError, match="a name stands for one volume"):
        ingest_labels(str(tmp_path / "truth.npy"), image=image, name="x")
    segment(plan_segment(image, model=of_classes, name="y"), run=run_serial)
    with pytest.raises(StoreError, match=r"names .*labels/y; choose another name"):
        plan_segment(image, model=model, name="y")
    other = model_file(tmp_path / "other.safetensors", CASES["2-D valid, 2 channels"][1], seed=5,
                       target_windows=(WINDOW,) * 2)  # fmt: skip
    with pytest.raises(StoreError, match="prediction x must come from one run, got another model"):
        plan_segment(image, model=other, name="x")
    with pytest.raises(ArgumentError, match="probabilities need a network with classes"):
        plan_segment(image, model=model, name="z", probabilities=True)
    with pytest.raises(ScanError, match="values must be compared with values, got labels"):
        evaluate(f"{image}/predictions/x", f"{image}/labels/y")
    with pytest.raises(ScanError, match=r"one shape, got 2 x \(40, 40\) and 1 x \(40, 40\)"):
        evaluate(f"{image}/predictions/x", image)


def test_an_archive_knows_what_was_predicted(tmp_path):
    (tmp_path / "archive").mkdir()
    shape, settings = CASES["2-D valid, 2 channels"]
    _, _, model = prepared(tmp_path, shape, settings)
    shutil.move(tmp_path / "scan.tif", tmp_path / "archive" / "scan.tif")
    archive = Archive(str(tmp_path / "archive"), model, name="clean", settle_s=0)
    (scan,) = survey(archive).todo
    ingest(scan.path, scan.image)
    segment(plan_segment(scan.image, model=model, name="clean"), run=run_serial)
    found = survey(archive)
    assert ([each.state for each in found.scans], found.folder) == ([State.DONE], "predictions")
    other = model_file(tmp_path / "o.safetensors", settings, seed=1, target_windows=(WINDOW,) * 2)
    (blocked,) = survey(replace(archive, model=other)).scans
    assert blocked.detail.startswith("predictions clean are of another model; choose another name")


def test_a_brighter_image_is_made_brighter(pair, tmp_path):
    noisy, clean = pair
    train([noisy], targets=[clean], model=str(tmp_path / "m"), recipe=RECIPE)
    means = []
    for name, shift in (("dark", 0), ("bright", 500)):
        np.save(tmp_path / f"{name}.npy", open_image(noisy).array[0] + np.float32(shift))
        image = str(ingest(str(tmp_path / f"{name}.npy"), str(tmp_path / f"{name}.zarr")).location)
        made = segment(plan_segment(image, model=str(tmp_path / "m"), name="d"), run=run_serial)
        means.append(made.result.array[:].mean())
        assert made.certificate["n_beyond_rounding"] == 0
    assert 100 < means[1] - means[0] < 600  # by its own statistics it would be 0; what is learnt pulls to the mean


RECIPE = Recipe(
    loss=Loss.L1, width=4, depth=1, steps=60, validate_every=30, patch=32, batch=4, learning_rate=1e-2,
    augmentation=Augmentation(brightness=0, contrast=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A noisy image of floats and its clean one of integers."""
    folder = tmp_path_factory.mktemp("pair")
    clean = 20 * scan_file(folder / "clean.tif", (160, 144)).astype(np.uint16) + 1000
    noise = np.random.default_rng(0).normal(0, 900, clean.shape)
    for name, voxels in (("clean", clean), ("noisy", (clean + noise).astype(np.float32))):
        np.save(folder / f"{name}.npy", voxels)
        ingest(str(folder / f"{name}.npy"), str(folder / f"{name}.zarr"))
    return str(folder / "noisy.zarr"), str(folder / "clean.zarr")


@pytest.mark.parametrize("loss", [Loss.L1, Loss.L2])
def test_a_network_learns_to_remove_noise(pair, tmp_path, loss):
    noisy, clean = pair
    recipe = replace(RECIPE, loss=loss)
    result = train([noisy], targets=[clean], model=str(tmp_path / "m"), recipe=recipe)
    statistics = open_image(clean).statistics[0]
    model, of_noisy = load_model(tmp_path / "m"), open_image(noisy).statistics[0]
    assert model.target_windows == ((statistics.mean, 1 / statistics.std),)
    assert model.input_windows == ((of_noisy.mean, 1 / of_noisy.std),)
    made = segment(plan_segment(noisy, model=str(tmp_path / "m"), name=f"by-{loss}"), run=run_serial)
    before, after = (evaluate(each, clean).figures for each in (noisy, str(made.result.location)))
    assert after.psnr_db > before.psnr_db + 3
    assert result.best.psnr == pytest.approx(after.psnr_db, abs=1.5)  # of a fifth of the image
    assert after.rmse < 0.7 * before.rmse
    assert before.rmse == pytest.approx(900, rel=0.02)
    about = result.model.training["images"][0]
    assert (about["target"], about["target_statistics"][0]["mean"]) == ("clean.zarr", statistics.mean)


def test_a_training_that_was_stopped_makes_the_same_file_from_memory_and_from_disk(pair, tmp_path, monkeypatch):
    noisy, clean = pair
    recipe = replace(RECIPE, steps=4, validate_every=2, augmentation=Augmentation(rotation_degrees=20, brightness=0))
    given = {"targets": [clean], "recipe": recipe}
    train([noisy], model=str(tmp_path / "whole"), **given)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([noisy], model=str(tmp_path / "stopped"), on_progress=stop, **given)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    assert train([noisy], model=str(tmp_path / "stopped"), **given).n_before == 2
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes()


def test_pairs_that_do_not_belong_together_are_refused(pair, tmp_path):
    noisy, clean = pair
    np.save(tmp_path / "small.npy", np.zeros((40, 40), np.uint8))
    small = str(ingest(str(tmp_path / "small.npy"), str(tmp_path / "small.zarr")).location)
    given = {"model": str(tmp_path / "m"), "recipe": RECIPE}
    with pytest.raises(StoreError, match=r"a target must have the image's shape \(160, 144\), got \(40, 40\)"):
        train([noisy], targets=[small], **given)
    with pytest.raises(ArgumentError, match=r"each image needs its target, .* got 1 for 2 images"):
        train([noisy], targets=[clean], held_out=[small], **given)
    with pytest.raises(ArgumentError, match="l1 and l2 learn target images, the others labels, got l1 and labels"):
        train([noisy], labels="truth", **given)
    with pytest.raises(ArgumentError, match="got dice_cross_entropy and target images; set l1"):
        train([noisy], targets=[clean], model=str(tmp_path / "m"), recipe=Recipe())
    with pytest.raises(ArgumentError, match="learns labels or target images, got both or neither"):
        train([noisy], model=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_a_model_without_its_targets_windows_is_refused(tmp_path):
    settings = CASES["one voxel"][1]
    with pytest.raises(ArgumentError, match="a linear head needs an offset and a scale above 0 for each"):
        model_file(tmp_path / "m", settings)
    with pytest.raises(ArgumentError, match="and others none, got"):
        model_file(tmp_path / "m", replace(settings, head=Head.SOFTMAX, n_classes=2), target_windows=(WINDOW,) * 2)
    with pytest.raises(ModelError, match="must be a readable file"):
        load_model(tmp_path / "m")


def test_the_commands_say_what_it_is(pair, tmp_path, capsys):
    noisy, clean = pair
    recipe = tmp_path / "r.toml"
    recipe.write_text('loss = "l2"\nwidth = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 2\nvalidate_every = 1\n')
    model = str(tmp_path / "m.safetensors")

    def told(*arguments):
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    learnt = ["train", noisy, "--target", clean, "--recipe", str(recipe)]
    assert told(*learnt, "--preview", str(tmp_path / "p.png"))["patches"] == 6
    assert imagecodecs.imread(tmp_path / "p.png").shape[0] == 12 * (2 * 16 + 4)
    shutil.copytree(noisy, tmp_path / "other.zarr")
    aside = ["--held-out", str(tmp_path / "other.zarr"), "--target", clean, clean, "--recipe", str(recipe)]
    assert told("train", noisy, *aside, "--preview", str(tmp_path / "q.png"))["patches"] == 6
    assert (tmp_path / "q.png").read_bytes() != (tmp_path / "p.png").read_bytes()  # of all of the image
    assert told(*learnt, "--device", "cpu", "--model", model)["validation_psnr_db"] < 60
    assert told("inspect", model)["makes"] == "a prediction"
    assert told("plan", noisy, "--model", model)["makes"] == "a prediction of 1 channels, float32"
    assert cli.main(["export", model, "--bioimageio", str(tmp_path / "p.zip")]) == 2
    assert "a package must be of a network with classes, got a linear head" in capsys.readouterr().err
    made = told("segment", noisy, "--model", model, "--name", "d", "--workers", "1")
    assert (made["prediction"], made["channels"]) == (f"{noisy}/predictions/d", 1)
    assert told("verify", noisy, "--name", "d", "--boxes", "2", "--workers", "1")["n_beyond_rounding"] == 0
    assert told("evaluate", made["prediction"], clean)["mae"] > 0
    assert "d" in info(noisy)["predictions"]
    about = told("info", made["prediction"])
    assert (about["kind"], about["shape"], about["dtype"]) == ("prediction", [1, 160, 144], "float32")
