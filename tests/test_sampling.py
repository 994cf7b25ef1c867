"""What training samples from images on disk: of many sizes, channels and voxel sizes, and hardly labelled."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from test_train import RECIPE, image_of, textures
from volumes import model_file

from pipeline.errors import ArgumentError
from pipeline.ingest import ingest
from pipeline.inspect import inspect
from pipeline.lesson import open_lesson
from pipeline.plan import plan_segment
from pipeline.store.image import open_image
from pipeline.store.statistics import Normalisation
from pipeline.train import train
from pipeline.unet.model import load_model
from pipeline.unet.settings import UNetSettings
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.batches import batches, draw_batch
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.patches import IGNORED
from pipeline.unet.training.warp import batch_of

pytestmark = pytest.mark.usefixtures("one_thread")
WARPED = Augmentation(rotation_degrees=180, scale=0.2, elastic_sigma_voxels=1)
SAME = replace(RECIPE, normalisation=Normalisation.WINDOW, window=((0.0, 2000.0),))
QUICK = replace(SAME, steps=2, validate_every=2)


def repeated(array, n):
    """Return an array of n times as many voxels along its last axes, each as large as a part."""
    return array.repeat(n, axis=-1).repeat(n, axis=-2)


def test_an_image_of_finer_voxels_trains_the_same_weights(tmp_path):
    voxels, labels = textures((160, 144))
    coarse = image_of(tmp_path, "c", voxels, labels, size=(0.5, 0.5))
    fine = image_of(tmp_path, "f", repeated(voxels, 2), repeated(labels, 2), size=(0.25, 0.25))
    about = {"labels": "truth", "recipe": replace(QUICK, voxel_size_um=(0.5, 0.5))}
    one, other = (train([image], model=f"{image}.model", **about) for image in (coarse, fine))
    assert one.best.train_loss == other.best.train_loss
    assert one.best.loss == pytest.approx(other.best.loss, rel=0.01)  # what is mirrored differs by half a voxel
    assert all(torch.equal(tensor, other.model.weights[name]) for name, tensor in one.model.weights.items())
    assert one.model.voxel_size_um == other.model.voxel_size_um == (0.5, 0.5)


def test_images_of_mixed_voxel_sizes_train_one_network(tmp_path, monkeypatch):
    images = [
        image_of(tmp_path, "a", *textures((100, 144)), size=(0.5, 0.5)),
        image_of(tmp_path, "b", *(repeated(each, 2) for each in textures((90, 96), seed=1)), size=(0.25, 0.25)),
        image_of(tmp_path, "small", *textures((30, 20), seed=2), size=(0.5, 0.5)),  # than a patch
    ]
    with pytest.raises(ArgumentError, match=r"same voxel size, got .*set voxel_size_um in the recipe"):
        train(images, labels="truth", model=str(tmp_path / "m"), recipe=SAME)
    recipe = replace(SAME, voxel_size_um=(0.5, 0.5), augmentation=replace(WARPED, warped_share=0.3))
    result = train(images, labels="truth", model=str(tmp_path / "m"), recipe=recipe)
    assert min(result.best.dice) > 0.85
    quick = replace(recipe, steps=2)
    train(images, labels="truth", model=str(tmp_path / "memory"), recipe=quick)
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", 0)
    train(images, labels="truth", model=str(tmp_path / "disk"), recipe=quick)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


def test_volumes_take_three_sizes_and_their_slices_two(tmp_path):
    voxels, labels = textures((20, 48, 64))
    images = [
        image_of(tmp_path, "a", voxels[:10], labels[:10], size=(0.08, 0.02, 0.02)),
        image_of(tmp_path, "b", repeated(voxels, 2), repeated(labels, 2), size=(0.04, 0.01, 0.01)),
    ]
    small = replace(QUICK, depth=1, patch=16, batch=2)
    lesson = open_lesson(images, labels="truth", recipe=replace(small, dims=3, voxel_size_um=(0.02, 0.02, 0.02)))
    assert [source.seen.shape for source in lesson.learn.sources] == [(32, 48, 64), (32, 48, 64)]
    assert lesson.voxel_size_um == (0.02, 0.02, 0.02)
    sliced = open_lesson(images, labels="truth", recipe=replace(small, dims=2, voxel_size_um=(0.02, 0.02)))
    assert [source.seen.shape for source in sliced.learn.sources] == [(8, 48, 64), (16, 48, 64)]
    assert sliced.voxel_size_um == (0.08, 0.02, 0.02)
    assert open_lesson(images[:1], labels="truth", recipe=replace(small, voxel_size_um=(0.02,) * 3)).settings.dims == 3
    for size, message in (((0.02, 0.02), "needs 3 numbers for images of"), ((0.02,) * 3, "--voxel-size-um")):
        untold = [image_of(tmp_path, f"u{len(size)}", voxels, labels)] if len(size) == 3 else []
        with pytest.raises(ArgumentError, match=message):
            open_lesson([*images, *untold], labels="truth", recipe=replace(small, voxel_size_um=size))
    for size in ((20.0,) * 3, (0.02, 0.02, 2e-5)):
        with pytest.raises(ArgumentError, match=r"at most 64 times the images' or a 64th, got .*; give micrometres"):
            open_lesson(images, labels="truth", recipe=replace(small, voxel_size_um=size))


def test_borders_between_instances_are_as_wide_for_every_voxel_size(tmp_path):
    ids = np.zeros((48, 48), np.uint32)
    ids[8:40, 4:22], ids[8:40, 26:44] = 1, 2
    size, recipe = (0.5, 0.5), replace(QUICK, instances=True, border_weight=10.0, border_sigma_voxels=4.0)
    images = [
        image_of(tmp_path, name, repeated(ids, n).astype(np.uint16), repeated(ids, n), size=(0.5 / n, 0.5 / n))
        for name, n in (("a", 1), ("b", 3))
    ]
    recipe = replace(recipe, voxel_size_um=size, patch=32)
    lesson = open_lesson(images[:1], labels="truth", recipe=recipe, held_out=images[1:])
    core = lesson.learn.place(lesson.learn.sources[0], np.random.default_rng(0))
    one, other = (
        batch_of([each.at(each.sources[0], core)], device="cpu").borders for each in (lesson.learn, lesson.check)
    )
    assert float(one.max()) > 4
    assert float(other.max()) == pytest.approx(float(one.max()), rel=0.3)  # a voxel wider from centre to centre


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_colours_of_pictures_of_mixed_sizes_are_learnt(tmp_path, monkeypatch, where):
    monkeypatch.setattr("pipeline.lesson.RESIDENT_BYTES", {"memory": 2**29, "disk": 0}[where])
    images, rng = [], np.random.default_rng(0)
    for name, shape in (("a", (96, 80)), ("b", (20, 150)), ("c", (60, 24))):
        labels = np.broadcast_to(np.arange(shape[1]) // 12 % 2, shape).astype(np.uint8)
        colours = np.where(labels[..., None], (120, 90, 60), (60, 90, 120))  # as bright, of another hue
        tifffile.imwrite(tmp_path / "s.tif", (colours + rng.integers(0, 60, (*shape, 3))).astype(np.uint8))
        images.append(image_of(tmp_path, name, np.zeros(shape, np.uint8), labels, scan=tmp_path / "s.tif"))
    result = train(images, labels="truth", model=str(tmp_path / "m"), recipe=replace(RECIPE, steps=20))
    assert result.model.settings.in_channels == 3
    assert min(result.best.dice) > 0.9


def test_brightness_and_contrast_of_slices_do_not_matter_where_each_is_seen_by_its_own_statistics(tmp_path):
    voxels, labels = textures((10, 48, 48))
    changed = (voxels.astype(np.float32) * 2.0 ** (np.arange(10) % 4)[:, None, None] + 7).astype(np.float32)
    even, uneven = (image_of(tmp_path, name, each, labels) for name, each in (("e", voxels), ("u", changed)))
    recipe = replace(RECIPE, dims=2, steps=2, normalisation=Normalisation.ZSCORE_SLICEWISE)
    one, other = (train([each], labels="truth", model=f"{each}.model", recipe=recipe) for each in (even, uneven))
    assert one.best.train_loss == pytest.approx(other.best.train_loss, rel=1e-5)
    assert one.best.loss == pytest.approx(other.best.loss, rel=1e-5)
    assert inspect(f"{even}.model")["normalisation"] == "zscore-slicewise"
    assert one.model.training["images"][0]["slices_sha256"] == open_image(even).slices_sha256
    with pytest.raises(ArgumentError, match="sees slices one by one, got a 3-D one; use zscore, or a 2-D network"):
        train([even], labels="truth", model=str(tmp_path / "m"), recipe=replace(recipe, dims=3))


def test_volumes_of_mixed_sizes_are_learnt_slice_by_slice(tmp_path):
    shapes = ((3, 70, 96), (9, 40, 96), (5, 20, 48))
    images = [image_of(tmp_path, str(i), *textures(shape, seed=i)) for i, shape in enumerate(shapes)]
    lesson = open_lesson(images, labels="truth", recipe=SAME)
    assert (lesson.settings.dims, lesson.learn.core[0]) == (2, 1)
    places = [lesson.learn._where(np.random.default_rng(seed)) for seed in range(200)]
    assert {place.start[0] for source, place in places if source is lesson.learn.sources[1]} == set(range(7))
    result = train(images, labels="truth", model=str(tmp_path / "m"), recipe=SAME)
    assert min(result.best.dice) > 0.85


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tenth_of_the_slices_labelled_teaches_all(tmp_path, dims):
    voxels, labels = textures((30, 40, 96))
    sparse = np.full_like(labels, 255)
    sparse[4::10] = labels[4::10]
    image, full = image_of(tmp_path, "v", voxels, sparse), image_of(tmp_path, "all", *textures((20, 40, 96), seed=5))
    recipe = replace(SAME, ignore=255, dims=dims, depth=4 - dims, patch={2: 32, 3: 8}[dims])
    lesson = open_lesson([image], labels="truth", recipe=recipe, held_out=[full])
    drawn = lesson.learn.batch(60, np.random.default_rng(0))
    assert all((patch.classes != IGNORED).any() for patch in drawn)
    if dims == 2:
        result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=recipe, held_out=[full])
        assert min(result.best.dice) > 0.85


def test_labels_of_which_all_are_ignored_where_it_is_to_learn_are_refused(tmp_path):
    voxels, labels = textures((60, 96))
    labels[:48] = 255
    image, nothing = image_of(tmp_path, "v", voxels, labels), image_of(tmp_path, "n", voxels, np.full_like(labels, 255))
    recipe = replace(SAME, ignore=255)
    with pytest.raises(ArgumentError, match="must show classes where the network is to learn, got ignored voxels"):
        open_lesson([nothing], labels="truth", recipe=recipe, held_out=[image])
    lesson = open_lesson([image], labels="truth", recipe=recipe)  # in its last fifth are all labels that there are
    assert all((patches.batch(1, np.random.default_rng(0))[0].classes != IGNORED).any()
               for patches in (lesson.learn, lesson.check.with_labelled()))


def test_an_organ_in_the_middle_is_learnt_and_held_out(tmp_path):
    voxels, labels = textures((20, 40, 96))
    organ = labels * ((np.arange(20) > 5) & (np.arange(20) < 13)).astype(np.uint8)[:, None, None]
    image = image_of(tmp_path, "v", voxels, organ)
    lesson = open_lesson([image], labels="truth", recipe=SAME)
    (held,) = (each for each in lesson.held_out if each)
    assert [source.region.start[0] for source in lesson.learn.sources] == [0, held.stop[0]]
    assert {source.region for source in lesson.check.sources} == {held}
    assert organ[held.slices].any()
    assert organ[lesson.learn.sources[0].region.slices].any() or organ[lesson.learn.sources[1].region.slices].any()
    result = train([image], labels="truth", model=str(tmp_path / "m"), recipe=replace(SAME, steps=4))
    assert result.model.training["images"][0]["held_out"]["start"] == list(held.start)
    assert min(result.best.dice) >= 0


def test_patches_are_the_same_whatever_the_number_of_readers(tmp_path):
    voxels, labels = textures((80, 96))
    labels[::3] = 255
    image = image_of(tmp_path, "v", voxels, labels, size=(0.5, 0.5))
    recipe = replace(
        SAME, ignore=255, foreground_share=0.3, voxel_size_um=(0.7, 0.4), augmentation=replace(WARPED, noise=0.1)
    )
    patches = open_lesson([image], labels="truth", recipe=recipe).learn
    expected = [batch_of(draw_batch(patches, 3, seed=5, step=step), device="cpu") for step in range(1, 7)]
    for ahead in (1, 2, 6):
        for step, drawn in batches(patches, 3, seed=5, first=1, last=6, ahead=ahead):
            batch = batch_of(drawn, device="cpu")
            assert torch.equal(batch.images, expected[step - 1].images)
            assert torch.equal(batch.classes, expected[step - 1].classes)


def test_windows_are_recorded_and_told_and_must_fit_the_image(tmp_path):
    voxels, labels = textures((64, 96))
    image = image_of(tmp_path, "a", voxels, labels)
    floats = image_of(tmp_path, "f", voxels.astype(np.float32), labels)
    recipe = replace(QUICK, window=((500.0, 1500.0),))
    train([image], labels="truth", model=str(tmp_path / "m"), recipe=recipe)
    assert load_model(tmp_path / "m").limits == ((500.0, 1500.0),)
    told = inspect(str(tmp_path / "m"))
    assert (told["normalisation"], told["limits"]) == ("window", [[500.0, 1500.0]])
    by_dtype = replace(QUICK, normalisation=Normalisation.DTYPE, window=())
    with pytest.raises(ArgumentError, match="normalisation dtype needs integers, got float32"):
        train([floats], labels="truth", model=str(tmp_path / "d"), recipe=by_dtype)
    train([image], labels="truth", model=str(tmp_path / "d"), recipe=by_dtype)
    with pytest.raises(ArgumentError, match="normalisation dtype needs integers, got float32"):
        plan_segment(floats, model=str(tmp_path / "d"), name="x")


def test_an_image_of_finer_voxels_than_the_models_is_told_how_to_have_them(tmp_path, caplog):
    voxels, labels = textures((320, 288))
    image = image_of(tmp_path, "a", voxels, labels, size=(0.25, 0.25))
    model = model_file(tmp_path / "m", UNetSettings(dims=2, width=2, depth=1), voxel_size_um=(0.5, 0.5))
    plan_segment(image, model=model, name="x")
    (told,) = caplog.messages
    assert "trained at (0.5, 0.5) um per voxel, the image has (0.25, 0.25): expect worse labels, or use its" in told
    level, _, option, size = told.partition("haloseg ingest ")[2].split()
    assert option == "--voxel-size-um"
    ingest(level, str(tmp_path / "coarse.zarr"), voxel_size_um=tuple(map(float, size.split(","))))
    caplog.clear()
    plan_segment(str(tmp_path / "coarse.zarr"), model=model, name="x")
    assert caplog.messages == []
    model = model_file(tmp_path / "m", UNetSettings(dims=2, width=2, depth=1), voxel_size_um=(0.1, 0.1))
    plan_segment(image, model=model, name="x")
    assert caplog.messages[0].endswith("resample the scan")


def test_a_target_moves_with_its_image_whatever_voxels_the_network_sees(tmp_path):
    image = image_of(tmp_path, "f", *textures((160, 144)), size=(0.25, 0.25))
    warped = replace(WARPED, brightness=0.0, contrast=0.0)
    recipe = replace(RECIPE, loss=Loss.L1, voxel_size_um=(0.5, 0.5), augmentation=warped)
    lesson = open_lesson([image], targets=[image], recipe=recipe)
    for step in range(3):
        batch = batch_of(draw_batch(lesson.learn, 4, seed=1, step=step), device="cpu")
        counted = batch.classes != IGNORED
        assert counted.float().mean() > 0.5
        assert torch.allclose(batch.target[:, 0][counted], batch.images[:, 0][counted], atol=1e-5)
