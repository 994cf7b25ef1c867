"""Values instead of classes: losses, targets that move with their images, what is read off a linear head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio
from test_unet_predict import scan_of, whole

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.labels.deviations import Deviations
from pipeline.store.scaling import Window
from pipeline.store.statistics import Histogram, merge
from pipeline.unet.network import UNet
from pipeline.unet.numbers import restored
from pipeline.unet.readout import Readout
from pipeline.unet.settings import Head, Padding, UNetSettings, closed_form_rule
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Loss, Objective
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.patches import IGNORED, Patches
from pipeline.unet.training.recipe import Recipe, load_recipe
from pipeline.unet.training.source import Source
from pipeline.unet.training.targets import UNKNOWN, Known, Target, common_windows
from pipeline.unet.training.validation import validate
from pipeline.unet.training.warp import batch_of

ALL = Augmentation(
    rotation_degrees=40, scale=0.3, shear=0.1, shift_voxels=3, elastic_sigma_voxels=1, brightness=0, contrast=0
)


@pytest.mark.parametrize(("loss", "power"), [(Loss.L1, 1), (Loss.L2, 2)])
def test_losses_of_values_are_their_formulas(loss, power):
    rng = np.random.default_rng(0)
    values, target = rng.normal(size=(2, 3, 2, 5, 6))
    classes = np.where(rng.random((3, 5, 6)) < 0.3, IGNORED, 0)
    borders = rng.uniform(0, 3, classes.shape)
    weights = (1 + borders) * (classes != IGNORED)
    expected = (np.abs(values - target) ** power).mean(axis=1)
    given = [torch.from_numpy(each) for each in (values, classes, borders, target)]
    found = Objective(loss)(*given)
    assert found.item() == pytest.approx((expected * weights).sum() / weights.sum(), rel=1e-6)
    given[3][torch.from_numpy(classes == IGNORED)[:, None].expand(3, 2, 5, 6)] = 1e9
    assert Objective(loss)(*given).item() == found.item()
    assert Objective(loss)(given[0], torch.full_like(given[1], IGNORED), None, given[3]).item() == 0


def test_losses_and_truths_of_other_kinds_are_refused():
    x, classes = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="need a target image, and other losses labels, got loss l1"):
        Objective(Loss.L1)(x, classes)
    with pytest.raises(ArgumentError, match="got loss dice; give the other"):
        Objective(Loss.DICE)(x, classes, None, x)
    with pytest.raises(ArgumentError, match="l2 learns values, which have no classes, got instances, border_weight"):
        Recipe(loss=Loss.L2, instances=True, border_weight=1)
    with pytest.raises(ArgumentError, match="a linear head needs the windows of its target"):
        Readout(Head.LINEAR)


def pairs(image, target, *, ignore=None, change=ALL, halo=0, core=16):
    """Return patches of one image and its target, both as they are."""
    n, spans = target.ndim - 1, tuple(np.ptp(each) for each in target)
    unscaled = (Window(0.0, 1.0),)
    source = Source(
        image, Known(target, ignore), unscaled * len(image), Box.whole(target.shape[1:]),
        target=Target(target, ((0.0, 1.0),) * len(target), spans),
    )  # fmt: skip
    size, halos = (core,) * n, (halo,) * n
    turns = orientations(size, halo=halos, voxel_size_um=None)
    return Patches((source,), size, halos, (0,), n, turns, change, ignore=None if ignore is None else UNKNOWN)


@pytest.mark.parametrize("shape", [(60, 70), (24, 30, 26)])
@pytest.mark.parametrize("halo", [0, 4])
def test_image_and_target_move_through_the_same_field(shape, halo):
    marker = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    patches = pairs(marker, 3 * marker, halo=halo, core=8)
    batch = batch_of([patches.draw(np.random.default_rng(seed)) for seed in range(6)], device="cpu")
    inner = (slice(None), slice(None), *(slice(halo, halo + 8),) * len(shape))
    assert batch.target.shape == (6, 2, *(8,) * len(shape))
    known = (batch.classes == 0)[:, None].expand(batch.target.shape)
    assert known.float().mean() > 0.5
    assert torch.allclose(batch.target[known], 3 * batch.images[inner][known], atol=1e-3)


def test_what_is_not_known_of_a_target_never_counts_however_it_is_warped():
    target = np.ones((1, 60, 70), np.float32)
    target[0, 20:40, 30:50] = 7
    for change in (ALL, Augmentation(brightness=0, contrast=0)):
        patches = pairs(target, target, ignore=7, change=change)
        batch = batch_of([patches.draw(np.random.default_rng(seed)) for seed in range(20)], device="cpu")
        known = (batch.classes == 0)[:, None]
        assert 0.2 < known.float().mean() < 1
        assert torch.allclose(batch.target[known], torch.ones(()), atol=1e-5)


def test_nothing_changed_gives_the_very_voxels():
    image = np.random.default_rng(1).integers(0, 999, (1, 32, 40)).astype(np.uint16)
    patches = pairs(image, image + 5, change=replace(ALL, warped_share=0.0))
    batch = batch_of([patches.draw(np.random.default_rng(3))], device="cpu")
    assert torch.equal(batch.images + 5, batch.target)


def test_targets_share_the_windows_of_all_their_voxels():
    rng = np.random.default_rng(0)
    volumes = [rng.normal(40, 3, (2, 30)), rng.normal(1000, 80, (2, 90))]
    statistics = [merge([tuple(map(Histogram.of, each.astype(np.float32)))]) for each in volumes]
    found = common_windows(statistics)
    for channel, (offset, scale) in enumerate(found):
        together = np.concatenate([each[channel].astype(np.float32) for each in volumes])
        assert offset == pytest.approx(together.mean(), rel=1e-6)
        assert 1 / scale == pytest.approx(together.std(), rel=1e-6)
    assert common_windows(statistics[:1])[0] == pytest.approx((statistics[0][0].mean, 1 / statistics[0][0].std))


def test_values_are_brought_back_to_the_intensities():
    windows = ((60000.0, 0.1), (-3.0, 2.0))
    intensities = torch.tensor([[60001.0, 59990.5], [-3.25, 4.5]], dtype=torch.float64)[None]
    offset, scale = torch.tensor(windows, dtype=torch.float64).unbind(1)
    values = ((intensities - offset[:, None]) * scale[:, None]).float()
    assert torch.allclose(restored(values, windows).double(), intensities, rtol=2e-7)


@pytest.mark.parametrize("padding", Padding)
def test_validation_tells_the_ratio_of_whole_scan_inference(padding):
    settings = UNetSettings(dims=2, n_classes=2, width=4, depth=2, padding=padding, head=Head.LINEAR)
    torch.manual_seed(1)
    network, image = UNet(settings).eval().requires_grad_(False), scan_of((37, 61), seed=3)
    target = np.random.default_rng(5).normal(0, 1, (2, 37, 61)).astype(np.float32)
    patches, region = pairs(image, target), Box((22, 0), (37, 61))
    source = replace(patches.sources[0], region=region, windows=(Window(100.0, 1 / 64),))
    found = validate(
        network, replace(patches, sources=(source,)), objective=Objective(Loss.L2), device="cpu", step=1, train_loss=0.0
    )
    values = whole(network, image, closed_form_rule(settings))[(slice(None), *region.slices)]
    truth = target[(slice(None), *region.slices)]
    squares = ((values - truth) / np.ptp(target, axis=(1, 2), keepdims=True)) ** 2
    assert found.psnr == pytest.approx(-10 * np.log10(squares.mean()), abs=1e-4)
    assert found.loss == pytest.approx(((values - truth) ** 2).mean(), rel=1e-5)
    assert (found.dice, found.told) == ((), f"PSNR {found.psnr:.2f} dB")


def test_deviations_add_up_to_those_of_the_whole_and_agree_with_scikit_image():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4000, (1, 20, 30)).astype(np.uint16)
    values = truth + rng.normal(0, 50, truth.shape).astype(np.float32)
    parts = Deviations.of(values[:, :7], truth[:, :7]) + Deviations.of(values[:, 7:], truth[:, 7:])
    found = parts.figures()
    psnr = peak_signal_noise_ratio(truth.astype(float), values.astype(float), data_range=float(np.ptp(truth)))
    assert found.psnr_db == pytest.approx(psnr, rel=1e-9)
    assert found.rmse**2 == pytest.approx(mean_squared_error(truth, values), rel=1e-9)
    assert found.mae == pytest.approx(np.abs(values - truth).mean(), rel=1e-6)
    same = Deviations.of(truth, truth).figures()
    assert (same.mae, same.rmse, same.psnr_db) == (0, 0, None)
    assert Deviations.of(np.ones((1, 4)), np.zeros((1, 4))).figures().psnr_db is None


def test_the_recipe_makes_a_linear_head():
    recipe = load_recipe("regression")
    settings = recipe.network(dims=3, in_channels=2, n_classes=1)
    assert (settings.head, settings.n_classes, settings.n_labels) == (Head.LINEAR, 1, 0)
