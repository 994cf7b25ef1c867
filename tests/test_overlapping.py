"""Labels that overlap, from label volumes on disk to a probability for each."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import zarr

from pipeline import cli
from pipeline.compute.runner import run_serial
from pipeline.errors import ArgumentError
from pipeline.ingest import ingest, ingest_labels
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.train import train
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(
    width=4, depth=2, steps=120, validate_every=60, patch=32, batch=4, learning_rate=1e-2,
    loss=Loss.BINARY_CROSS_ENTROPY, augmentation=Augmentation(brightness=0, contrast=0),
)  # fmt: skip


def crossing(shape, *, seed):
    """Return intensities, and two labels that cross: stripes of fine grain, and bands that are brighter."""
    rng = np.random.default_rng(seed)
    fine, coarse = rng.standard_normal((2, *shape))
    for axis in range(2):
        coarse = coarse + np.roll(coarse, 1, axis) + np.roll(coarse, 2, axis)
    stripe = np.broadcast_to(np.arange(shape[1]) // 24 % 2, shape)
    band = np.broadcast_to(np.arange(shape[0])[:, None] // 20 % 2, shape)
    grain = np.where(stripe, fine / fine.std(), coarse / coarse.std())
    return (1000 + 200 * grain + 500 * band).clip(0, 9999).astype(np.uint16), stripe.astype(np.uint8), band * 77


def image_of(folder, name, voxels, **labels):
    image = str(folder / f"{name}.zarr")
    for part, array in {"scan": voxels, **labels}.items():
        tifffile.imwrite(folder / f"{part}.tif", array, photometric="minisblack")
        if part == "scan":
            ingest(str(folder / "scan.tif"), image)
        else:
            ingest_labels(str(folder / f"{part}.tif"), image=image, name=part)
    return image


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    voxels, fine, bright = crossing((160, 144), seed=0)
    bright = np.where(np.arange(144) < 40, 9, bright)  # nobody looked there for what is bright
    return image_of(tmp_path_factory.mktemp("slide"), "a", voxels, fine=fine, bright=bright.astype(np.uint8))


@pytest.mark.parametrize("loss", [Loss.BINARY_CROSS_ENTROPY, Loss.DICE_BINARY_CROSS_ENTROPY])
def test_each_label_is_learnt_and_segmented_for_itself(slide, tmp_path, loss):
    recipe = replace(RECIPE, ignore=9, loss=loss)
    result = train([slide], labels="fine,bright", model=str(tmp_path / "m.safetensors"), recipe=recipe)
    assert (result.model.classes, result.model.class_values) == (("none", "fine", "bright"), (0, 1, 2))
    assert result.model.training["images"][0]["labels"] == ["fine", "bright"]
    assert result.model.settings.n_classes == 2
    assert min(result.best.dice) > 0.8
    voxels, *truths = crossing((100, 160), seed=9)
    other = image_of(tmp_path, "b", voxels)
    plan = plan_segment(other, model=str(tmp_path / "m.safetensors"), name="p", probabilities=True)
    strongest = np.asarray(segment(plan, run=run_serial).labels.array[:, :])
    likely = np.asarray(zarr.open_array(str(plan.probabilities.location / "0"), mode="r"))
    for probability, truth in zip(likely, truths, strict=True):
        assert ((probability > 0.5) == (truth > 0)).mean() > 0.9
    both = (truths[0] > 0) & (truths[1] > 0)
    assert (likely[:, both] > 0.5).all(axis=0).mean() > 0.8
    assert np.array_equal(strongest > 0, (likely > 0.5).any(axis=0))
    assert (likely[strongest[strongest > 0] - 1, *np.nonzero(strongest)] == likely.max(axis=0)[strongest > 0]).all()


def test_labels_in_memory_and_on_disk_are_learnt_alike(slide, tmp_path, monkeypatch):
    quick = replace(RECIPE, steps=2, validate_every=1, ignore=9, foreground_share=0.5, instances=True)
    for name in ("memory", "disk"):
        train([slide], labels="fine,bright", model=str(tmp_path / name), recipe=quick)
        monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


@pytest.mark.parametrize(
    ("labels", "changes", "told"),
    [
        ("fine,fine", {}, "15 different volumes, got fine,fine; name each once"),
        ("fine,bright", {"loss": Loss.DICE}, 'got dice for fine,bright; set loss = "binary_cross_entropy"'),
        ("fine,bright", {"loss": Loss.DICE_CROSS_ENTROPY}, 'or "dice_binary_cross_entropy" in the recipe, or name one'),
        (
            "fine,bright", {"loss": Loss.DICE_BINARY_CROSS_ENTROPY, "border_weight": 9, "instances": True},
            "no weights of classes or of borders, got border_weight; leave",
        ),
        ("fine,bright", {"balance_classes": True}, "no weights of classes or of borders, got balance_classes; leave"),
        ("fine,bright", {"classes": ("a", "b")}, r"none and each of the labels fine,bright, got \('a', 'b'\); give 3"),
        ("fine,", {}, "a label name has letters, digits"),
    ],
)
def test_what_cannot_be_learnt_is_refused(slide, tmp_path, labels, changes, told):
    with pytest.raises(ArgumentError, match=told):
        train([slide], labels=labels, model=str(tmp_path / "m"), recipe=replace(RECIPE, **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_several_labels(slide, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(
        'loss = "binary_cross_entropy"\nignore = 9\nsteps = 1\nwidth = 4\ndepth = 2\npatch = 32\nbatch = 2\n'
        'classes = ["neither", "grain", "light"]'
    )
    arguments = ["train", slide, "--labels", "fine,bright", "--recipe", str(tmp_path / "r.toml"), "--json"]
    assert cli.main([*arguments, "--preview", str(tmp_path / "p.png")]) == 0
    assert cli.main([*arguments, "--model", str(tmp_path / "m.safetensors")]) == 0
    assert '"class": "light"' in capsys.readouterr().out
    assert (tmp_path / "m.safetensors.sample.png").exists()
