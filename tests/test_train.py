"""The verb train, from images and labels on disk to a model file that segments."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import psutil
import pytest
import tifffile
import torch

from pipeline import cli
from pipeline.compute.runner import run_serial
from pipeline.config import Precision
from pipeline.errors import ArgumentError, RunError, StoreError
from pipeline.ingest import ingest, ingest_labels
from pipeline.lesson import open_lesson
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.image import open_image
from pipeline.train import train
from pipeline.unet.device import has_bf16
from pipeline.unet.model import load_model
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.batches import draw_batch
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(width=4, depth=2, steps=60, validate_every=20, patch=32, batch=4, learning_rate=1e-2)


def textures(shape, *, values=(3, 200), seed=0):
    """Return intensities and labels: stripes of fine grain and of coarse grain, of the same mean and deviation."""
    rng = np.random.default_rng(seed)
    fine, coarse = rng.standard_normal((2, *shape))
    for axis in range(len(shape) - 2, len(shape)):
        coarse = coarse + np.roll(coarse, 1, axis) + np.roll(coarse, 2, axis)
    stripe = np.broadcast_to(np.arange(shape[-1]) // 24 % 2, shape)
    grain = np.where(stripe, fine / fine.std(), coarse / coarse.std())
    return (1000 + 200 * grain).clip(0, 9999).astype(np.uint16), np.where(stripe, *values[::-1]).astype(np.uint8)


def image_of(folder, name, voxels, labels, *, size=None, scan=None):
    for part, array in (("scan", voxels), ("truth", labels)):
        tifffile.imwrite(folder / f"{name}-{part}.tif", array, photometric="minisblack")
    image = str(folder / f"{name}.zarr")
    ingest(str(scan or folder / f"{name}-scan.tif"), image, voxel_size_um=size)
    ingest_labels(str(folder / f"{name}-truth.tif"), image=image, name="truth")
    return image


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return image_of(tmp_path_factory.mktemp("slide"), "a", *textures((160, 144)), size=(0.5, 0.5))


def test_a_model_learns_and_segments_a_slide_it_has_not_seen(slide, tmp_path):
    told = []
    result = train(
        [slide], labels="truth", model=str(tmp_path / "m.safetensors"), recipe=RECIPE, on_progress=told.append
    )
    assert min(result.best.dice) > 0.9
    assert [each.step for each in told] == [20, 40, 60]
    model = load_model(tmp_path / "m.safetensors")
    assert model.digest == result.model.digest
    assert (model.class_values, model.classes) == ((3, 200), ("class 3", "class 200"))
    assert model.voxel_size_um == (0.5, 0.5)
    assert model.settings.dims == 2

    voxels, truth = textures((100, 160), seed=9)
    other = image_of(tmp_path, "b", voxels, truth)
    plan = plan_segment(other, model=str(tmp_path / "m.safetensors"), name="predicted")
    labels = np.asarray(segment(plan, run=run_serial).labels.array[:, :])
    assert (np.array(model.class_values)[labels] == truth).mean() > 0.9


def test_classes_are_called_what_the_recipe_says(slide, tmp_path):
    quick = replace(RECIPE, steps=1, classes=("fine", "coarse"))
    result = train([slide], labels="truth", model=str(tmp_path / "m"), recipe=quick)
    assert (result.model.classes, result.model.class_values) == (("fine", "coarse"), (3, 200))
    with pytest.raises(ArgumentError, match=r"classes must name the values \(3, 200\), got \('one',\)"):
        train([slide], labels="truth", model=str(tmp_path / "other"), recipe=replace(RECIPE, classes=("one",)))
    assert not (tmp_path / "other").exists()


def test_the_record_tells_what_the_model_was_made_from(slide, tmp_path):
    recipe = replace(RECIPE, steps=2, validate_every=1)
    train([slide], labels="truth", model=str(tmp_path / "m"), recipe=recipe, seed=7)
    record = load_model(tmp_path / "m").training
    about = record["images"][0]
    assert record["processes"] == 1
    cpu = Path("/proc/cpuinfo")  # an oracle of its own; where there is none, torch is believed
    flags = cpu.read_text().split() if cpu.exists() else ["avx512_bf16"] * has_bf16("cpu")
    taken = Precision.BF16 if {"avx512_bf16", "amx_bf16"}.intersection(flags) else Precision.FLOAT32
    assert record["recipe"] == json.loads(json.dumps(replace(recipe, precision=taken).to_json()))
    assert (record["seed"], record["steps"], len(record["curve"])) == (7, 2, 2)
    assert (about["image"], about["labels"], about["shape"]) == ("a.zarr", "truth", [160, 144])
    assert about["held_out"] == {"start": [128, 0], "stop": [160, 144]}
    assert about["statistics"][0] == open_image(slide).statistics[0].to_json()
    assert set(record["versions"]) == {"haloseg", "torch", "numpy"}


def test_images_that_are_held_out_are_validated_on_whole_and_not_learnt_from(slide, tmp_path):
    voxels, labels = textures((96, 144), seed=1)
    other = image_of(tmp_path, "b", voxels, labels)
    unlearnable = image_of(tmp_path, "c", voxels, 203 - labels)
    recipe = replace(RECIPE, steps=3, validate_every=3)
    result = train([slide], labels="truth", model=str(tmp_path / "m"), recipe=recipe, held_out=[other])
    turned = train([slide], labels="truth", model=str(tmp_path / "n"), recipe=recipe, held_out=[unlearnable])
    about = result.model.training["images"]
    assert [each["image"] for each in about] == ["a.zarr", "b.zarr"]
    assert [each["held_out"] for each in about] == [None, {"start": [0, 0], "stop": [96, 144]}]
    weights = turned.model.weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in result.model.weights.items())
    assert turned.best.dice != result.best.dice
    with pytest.raises(ArgumentError, match=r"held out must not be learnt from, got .*a.zarr; name it once"):
        train([slide], labels="truth", model=str(tmp_path / "o"), recipe=recipe, held_out=[other, slide])


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BF16])
def test_the_same_seed_makes_the_same_file(slide, tmp_path, precision):
    recipe = replace(RECIPE, steps=3, precision=precision)
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        train([slide], labels="truth", model=str(path), recipe=recipe, seed=seed)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other
    assert load_model(paths[0]).training["recipe"]["precision"] == precision


TOML = """
width = 4
depth = 2
patch = 32
batch = 4
steps = 60
validate_every = 10
dropout = 0.1
ema = 0.9
foreground_share = 0.3
[augmentation]
rotation_degrees = 20
noise = 0.1
"""


def test_a_run_that_was_killed_makes_the_same_file_when_it_is_run_again(slide, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(TOML)
    checkpoint = tmp_path / "killed.checkpoint"
    arguments = ["train", slide, "--labels", "truth", "--recipe", str(tmp_path / "r.toml"), "--device", "cpu", "--json"]
    assert cli.main([*arguments, "--model", str(tmp_path / "whole")]) == 0
    assert json.loads(capsys.readouterr().out)["steps_before"] == 0

    command = [*arguments, "--model", str(tmp_path / "killed")]
    # sums over voxels are split by the number of threads, and rounded so
    threads = str(torch.get_num_threads())
    run = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pipeline import cli; cli.main(sys.argv[1:])", *command],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": threads},
    )  # fmt: skip
    with run:
        n_told = 0
        while n_told < 2:
            line = run.stderr.readline()
            assert line, "it ended by itself"
            n_told += "held out" in line
        time.sleep(0.03)  # in the middle of a step
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (tmp_path / "killed").exists()

    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps_before"] in range(20, 60, 10)
    assert printed.err.count("held out") == 6
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    pictures = {f"{name}.{kind}.png" for name in ("whole", "killed") for kind in ("curves", "sample")}
    assert (tmp_path / "killed.sample.png").read_bytes() == (tmp_path / "whole.sample.png").read_bytes()
    assert {each.name for each in tmp_path.iterdir()} == {"r.toml", "whole", "killed"} | pictures


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_in_one_line_and_the_next_run_goes_on(slide, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(f'optimiser = "sgd"\nlearning_rate = 0.05\nprecision = "float32"\n{TOML}')
    arguments = ["train", slide, "--labels", "truth", "--recipe", str(tmp_path / "r.toml"), "--device", "cpu", "--json"]
    assert cli.main([*arguments, "--model", str(tmp_path / "one"), "--processes", "1"]) == 0
    assert cli.main([*arguments, "--model", str(tmp_path / "two"), "--processes", "2"]) == 0
    by_one, by_two = (load_model(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(t, by_two.weights[name], atol=1e-3) for name, t in by_one.weights.items())
    assert by_two.training["processes"] == 2
    capsys.readouterr()

    command = [*arguments, "--model", str(tmp_path / "killed"), "--processes", "2"]
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    with run:
        assert "held out" in run.stderr.readline()
        parts = [each for each in psutil.Process(run.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        assert len(parts) == 2
        parts[1].kill()
        printed, told = run.communicate()
    assert (run.returncode, printed) == (1, "")
    (line,) = [line for line in told.splitlines() if "held out" not in line]
    assert "all 2 processes must live until the end, got process 1 ended by signal 9; the same command" in line
    assert psutil.wait_procs(parts, timeout=10)[1] == []

    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["steps_before"] > 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "two").read_bytes()


class KilledError(Exception):
    """Stands for what ends a run."""


def stopped(slide, path, recipe):
    """Leave the checkpoint of a run that was ended after its first validation."""

    def stop(_):
        raise KilledError

    with pytest.raises(KilledError):
        train([slide], labels="truth", model=str(path), recipe=recipe, on_progress=stop)


def test_the_checkpoint_of_another_run_is_refused_in_one_line(slide, tmp_path):
    recipe, path = replace(RECIPE, steps=4, validate_every=2), tmp_path / "m"
    stopped(slide, path, recipe)
    other = replace(recipe, augmentation=Augmentation(contrast=0.5))
    again = {"labels": "truth", "model": str(path)}
    with pytest.raises(ArgumentError, match=r"got recipe.augmentation.contrast 0.5 where .*/m.checkpoint has 0.1; use"):
        train([slide], recipe=other, **again)
    with pytest.raises(ArgumentError, match=r"got seed 1 where .* has 0; use those, or delete the file"):
        train([slide], recipe=recipe, seed=1, **again)
    with pytest.raises(ArgumentError, match=r"got minutes 5.0 where .* has None"):
        train([slide], recipe=recipe, minutes=5.0, **again)
    assert train([slide], recipe=recipe, **again).n_before == 2


def test_a_damaged_checkpoint_is_refused_in_one_line(slide, tmp_path, capsys):
    stopped(slide, tmp_path / "m", RECIPE)
    checkpoint = tmp_path / "m.checkpoint"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert cli.main(["train", slide, "--labels", "truth", "--model", str(tmp_path / "m")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "delete it to begin anew" in told
    assert not (tmp_path / "m").exists()


def test_rare_classes_are_drawn_from_memory_and_from_disk_alike(tmp_path, monkeypatch):
    voxels, labels = textures((6, 64, 96))
    image = image_of(tmp_path, "v", voxels, np.where(np.arange(96) < 90, 3, labels), size=(0.05, 0.004, 0.004))
    recipe = replace(RECIPE, steps=3, foreground_share=0.5)
    train([image], labels="truth", model=str(tmp_path / "memory"), recipe=recipe)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    train([image], labels="truth", model=str(tmp_path / "disk"), recipe=recipe)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


def test_what_lies_on_disk_is_drawn_alike_in_another_process(slide, monkeypatch):
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    patches = open_lesson([slide], labels="truth", recipe=RECIPE).learn
    sent = pickle.loads(pickle.dumps(patches))
    for here, there in zip(draw_batch(patches, 3, seed=0, step=1), draw_batch(sent, 3, seed=0, step=1), strict=True):
        assert np.array_equal(here.image, there.image)
        assert np.array_equal(here.classes, there.classes)


def test_slices_of_a_thin_volume_train_a_2d_network(tmp_path):
    image = image_of(tmp_path, "v", *textures((6, 64, 96)), size=(0.05, 0.004, 0.004))
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=RECIPE)
    assert result.model.settings.dims == 2
    assert min(result.best.dice) > 0.9
    assert result.model.training["images"][0]["held_out"]["start"] == [5, 0, 0]


def test_a_cube_trains_a_3d_network_and_arrays_too_large_for_memory_stay_on_disk(tmp_path, monkeypatch):
    image = image_of(tmp_path, "v", *textures((20, 40, 72)), size=(0.01, 0.01, 0.01))
    recipe = replace(RECIPE, depth=1, patch=16, steps=3, batch=2)
    train([image], labels="truth", model=str(tmp_path / "memory"), recipe=recipe)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    result = train([image], labels="truth", model=str(tmp_path / "disk"), recipe=recipe)
    assert result.model.settings.dims == 3
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


def test_several_images_share_their_classes(slide, tmp_path):
    voxels, labels = textures((64, 96), values=(3, 90), seed=2)
    other = image_of(tmp_path, "b", voxels, labels)
    result = train([slide, other], labels="truth", model=str(tmp_path / "m"), recipe=replace(RECIPE, steps=2))
    assert result.model.class_values == (3, 90, 200)
    assert len(result.model.training["images"]) == 2


def test_images_that_do_not_belong_together_are_refused(slide, tmp_path):
    coarse = image_of(tmp_path, "c", *textures((40, 48)), size=(2.0, 2.0))
    volume = image_of(tmp_path, "v", *textures((4, 40, 48)))
    for other, message in ((coarse, "same voxel size, got"), (volume, "same channels and axes, got")):
        with pytest.raises(ArgumentError, match=message):
            train([slide, other], labels="truth", model=str(tmp_path / "m"), recipe=RECIPE)
    with pytest.raises(ArgumentError, match="at least one image"):
        train([], labels="truth", model=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_labels_that_are_no_classes_are_refused(tmp_path):
    voxels, _ = textures((40, 48))
    instances = np.arange(40 * 48).reshape(40, 48).astype(np.uint32)
    for name, labels, message in (
        ("i", instances, "2 to 255 different values, got more .* boundary and interior"),
        ("z", np.zeros((40, 48), np.uint8), r"at least 2 different values, got \[0\]"),
    ):
        image = image_of(tmp_path, name, voxels, labels)
        with pytest.raises(ArgumentError, match=message):
            train([image], labels="truth", model=str(tmp_path / "m"))


def test_labels_and_images_that_are_missing_are_refused(slide, tmp_path):
    with pytest.raises(StoreError, match="the image has: truth"):
        train([slide], labels="other", model=str(tmp_path / "m"))
    with pytest.raises(StoreError, match="must be made by haloseg"):
        train([str(tmp_path / "none.zarr")], labels="truth", model=str(tmp_path / "m"))


def test_a_training_that_fails_writes_nothing_and_keeps_the_file_before(slide, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"")  # as of mktemp; what is in a file no training would begin to replace
    with pytest.raises(RunError, match="loss must stay finite"):
        train([slide], labels="truth", model=str(path), recipe=replace(RECIPE, learning_rate=1e30, batch_norm=False))
    assert path.read_bytes() == b""
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


def test_the_command_prints_one_document_and_progress_on_stderr(slide, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text("width = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 4\nvalidate_every = 2\n")
    arguments = ["train", slide, "--labels", "truth", "--model", str(tmp_path / "m"), "--recipe", str(recipe)]
    assert cli.main([*arguments, "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    document = SimpleNamespace(**json.loads(printed.out))
    assert (document.steps, document.classes[1]["value"]) == (4, 200)
    assert document.sha256 == load_model(tmp_path / "m").digest
    assert printed.err.count("held out") == 2
    picture = imagecodecs.png_decode((tmp_path / "m.curves.png").read_bytes())
    assert picture.std() > 10
    assert cli.main([*arguments, "--device", "cpu", "--processes", "3"]) == 2
    assert "each process needs a patch of every batch, got 3 processes and batch 2" in capsys.readouterr().err


def test_the_command_refuses_a_bad_recipe_in_one_line(slide, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text("colour = 1")
    arguments = ["train", slide, "--labels", "truth", "--model", str(tmp_path / "m"), "--recipe", str(recipe)]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def cells(shape, *, seed=0):
    """Return touching instances, bright with a dark rim, and their ids."""
    rng = np.random.default_rng(seed)
    row = np.arange(shape[-1]) // 12
    ids = row + 1 + (np.arange(shape[-2])[:, None] // 12) * (row.max() + 1)
    ids = np.broadcast_to(np.where(rng.random(ids.max() + 1) < 0.7, np.arange(ids.max() + 1), 0)[ids], shape)
    inside = ids != 0
    for axis in (-2, -1):
        for step in (-1, 1):
            inside = inside & (np.roll(ids, step, axis) == ids)
    return (1000 + 500 * inside + 100 * rng.standard_normal(shape)).astype(np.uint16), ids.astype(np.uint32)


INSTANCES = replace(
    RECIPE, instances=True, border_weight=10.0, border_sigma_voxels=2.0, balance_classes=True, ignore=70000,
    augmentation=Augmentation(rotation_degrees=20, elastic_sigma_voxels=1),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "dims"), [((120, 132), 2), ((6, 72, 84), 2), ((20, 48, 60), 3)])
def test_instances_teach_their_inside_and_the_gaps_between(shape, dims, tmp_path, monkeypatch):
    voxels, ids = cells(shape)
    ids = ids + 7
    ids[ids == 7] = 0
    ids[..., :3, :] = 70000  # nobody has labelled these
    image = image_of(tmp_path, "cells", voxels, ids)
    recipe = INSTANCES if dims == 2 else replace(INSTANCES, depth=1, patch=16, batch=2, steps=40)
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=recipe)
    assert result.model.settings.dims == dims
    assert (result.model.classes, result.model.class_values) == (("background", "object"), (0, 1))
    assert min(result.best.dice) > 0.8
    quick = replace(recipe, steps=2)
    train([image], labels="truth", model=str(tmp_path / "memory"), recipe=quick)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    train([image], labels="truth", model=str(tmp_path / "disk"), recipe=quick)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


VALUES = {"int8": (-5, 0), "int16": (-3, -2), "uint32": (1, 2**32 - 1), "uint64": (0, 2**63 + 5), "int64": (-99, 7)}


@pytest.mark.parametrize("dtype", VALUES)
def test_classes_are_learnt_alike_whatever_their_values(tmp_path, dtype):
    voxels, labels = textures((64, 96), values=(0, 1))
    image = image_of(tmp_path, "a", voxels, labels)
    np.save(tmp_path / "other.npy", np.array(VALUES[dtype], dtype)[labels])
    ingest_labels(str(tmp_path / "other.npy"), image=image, name="other")
    recipe = replace(RECIPE, steps=2, validate_every=1, foreground_share=0.5)
    usual, other = (
        train([image], labels=name, model=str(tmp_path / f"{name}.safetensors"), recipe=recipe)
        for name in ("truth", "other")
    )
    assert other.model.class_values == VALUES[dtype]
    assert other.model.classes == tuple(f"class {value}" for value in VALUES[dtype])
    assert load_model(other.path).class_values == VALUES[dtype]
    assert (other.best.loss, other.best.dice) == (usual.best.loss, usual.best.dice)
    assert all(torch.equal(weight, other.model.weights[key]) for key, weight in usual.model.weights.items())


def test_an_ignored_value_is_no_class(tmp_path):
    voxels, labels = textures((64, 96))
    labels[:, 40:60] = 9
    image = image_of(tmp_path, "b", voxels, labels)
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=replace(RECIPE, steps=1, ignore=9))
    assert result.model.class_values == (3, 200)
    assert load_model(tmp_path / "m").training["recipe"]["ignore"] == 9


def test_a_sigmoid_model_segments_with_the_labels_of_its_classes(slide, tmp_path):
    recipe = replace(RECIPE, loss=Loss.BINARY_CROSS_ENTROPY)
    result = train([slide], labels="truth", model=str(tmp_path / "m.safetensors"), recipe=recipe)
    assert min(result.best.dice) > 0.9
    voxels, truth = textures((100, 160), seed=9)
    other = image_of(tmp_path, "b", voxels, truth)
    plan = plan_segment(other, model=str(tmp_path / "m.safetensors"), name="predicted")
    labels = np.asarray(segment(plan, run=run_serial).labels.array[:, :])
    assert (np.array(result.model.class_values)[labels] == truth).mean() > 0.9


@pytest.mark.parametrize(("shape", "more"), [((96, 100), 'padding = "valid"'), ((5, 64, 64), ""), ((20, 32, 32), "")])
def test_a_preview_is_a_picture_and_trains_nothing(shape, more, tmp_path, capsys):
    image = image_of(tmp_path, "v", *cells(shape))
    (tmp_path / "r.toml").write_text(
        f"patch = 16\ndepth = 1\ninstances = true\n{more}\n[augmentation]\nelastic_sigma_voxels = 1"
    )
    files = set(tmp_path.iterdir())
    arguments = ["train", image, "--labels", "truth", "--recipe", str(tmp_path / "r.toml"), "--json"]
    pictures = []
    for seed in "112":
        assert cli.main([*arguments, "--preview", str(tmp_path / "p.png"), "--seed", seed]) == 0
        pictures.append((tmp_path / "p.png").read_bytes())
    document = json.loads(capsys.readouterr().out.split("\n{")[0])
    size = 16 + 2 * 8 * bool(more)
    assert document["patch_shape"] == [size] * (3 if shape[0] == 20 else 2)
    assert set(tmp_path.iterdir()) - files == {tmp_path / "p.png"}
    assert pictures[0] == pictures[1] != pictures[2]
    picture, shown = imagecodecs.png_decode(pictures[0]), 192 // size * size  # small patches are enlarged
    assert picture.shape == (192 // size * (2 * size + 4), 6 * shown + 5 * 4, 3)
    grey, over = picture[:shown, :shown], picture[-shown:, :shown]
    assert (grey[..., 0] == grey[..., 2]).all()
    assert (over[..., 0] != over[..., 2]).any()


def test_a_preview_that_cannot_be_written_is_refused(slide, tmp_path, capsys):
    arguments = ["train", slide, "--labels", "truth", "--preview", str(tmp_path / "no" / "p.png")]
    assert cli.main(arguments) == 2
    assert "a preview must be a file that can be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--model", "m"])
    truth = tmp_path / "truth.tif"
    truth.write_bytes(b"drawn by hand")
    assert cli.main(["train", slide, "--labels", "truth", "--preview", str(truth)]) == 2
    assert f"a preview must be a .png, got {truth}" in capsys.readouterr().err
    assert truth.read_bytes() == b"drawn by hand"
    for name, content in (("scan.png", imagecodecs.png_encode(np.eye(64, dtype=np.uint8))), ("text.png", b"a word")):
        other = tmp_path / name
        other.write_bytes(content)
        assert cli.main(["train", slide, "--labels", "truth", "--preview", str(other)]) == 2
        assert f"a preview must not replace another file, got {other}" in capsys.readouterr().err
        assert other.read_bytes() == content
    negative = ["--preview", str(tmp_path / "p.png"), "--seed", "-1"]
    assert cli.main(["train", slide, "--labels", "truth", *negative]) == 2
    assert "seed must be at least 0, got -1; use 0" in capsys.readouterr().err
