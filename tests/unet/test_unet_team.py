"""Two processes equal one with the same whole batch, whatever is not a plain mean over voxels."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_unet_fit import RECIPE, patches_of

from pipeline.config import Precision
from pipeline.errors import ArgumentError
from pipeline.unet.settings import Family
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.checkpoint import CheckpointFile
from pipeline.unet.training.fit import fit
from pipeline.unet.training.launch import launch
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.overlapping import Overlapping
from pipeline.unet.training.processes import processes_for
from pipeline.unet.training.recipe import Optimiser, Schedule
from pipeline.unet.training.targets import UNKNOWN, Target
from pipeline.unet.training.team import ALONE, Team

# Steps of sgd follow the gradient; adamw makes whole steps of gradients that are little more than rounding.
SHORT = replace(
    RECIPE, optimiser=Optimiser.SGD, momentum=0.9, learning_rate=0.05, steps=4, validate_every=2, batch=4,
    schedule=Schedule.CONSTANT,
)  # fmt: skip
NAMES = ("none", "grain", "rows")  # of labels that overlap
CASES = {
    **{f"{loss}": replace(SHORT, loss=loss) for loss in Loss},
    "no batch norm": replace(SHORT, batch_norm=False),
    "weights of classes": replace(SHORT, balance_classes=True, loss=Loss.CROSS_ENTROPY),
    "dropout, three patches": replace(SHORT, dropout=0.4, batch=3),
    "average, longest gradient": replace(SHORT, ema=0.9, clip_norm=0.01),
    "adamw": replace(SHORT, optimiser=Optimiser.ADAMW, learning_rate=1e-3),
    "volumes": replace(SHORT, dims=3, depth=1, patch=16, batch=2),
    "changed, going on": replace(SHORT, augmentation=Augmentation(rotation_degrees=90, noise=0.1, gamma=0.3)),
    "deep supervision": replace(SHORT, family=Family.NESTED, deep_supervision=True),
    **{f"overlapping, {loss}": replace(SHORT, loss=loss, classes=NAMES) for loss in Loss if loss.is_of_labels},
    "halved": replace(SHORT, precision=Precision.BF16),
}


def lesson_of(recipe):
    """Return settings and patches; labels are sparse to the left and borders weigh: no two patches count alike."""
    shape = (24, 40, 72) if recipe.dims == 3 else (128, 144)
    values = recipe.loss.is_of_values
    settings = recipe.network(
        dims=recipe.dims or 2, in_channels=1, n_classes=1 if values else len(recipe.classes) or 2
    )
    learn, check = patches_of(shape, settings, recipe)
    if recipe.classes:
        return settings, *map(overlapping, (learn, check))
    (source,) = learn.sources
    labels = source.labels.copy()
    labels[..., : shape[-1] // 2][np.random.default_rng(0).random((*shape[:-1], shape[-1] // 2)) < 0.9] = 255
    if values:
        target = Target(source.image[..., ::-1].copy(), source.windows, (255.0,))
        known = replace(source, labels=(labels == 255) * np.uint8(UNKNOWN), target=target)
        held_out = replace(check.sources[0], labels=np.zeros_like(labels), target=target)
        learn, check = (replace(each, class_values=(0,), ignore=UNKNOWN) for each in (learn, check))
        return settings, replace(learn, sources=(known,)), replace(check, sources=(held_out,))
    borders = np.linspace(0, 5, labels.size, dtype=np.float32).reshape(labels.shape)
    borders = borders if recipe.loss.takes_weights else None
    return settings, replace(learn, sources=(replace(source, labels=labels, borders=borders),), ignore=255), check


def overlapping(patches):
    """Return the patches with two labels that cross; of each, nobody knows where most of it is to one side."""
    # of seed 0 a voxel lies on the edge of a ReLU: rounding alone, of one process too, then moves weights by 2e-4
    (source,), rng = patches.sources, np.random.default_rng(1)
    shape = source.labels.shape
    rows = np.broadcast_to((np.arange(shape[0]) // 20 % 2)[:, None], shape)
    labels = [each.astype(np.int8) for each in (source.labels, rows)]
    for label, side in zip(labels, (np.s_[:, :72], np.s_[:64]), strict=True):
        label[side][rng.random(label[side].shape) < 0.9] = -1
    source = replace(source, labels=Overlapping(tuple(labels))[:, :])
    return replace(patches, sources=(source,), class_values=(), n_overlapping=2)


def fitted(recipe, *, team=ALONE, checkpoint=None):
    settings, learn, check = lesson_of(recipe)
    return fit(
        settings, learn, validation=check, recipe=recipe, device="cpu", seed=3, team=team, checkpoint=checkpoint
    )


def all_cases(folder, *, team, say):
    made = {name: fitted(recipe, team=team) for name, recipe in CASES.items() if "going on" not in name}
    recipe, file = CASES["changed, going on"], CheckpointFile(f"{folder}/checkpoint", {})
    fitted(replace(recipe, steps=2), team=team, checkpoint=file)
    made["changed, going on"] = fitted(recipe, team=team, checkpoint=file)
    say("all done")
    return made


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    said = []
    made = launch(partial(all_cases, tmp_path_factory.mktemp("two")), 2, device="cpu", on_word=said.append)
    assert said == ["all done"]  # by the first one alone
    return made


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, by_two):
    one, two = fitted(CASES[name]), by_two[name]
    assert two.n_before == (2 if "going on" in name else 0)
    near = 0.02 if name == "halved" else 2e-5
    for name_of_weight, tensor in one.weights.items():
        assert torch.allclose(two.weights[name_of_weight], tensor, rtol=near, atol=near), name_of_weight
    for a, b in zip(one.curve, two.curve, strict=True):
        assert (a.step, a.train_loss, a.loss) == pytest.approx((b.step, b.train_loss, b.loss), rel=near)


def test_weights_of_the_cases_move_further_than_they_may_differ():
    moved = fitted(SHORT).weights["head.weight"] - fitted(replace(SHORT, steps=1)).weights["head.weight"]
    assert float(moved.abs().max()) > 100 * 2e-5


@pytest.mark.parametrize(("n_patches", "n"), [(8, 2), (3, 2), (5, 4), (4, 4)])
def test_shares_are_a_batch_and_as_equal_as_can_be(n_patches, n):
    shares = [list(range(n_patches))[Team(rank, n).share(n_patches)] for rank in range(n)]
    assert [each for share in shares for each in share] == list(range(n_patches))
    assert {len(share) for share in shares} <= {n_patches // n, -(-n_patches // n)}


def test_processes_are_as_many_as_gpus_and_patches_suffice_for(monkeypatch):
    assert processes_for("cpu", asked=None, n_patches=8) == 1
    assert processes_for("cpu", asked=3, n_patches=8) == 3
    with pytest.raises(ArgumentError, match="needs a patch of every batch, got 9 processes and batch 8; use --process"):
        processes_for("cpu", asked=9, n_patches=8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [processes_for("cuda", asked=None, n_patches=n) for n in (8, 2, 1)] == [4, 2, 1]
    with pytest.raises(ArgumentError, match="needs a GPU of its own, got 5 and 4 GPUs; use 4"):
        processes_for("cuda", asked=5, n_patches=8)
