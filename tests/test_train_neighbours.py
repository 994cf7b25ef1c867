"""Training a network that sees the neighbours of each slice, where they tell what the slice itself does not."""

from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import tifffile
from test_train import RECIPE, KilledError, image_of

from pipeline import cli
from pipeline.compute.runner import run_serial
from pipeline.errors import ArgumentError
from pipeline.ingest import ingest
from pipeline.lesson import open_lesson
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.arrays import open_array
from pipeline.store.statistics import Normalisation
from pipeline.train import train
from pipeline.unet.model import load_model
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Loss

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (0.05, 0.004, 0.004)
PLAIN = Augmentation(flips=False, brightness=0, contrast=0)
BESIDE = replace(RECIPE, depth=1, steps=40, dims=2, neighbours=1, augmentation=PLAIN)


def slices(shape=(10, 48, 56), *, seed=0):
    """Return slices that have nothing in common, float64 of mean 0, and what each one's neighbours are."""
    grain = np.random.default_rng(seed).standard_normal(shape)
    for axis in (-2, -1):
        grain = grain + np.roll(grain, 1, axis) + np.roll(grain, 2, axis)
    grain /= grain.std()
    padded = np.pad(grain, [(1, 1), (0, 0), (0, 0)], mode="reflect")
    return grain, padded[:-2], padded[2:]


def stored(grain):
    return (1000 + 200 * grain).clip(0, 9999).astype(np.uint16)


def volume(folder, name, truth, *, seed=0, gains=None):
    """Ingest slices whose labels are what ``truth`` makes of (above, below); returns the image and its labels."""
    grain, above, below = slices(seed=seed)
    labels = np.where(truth(above, below) > 0, 7, 3).astype(np.uint8)
    voxels = stored(grain) if gains is None else (stored(grain) * gains[:, None, None]).astype(np.uint16)
    return image_of(folder, name, voxels, labels, size=SIZE), labels


TRUTHS = {
    "the slice below": (lambda above, below: below, PLAIN),
    "both, whichever is above": (lambda above, below: above + below, replace(PLAIN, flips=True)),
}  # fmt: skip


@pytest.mark.parametrize(("truth", "augmentation"), TRUTHS.values(), ids=TRUTHS)
def test_what_only_the_neighbours_tell_is_learnt_with_them_and_not_without(tmp_path, truth, augmentation):
    gains = np.random.default_rng(1).uniform(0.5, 3, 10)
    image, _ = volume(tmp_path, "a", truth, gains=gains)
    recipe = replace(BESIDE, augmentation=augmentation, normalisation=Normalisation.ZSCORE_SLICEWISE, steps=160)
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=recipe)
    assert min(result.best.dice) > 0.9
    alone = train([image], labels="truth", model=str(tmp_path / "alone"), recipe=replace(recipe, neighbours=0))
    assert min(alone.best.dice) < 0.7
    model = load_model(tmp_path / "m")
    assert (model.settings.in_channels, model.channels, model.settings.neighbours) == (3, ("0",), 1)

    other, labels = volume(tmp_path, "b", truth, seed=9)  # not learnt from
    plan = plan_segment(other, model=str(tmp_path / "m"), name="found")
    right = np.asarray(segment(plan, run=run_serial).labels.array[:]) == (labels == 7)
    assert right.mean(axis=(1, 2)).min() > 0.9  # of every slice, the first and the last one, too


def test_a_target_is_that_of_the_slice_between(tmp_path):
    grain, _, below = slices()
    for name, voxels in (("scan", stored(grain)), ("target", stored(below))):
        tifffile.imwrite(tmp_path / f"{name}.tif", voxels, photometric="minisblack")
        ingest(str(tmp_path / f"{name}.tif"), str(tmp_path / f"{name}.zarr"), voxel_size_um=SIZE)
    scan, target = str(tmp_path / "scan.zarr"), str(tmp_path / "target.zarr")
    recipe = replace(BESIDE, loss=Loss.L2, steps=120)
    with_neighbours, alone = (
        train([scan], targets=[target], model=str(tmp_path / f"m{n}"), recipe=replace(recipe, neighbours=n))
        for n in (1, 0)
    )
    assert with_neighbours.best.psnr > alone.best.psnr + 6
    plan = plan_segment(scan, model=str(tmp_path / "m1"), name="found")
    found = np.asarray(open_array(segment(plan, run=run_serial).result.location / "0")[0])
    assert np.abs(found - stored(below)).mean() < 0.4 * np.abs(stored(grain).astype(float) - stored(below)).mean()


def test_a_run_that_was_ended_goes_on_to_the_same_file(tmp_path, monkeypatch):
    image, _ = volume(tmp_path, "v", TRUTHS["the slice below"][0])
    changed = Augmentation(rotation_degrees=30, elastic_sigma_voxels=1, noise=0.1)
    recipe = replace(BESIDE, steps=6, validate_every=2, augmentation=changed, foreground_share=0.3)
    about = {"labels": "truth", "recipe": recipe}
    train([image], model=str(tmp_path / "whole"), **about)

    def stop(_):
        raise KilledError

    with pytest.raises(KilledError):
        train([image], model=str(tmp_path / "ended"), on_progress=stop, **about)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)  # and from disk as from memory
    assert train([image], model=str(tmp_path / "ended"), **about).n_before == 2
    assert (tmp_path / "ended").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "ended.sample.png").read_bytes() == (tmp_path / "whole.sample.png").read_bytes()


def test_pictures_show_the_slice_whose_truth_they_show(tmp_path):
    image, _ = volume(tmp_path, "v", TRUTHS["the slice below"][0])
    pictures = []
    for n in (0, 1, 2):
        (tmp_path / "r.toml").write_text(f"dims = 2\nneighbours = {n}\npatch = 32\ndepth = 1")
        arguments = ["train", image, "--labels", "truth", "--recipe", str(tmp_path / "r.toml")]
        assert cli.main([*arguments, "--preview", str(tmp_path / f"{n}.png")]) == 0
        pictures.append((tmp_path / f"{n}.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    train([image], labels="truth", model=str(tmp_path / "m"), recipe=replace(BESIDE, steps=1))
    train([image], labels="truth", model=str(tmp_path / "alone"), recipe=replace(BESIDE, steps=1, neighbours=0))
    both = [imagecodecs.png_decode((tmp_path / f"{name}.sample.png").read_bytes()) for name in ("m", "alone")]
    assert np.array_equal(*(each[:, :56] for each in both))
    assert not np.array_equal(*both)


def test_every_channel_of_an_image_has_its_neighbours(tmp_path):
    grain = slices()[0]
    np.save(tmp_path / "two.npy", np.stack([stored(grain), stored(grain[::-1])]))
    image = str(ingest(str(tmp_path / "two.npy"), str(tmp_path / "two.zarr")).location)
    tifffile.imwrite(tmp_path / "t.tif", (grain > 0).astype(np.uint8), photometric="minisblack")
    assert cli.main(["ingest", "--labels-of", image, "--name", "truth", str(tmp_path / "t.tif")]) == 0
    lesson = open_lesson([image], labels="truth", recipe=BESIDE)
    assert (lesson.settings.in_channels, lesson.settings.image_channels) == (6, 2)
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=replace(BESIDE, steps=1))
    assert result.model.channels == ("0", "1")


@pytest.mark.parametrize(("shape", "dims", "told"), [
    ((48, 56), 2, "neighbours are slices of volumes, got images of shape (48, 56)"),
    ((1, 48, 56), 2, "neighbours are slices of volumes, got images of shape (48, 56)"),
    ((20, 24, 24), 3, "neighbours need a 2-D network, got 1 for a 3-D one"),
])  # fmt: skip
def test_images_without_neighbours_are_refused_in_one_line(tmp_path, capsys, shape, dims, told):
    image = image_of(tmp_path, "v", *(np.arange(np.prod(shape)).reshape(shape).astype(np.uint8) % 2,) * 2)
    (tmp_path / "r.toml").write_text(f"dims = {dims}\nneighbours = 1")
    arguments = ["train", image, "--labels", "truth", "--model", str(tmp_path / "m")]
    assert cli.main([*arguments, "--recipe", str(tmp_path / "r.toml")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_slices_must_lie_about_as_far_apart_in_all_images(tmp_path):
    grain = slices((3, 48, 56))[0]
    images = [
        image_of(tmp_path, name, stored(grain), (grain > 0).astype(np.uint8), size=size)
        for name, size in (("a", (0.05, 0.004, 0.004)), ("b", (0.05, 0.008, 0.008)), ("c", (0.1, 0.004, 0.004)))
    ]
    recipe = replace(BESIDE, voxel_size_um=(0.004, 0.004))
    lesson = open_lesson(images[:2], labels="truth", recipe=recipe)
    assert lesson.learn.sources[1].steps == (1.0, 0.5, 0.5)
    open_lesson(images, labels="truth", recipe=replace(recipe, neighbours=0))
    with pytest.raises(ArgumentError, match=r"about as far apart, got 0.05 and 0.1 um in .*c.zarr; leave"):
        open_lesson(images, labels="truth", recipe=recipe)
