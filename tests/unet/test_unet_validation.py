"""Validation tells what inference on the whole scan would show in the part that is held out."""

import numpy as np
import pytest
import torch
from test_unet_predict import scan_of, trained, whole

from pipeline.geometry.box import Box
from pipeline.labels.metrics import ContingencyTable
from pipeline.unet.network import UNet
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule
from pipeline.unet.training import validation
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.patches import IGNORED, Patches, Source
from pipeline.unet.training.validation import sample, validate

WINDOW = ((100.0, 1 / 64),)


def patches_of(sources, *, n_axes, n_values):
    core = (8,) * sources[0].labels.ndim
    turns = orientations(core, halo=(0,) * len(core), voxel_size_um=None)
    return Patches(sources, core, (0,) * len(core), tuple(range(n_values)), n_axes, turns, Augmentation())


def labelled(shape, region, *, seed, n_values=3):
    labels = np.random.default_rng(seed).integers(0, n_values, shape).astype(np.uint8)
    return Source(scan_of(shape, seed=seed), labels, WINDOW, region)


NETS = [
    UNetSettings(dims=2, n_classes=3, width=4, depth=2, padding=Padding.SAME, batch_norm=True),
    UNetSettings(dims=2, n_classes=3, width=4, depth=2, padding=Padding.VALID),
    UNetSettings(dims=3, n_classes=3, width=4, depth=1, padding=Padding.SAME),
    UNetSettings(dims=2, in_channels=3, n_classes=3, width=4, depth=1, padding=Padding.SAME, neighbours=1),
]
CASES = [
    (NETS[0], (37, 61), Box((22, 0), (37, 61))),
    (NETS[1], (37, 61), Box((0, 0), (37, 61))),
    (NETS[0], (5, 20, 33), Box((3, 0, 0), (5, 20, 33))),
    (NETS[2], (13, 20, 17), Box((9, 0, 0), (13, 20, 17))),
    (NETS[3], (5, 20, 33), Box((2, 0, 0), (5, 20, 33))),
]
IDS = ["same", "valid", "slices", "3-D", "neighbours"]


@pytest.mark.parametrize("largest", [8, 512])
@pytest.mark.parametrize(("settings", "shape", "region"), CASES, ids=IDS)
def test_validation_is_what_whole_scan_inference_shows_in_the_region(settings, shape, region, largest, monkeypatch):
    monkeypatch.setattr(validation, "_LARGEST_CORE", {2: largest, 3: largest})
    net = trained(settings, seed=1)
    sources = labelled(shape, region, seed=3), labelled((*shape[:-1], shape[-1] + 5), region, seed=4)
    found = validate(
        net, patches_of(sources, n_axes=settings.dims, n_values=3), objective=Objective(), device="cpu", step=7,
        train_loss=0.5,
    )
    table, loss, n = ContingencyTable.empty(3), 0.0, 0
    for source in sources:
        likely = whole(net, source.image, closed_form_rule(settings))[(slice(None), *region.slices)]
        truth = source.labels[region.slices]
        table += ContingencyTable.of(likely.argmax(0), truth, values=(0, 1, 2))
        loss -= np.log(np.take_along_axis(likely, truth[None].astype(int), axis=0)).sum()
        n += truth.size
    assert found.dice == pytest.approx([each.dice for each in table.figures().classes], abs=1e-12)
    assert found.loss == pytest.approx(loss / n, rel=1e-5)
    assert (found.step, found.train_loss) == (7, 0.5)


@pytest.mark.parametrize(("settings", "shape", "region"), CASES, ids=IDS)
def test_a_sample_is_a_part_of_what_is_held_out_and_what_the_whole_scan_gives_there(settings, shape, region):
    net, source = trained(settings, seed=1), labelled(shape, region, seed=3)
    shown = sample([net], patches_of((source,), n_axes=settings.dims, n_values=3), device="cpu")
    classes = whole(net, source.image, closed_form_rule(settings)).argmax(0)
    counted = shown.truth != IGNORED
    slices = range(region.start[0], region.stop[0]) if settings.dims < len(shape) else [slice(None)]
    matches = []
    for z in slices:  # the sample lies in one of them
        truth = np.full(classes.shape, IGNORED)
        truth[region.slices] = source.labels[region.slices]
        for at in np.ndindex(*(max(1, n - 1) for n in truth[z].shape)):
            core = tuple(slice(a, a + m) for a, m in zip(at, shown.truth.shape, strict=True))
            part = truth[z][core]
            inside = tuple(slice(0, n) for n in part.shape)
            if counted[inside].sum() == counted.sum() and np.array_equal(part, shown.truth[inside]):
                matches.append((classes[z][core], shown.found[inside], counted[inside]))
    assert matches
    assert any(np.array_equal(want[where], got[where]) for want, got, where in matches)
    assert shown.image.ndim == shown.truth.ndim == settings.dims
    if settings.dims < len(shape):  # of the slice whose truth is told, not of a neighbour
        rule = closed_form_rule(settings)
        seen = shown.image[tuple(slice(h, h + n) for h, n in zip(rule.halo, shape[1:], strict=True))]
        (z,) = [z for z in slices if np.array_equal(source.image[0, z], (seen * 64 + 100).round())]
        assert np.array_equal(source.labels[z], shown.truth[: shape[1], : shape[2]])


def test_of_a_large_region_evenly_spread_tiles_are_tried(monkeypatch):
    monkeypatch.setattr(validation, "_LARGEST_CORE", {2: 16})
    monkeypatch.setattr(validation, "MOST_VOXELS", 4 * 256)
    source = labelled((64, 128), Box((0, 0), (64, 128)), seed=0)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if isinstance(module, UNet) else None
    )
    with hook:
        first, again = (
            validate(
                trained(NETS[0], seed=0), patches_of((source,), n_axes=2, n_values=3), objective=Objective(),
                device="cpu", step=1, train_loss=0.0,
            )
            for _ in range(2)
        )  # fmt: skip
    assert first == again
    assert len({tuple(x.flatten().tolist()) for x in seen[1:5]}) == 4  # the first is of ``trained``
    assert len(seen) == 10


def test_a_class_that_no_one_has_has_no_dice():
    network = UNet(NETS[0])
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, -100.0]))
    source = labelled((32, 32), Box((0, 0), (32, 32)), seed=0, n_values=2)
    patches = patches_of((source,), n_axes=2, n_values=3)
    found = validate(network, patches, objective=Objective(), device="cpu", step=0, train_loss=0.0)
    assert found.dice == (0.0, pytest.approx(2 / 3, abs=0.05), None)  # all is called 1, half of it is
    log_sum = np.log(1 + np.e)
    assert found.loss == pytest.approx((log_sum + log_sum - 1) / 2, abs=0.05)
