"""Ensembles from the command line to the labels: the mean of what each network says of the whole scan."""

import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from foreign import Encoder, random_network, saved
from test_cli import fails, printed
from test_export import files_of
from volumes import model_file, scan_file, tree_digest, whole_scan

from pipeline.cli import main
from pipeline.store.arrays import open_array
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.store.statistics import Normalisation
from pipeline.unet.cost import weight_bytes
from pipeline.unet.families import chain_of
from pipeline.unet.foreign.torchscript import deprecated
from pipeline.unet.model import load_model, networks_of
from pipeline.unet.settings import Block, Head, Padding, UNetSettings, closed_form_rule

pytestmark = pytest.mark.usefixtures("one_thread")

FLAT = UNetSettings(dims=2, width=3, depth=2, n_classes=3, padding=Padding.SAME, batch_norm=True)
DEEP = UNetSettings(dims=3, width=2, depth=1, padding=Padding.VALID)
CASES = {
    "2-D": ((70, 44), FLAT), "slices of a volume": ((3, 40, 44), FLAT), "3-D": ((9, 20, 13), DEEP),
    "sigmoid": ((70, 44), replace(FLAT, head=Head.SIGMOID, n_classes=2)),
}  # fmt: skip
WINDOW = ((50.0, 0.1),)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in a folder of this test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ingested(shape, capsys):
    """Return a scan's voxels, and its image."""
    voxels = scan_file("scan.tif", shape)
    n = len(shape)
    printed(capsys, "ingest", "scan.tif", "scan.zarr", "--chunk", ",".join(["16"] * n), "--shard", ",".join(["16"] * n))
    return voxels, "scan.zarr"


def three(settings, **about):
    """Return the files of three models that differ in their weights."""
    return [model_file(f"{name}.safetensors", settings, seed=seed, **about) for seed, name in enumerate("abc")]


def mean_of_whole_scans(voxels, models, image):
    """Return the mean of what each of the networks says of the whole mirrored scan, by NumPy."""
    every = [whole_scan(voxels[None], model, open_image(image).statistics) for model in models]
    assert all(np.abs(a - b).max() > 0.05 for a, b in product(every, every) if a is not b)
    return np.mean(every, axis=0, dtype=np.float64)


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_labels_are_the_mean_of_whole_scans_however_they_are_made(place, capsys, shape, settings):
    voxels, image = ingested(shape, capsys)
    models = three(settings)
    made = printed(capsys, "ensemble", *models, "--model", "all.safetensors")
    assert (made["networks"], made["sha256"]) == (3, load_model("all.safetensors").digest)
    expected, rule = mean_of_whole_scans(voxels, models, image), closed_form_rule(settings)
    schemes = {
        "columns": [], "thin": ["--slab", settings.stride, "--column", ",".join("1" * len(shape))],
        "tiles": ["--tile", rule.tile_shape(rule.stride)[0]], "reference": ["--engine", "reference"],
    }  # fmt: skip
    for name, how in schemes.items():
        done = printed(capsys, "segment", image, "--model", "all.safetensors", "--name", name, "--workers", 1,
                       "--probabilities", *how)  # fmt: skip
        likely = open_array(Location(image) / "probabilities" / name / "0")[:]
        assert np.abs(likely - expected).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], classes_of(expected, settings))
        assert done["certificate"]["max_difference"] <= 1e-5
        assert done["certificate"]["n_flipped_decided"] == 0
    verified = printed(capsys, "verify", image, "--name", "columns", "--boxes", 20)
    assert (verified["max_difference"] <= 1e-5, verified["n_flipped_decided"]) == (True, 0)
    alone = whole_scan(voxels[None], models[0], open_image(image).statistics)
    assert (classes_of(alone, settings) != classes_of(expected, settings)).any()


def classes_of(likely, settings):
    """Return the likeliest class, of a sigmoid head 0 where none exceeds one half."""
    if settings.head is Head.SOFTMAX:
        return likely.argmax(0)
    return np.where((likely > 0.5).any(0), 1 + likely.argmax(0), 0)


def test_every_network_sees_every_flip(place, capsys):
    shape = (72, 44)
    voxels, image = ingested(shape, capsys)
    models = three(FLAT)[:2]
    printed(capsys, "ensemble", *models, "--model", "all.safetensors")
    every = []
    for model, flips in product(models, product((False, True), repeat=2)):
        axes = tuple(at - 2 for at, each in enumerate(flips) if each)
        seen = whole_scan(np.flip(voxels[None], axes).copy(), model, open_image(image).statistics)
        every.append(np.flip(seen, axes))
    expected = np.mean(every, axis=0, dtype=np.float64)
    done = printed(capsys, "segment", image, "--model", "all.safetensors", "--name", "x", "--tta", "flips",
                   "--probabilities")  # fmt: skip
    assert np.abs(open_array(Location(image) / "probabilities/x/0")[:] - expected).max() <= 1e-5
    assert done["certificate"]["max_difference"] <= 1e-5


def test_a_prediction_is_the_mean_of_values(place, capsys):
    voxels, image = ingested((70, 44), capsys)
    models = three(replace(FLAT, head=Head.LINEAR, n_classes=1), target_windows=WINDOW)
    printed(capsys, "ensemble", *models, "--model", "all.safetensors")
    expected = mean_of_whole_scans(voxels, models, image) * 10 + 50
    done = printed(capsys, "segment", image, "--model", "all.safetensors", "--name", "x")
    assert np.abs(open_array(Location(image) / "predictions/x/0")[:] - expected).max() <= 1e-3
    assert done["certificate"]["n_beyond_rounding"] == 0


def test_missing_shards_and_two_workers_end_in_the_same_bytes(place, capsys):
    _, image = ingested((20, 36, 33), capsys)
    printed(capsys, "ensemble", *three(DEEP), "--model", "all.safetensors")
    command = ["segment", image, "--model", "all.safetensors", "--slab", "2", "--column", "2,2,2", "--name"]
    printed(capsys, *command, "whole", "--workers", 1)
    printed(capsys, *command, "part", "--workers", 1)
    for shard in ("0/0/1", "1/2/0"):
        (Location(image) / "labels/part/0/c" / shard).delete()
    assert printed(capsys, *command, "part", "--workers", 1)["blocks_run"] == 2
    assert printed(capsys, *command, "two", "--workers", 2)["blocks_run"] == 18
    for name in ("part", "two"):
        assert tree_digest(f"{image}/labels/{name}/0") == tree_digest(f"{image}/labels/whole/0")


def test_networks_of_the_same_weights_make_the_labels_of_one(place, capsys):
    voxels, image = ingested((70, 44), capsys)
    first = model_file("a.safetensors", FLAT)
    model_file("b.safetensors", FLAT, training={"seed": 1})
    printed(capsys, "ensemble", "a.safetensors", "b.safetensors", "--model", "all.safetensors")
    for model in ("a", "all"):
        printed(capsys, "segment", image, "--model", f"{model}.safetensors", "--name", model)
    likely = np.sort(whole_scan(voxels[None], first, open_image(image).statistics), axis=0)
    sure = likely[-1] - likely[-2] > 1e-5
    assert sure.mean() > 0.99
    one, both = (open_labels(f"{image}/labels/{name}").array[:] for name in ("a", "all"))
    np.testing.assert_array_equal(one[sure], both[sure])


def test_the_plan_counts_every_network_and_inspect_tells_of_them(place, capsys):
    _, image = ingested((70, 44), capsys)
    reached = {"best": {"step": 3, "loss": 0.25, "dice": [0.5, 0.75, None]}}
    models = three(FLAT, training=reached)
    printed(capsys, "ensemble", *models, "--model", "all.safetensors")
    for how in ([], ["--engine", "reference"], ["--tile", "68"]):
        one, all_three, turned = (
            printed(capsys, "plan", image, "--model", model, *how, *tta)
            for model, tta in ((models[0], []), ("all.safetensors", []), ("all.safetensors", ["--tta", "flips"]))
        )  # fmt: skip
        assert (one["networks"], all_three["networks"], turned["networks"]) == (1, 3, 3)
        work = [each["multiply_adds"] / one["multiply_adds"] for each in (all_three, turned)]
        assert work == [3, 12]
        assert all_three["halo_tax"] == pytest.approx(one["halo_tax"])
        assert one["peak_bytes"] < all_three["peak_bytes"] <= turned["peak_bytes"]
    printed(capsys, "ensemble", *models[:2], "--model", "two.safetensors")
    for how in (["--engine", "reference", "--tile", "68"], ["--tile", "68"]):
        two, all_three = (printed(capsys, "plan", image, "--model", f"{model}.safetensors", *how)["peak_bytes"]
                          for model in ("two", "all"))  # fmt: skip
        assert all_three - two == weight_bytes(chain_of(FLAT), itemsize=4)
    told = [printed(capsys, "inspect", model) for model in (models[0], "all.safetensors")]
    assert [each["networks"] for each in told] == [1, 3]
    assert told[1]["kind"] == f"mean of 3 networks, each a {told[0]['kind']}"
    assert told[1]["parameters"] == 3 * told[0]["parameters"]
    assert all(told[1][key] == told[0][key] for key in ("network", "halo_shape", "stride_shape", "lag_rows", "classes"))
    assert "members" not in told[0]
    assert told[1]["members"] == [
        {"member": name, "sha256": load_model(path).digest, "validation_loss": 0.25,
         "validation_dice": [0.5, 0.75, None]}
        for name, path in zip("abc", models, strict=True)
    ]  # fmt: skip
    assert told[1]["training"]["members"][1]["training"] == reached
    assert main(["inspect", "all.safetensors"]) == 0
    assert "mean of 3 networks" in capsys.readouterr().out
    printed(capsys, "segment", image, "--model", "all.safetensors", "--name", "x")
    assert open_labels(f"{image}/labels/x").provenance["networks"] == 3
    printed(capsys, "segment", image, "--model", models[0], "--name", "y")
    assert "networks" not in open_labels(f"{image}/labels/y").provenance  # as it was before there were ensembles


def test_names_stand_for_files_and_the_ensemble_is_the_next_version(place, capsys):
    _, image = ingested((70, 44), capsys)
    for version in (1, 2):
        model_file(f"models/cells/{version}.safetensors", FLAT, seed=version)
    made = printed(capsys, "ensemble", "cells@1", "cells", "--model", "cells")
    assert made["model"] == "models/cells/3.safetensors"
    assert [each["member"] for each in made["members"]] == ["cells-1", "cells-2"]
    again = printed(capsys, "ensemble", "cells@1", "models/cells/2.safetensors", "--model", "again.safetensors")
    assert again["sha256"] == made["sha256"]  # the same members, the same file
    other = printed(capsys, "ensemble", "cells@2", "cells@1", "--model", "other.safetensors")
    assert other["sha256"] != made["sha256"]
    printed(capsys, "segment", image, "--model", "cells", "--name", "x")
    assert open_labels(f"{image}/labels/x").provenance["model_sha256"] == made["sha256"]


def test_folds_whose_files_have_the_same_name_are_all_there(place, capsys):
    for seed in range(3):
        (place / f"fold-{seed}").mkdir()
        model_file(f"fold-{seed}/cells.safetensors", FLAT, seed=seed)
    folds = [f"fold-{seed}/cells.safetensors" for seed in range(3)]
    made = printed(capsys, "ensemble", *folds, "--model", "all.safetensors")
    assert made["networks"] == len(made["members"]) == len({each["sha256"] for each in made["members"]}) == 3


DIFFERING = {
    "width 3 and 4": {"settings": replace(FLAT, width=4)}, "depth 2 and 1": {"settings": replace(FLAT, depth=1)},
    "block plain and residual": {"settings": replace(FLAT, block=Block.RESIDUAL)},
    "dims 2 and 3": {"settings": replace(FLAT, dims=3)},
    "classes (class 0, class 1, class 2) and (class 0, class 1, wall)": {"classes": ("class 0", "class 1", "wall")},
    "class values (0, 1, 2) and (0, 1, 255)": {"class_values": (0, 1, 255)},
    "normalisation zscore and range": {"normalisation": Normalisation.RANGE},
    "limits ((0.0, 1.0)) and ((0.0, 2.0))": {"normalisation": Normalisation.WINDOW, "limits": ((0.0, 2.0),)},
    "channels (0) and (dapi)": {"channels": ("dapi",)},
    "voxel size in um None and (0.5, 0.25)": {"voxel_size_um": (0.5, 0.25)},
    "scaling of images () and ((1.0, 2.0))": {"input_windows": ((1.0, 2.0),)},
    "scaling of targets ((50.0, 0.1)) and ((50.0, 0.2))": {"target_windows": ((50.0, 0.2),)},
}  # fmt: skip


@pytest.mark.parametrize(("told", "change"), DIFFERING.items(), ids=DIFFERING)
def test_networks_that_differ_are_refused_and_the_difference_is_named(place, capsys, told, change):
    usual = {"settings": FLAT}
    if "limits" in change:
        usual |= {"normalisation": Normalisation.WINDOW, "limits": ((0.0, 1.0),)}
    if "target_windows" in change:
        usual = {"settings": replace(FLAT, head=Head.LINEAR, n_classes=1), "target_windows": WINDOW}
    model_file("a.safetensors", **usual)
    model_file("b.safetensors", **usual, seed=1)
    model_file("c.safetensors", **(usual | change))
    line = fails(capsys, "ensemble", "a.safetensors", "b.safetensors", "c.safetensors", "--model", "all.safetensors")
    assert f"must differ in their weights alone, got {told}" in line
    assert "in a.safetensors and c.safetensors; train them by the same recipe" in line
    assert not (place / "all.safetensors").exists()


def test_what_is_no_member_is_refused_and_nothing_is_written(place, capsys):
    three(FLAT)
    printed(capsys, "ensemble", "a.safetensors", "b.safetensors", "--model", "two.safetensors")
    shutil.copy("a.safetensors", "copy.safetensors")
    (place / "text.safetensors").write_text("hello")
    (place / "sub").mkdir()
    (place / "linked.safetensors").symlink_to("a.safetensors")
    program = saved(place / "net.pt2", random_network(Encoder), (1, 1, 64, 64), dynamic=True)
    printed(capsys, "import", program, "--model", "foreign.safetensors")
    before = tree_digest(place)
    for models, out, message in [
        (["a"], "x", "needs two models or more, got 1"),
        (["a", "a"], "x", "each model must be there once, got the same file twice, a.safetensors and a.safetensors"),
        (["a", "b", "copy"], "x", "twice, a.safetensors and copy.safetensors; leave one out"),
        (["a", "two"], "x", "a member must be a single network, since each counts alike, got an ensemble of 2 in two"),
        (["a", "foreign"], "x", "must be of networks of ours, got one from elsewhere, torch.export program net.pt2"),
        (["a", "missing"], "x", "a model must be a readable file, got missing.safetensors"),
        (["a", "text"], "x", "a model must be an undamaged .safetensors file"),
        (["a", "b"], "b", "must not take its member's place, got b.safetensors"),
        (["a", "b"], "sub/../a", "must not take its member's place, got sub/../a.safetensors"),
        (["a", "b"], "linked", "must not take its member's place, got linked.safetensors"),
        (["linked", "b"], "a", "must not take its member's place, got a.safetensors"),
    ]:
        line = fails(capsys, "ensemble", *(f"{each}.safetensors" for each in models), "--model", f"{out}.safetensors")
        assert message in line
    assert "must be a file or a name" in fails(capsys, "ensemble", "a.safetensors", "cells", "--model", "x.safetensors")
    assert "got cells@3; use cells" in fails(capsys, "ensemble", "a.safetensors", "b.safetensors", "--model", "cells@3")
    assert tree_digest(place) == before


def test_a_package_of_an_ensemble_gives_the_mean_of_probabilities(place, capsys):
    models = three(FLAT)
    printed(capsys, "ensemble", *models, "--model", "all.safetensors")
    printed(capsys, "export", "all.safetensors", "--bioimageio", "all.zip")
    files = files_of("all.zip")
    assert b"The mean of 3 networks, each a 2-D network" in files["README.md"]
    for size in (64, 100):
        x = torch.randn((1, 1, size, size))
        (place / "weights.pt").write_bytes(files["weights.pt"])
        with deprecated():
            got = torch.jit.load("weights.pt")(x).detach().numpy()
        expected = np.mean([likely_of(model, x) for model in models], axis=0)
        assert np.abs(got - expected).max() <= 1e-5
    described = yaml.safe_load(files["rdf.yaml"])
    assert described["config"]["haloseg"]["sha256"] == load_model("all.safetensors").digest
    printed(capsys, "import", "all.zip", "--model", "back.safetensors", "--trust")  # compares its test output


def likely_of(model, x):
    (network,) = networks_of(load_model(model), "cpu")
    with torch.inference_mode():
        return network.probabilities(network(x)).numpy()
