"""Overlapping labels as codes, and what is learnt and told of them, against plain numpy, label by label."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.geometry.box import Box
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.borders import in_memory
from pipeline.unet.training.losses import Loss, Objective, of_codes
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.overlapping import MOST_LABELS, Overlapping, first_of, label_by_label
from pipeline.unet.training.patches import IGNORED, Patches, Source
from pipeline.unet.training.validation import _EachLabel
from pipeline.unet.training.warp import Batch, batch_of

KNOWN = st.integers(1, MOST_LABELS).flatmap(
    lambda n: arrays(np.int8, (n, 3, 4), elements=st.integers(-1, 1))
)


@given(KNOWN)
def test_codes_tell_each_label_and_where_it_is_unknown(labels):
    n, codes = len(labels), in_memory(Overlapping(tuple(labels)))
    assert np.array_equal(codes == IGNORED, (labels < 0).all(axis=0))
    has, known = (each[0].numpy() for each in of_codes(torch.from_numpy(codes)[None].long(), n))
    assert np.array_equal(known, labels >= 0)
    assert np.array_equal(has & known, labels == 1)
    none, *each = label_by_label(codes, n)
    assert np.array_equal(none == 0, (labels == 0).all(axis=0))
    assert all(np.array_equal(found == number, labels[number - 1] == 1) for number, found in enumerate(each, start=1))
    assert all(((found == number) | (found == -1)).all() for number, found in enumerate([none, *each]))
    first = np.where((labels == 1).any(axis=0), (labels == 1).argmax(axis=0) + 1, 0)
    assert np.array_equal(first_of(codes), np.where(codes == IGNORED, IGNORED, first))


def drawn(shape=(2, 3, 6, 7), *, seed=0):
    """Return logits (batch, labels, y, x), and labels of the same shape: 1, 0, or -1 where nobody knows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 2, shape).astype(np.int8)
    labels[0, :, :2] = -1
    return rng.normal(size=shape) * 2, labels


def codes_of(labels):
    return torch.from_numpy(np.stack([Overlapping(tuple(each))[:, :] for each in labels])).long()


OF_LABELS = [each for each in Loss if each.is_of_labels]


def by_numpy(loss, logits, labels):
    """Return the mean cross-entropy over what is known, and of Dice one minus the mean over labels that are there."""
    known, p = labels >= 0, 1 / (1 + np.exp(-logits))
    found = -np.where(labels == 1, np.log(p), np.log(1 - p))[known].mean()
    if loss is Loss.BINARY_CROSS_ENTROPY:
        return found
    overlaps = []
    for c in range(labels.shape[1]):
        likely, has = p[:, c][known[:, c]], labels[:, c][known[:, c]] == 1
        if has.any():
            overlaps.append(2 * likely[has].sum() / ((likely**2).sum() + has.sum()))
    return found + (1 - np.mean(overlaps) if overlaps else 0)


@pytest.mark.parametrize("absent", [[], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("loss", OF_LABELS)
def test_the_loss_is_over_what_is_known_of_each_label(loss, absent):
    logits, labels = drawn()
    labels[:, absent] = np.minimum(labels[:, absent], 0)  # known of some voxels that they do not have it
    found = Objective(loss, n_overlapping=3)(torch.tensor(logits), codes_of(labels))
    assert float(found) == pytest.approx(by_numpy(loss, logits, labels), rel=1e-6)


@pytest.mark.parametrize("loss", OF_LABELS)
def test_what_is_unknown_of_a_label_has_no_gradient_and_no_effect(loss):
    logits, labels = drawn()
    x, codes, objective = torch.tensor(logits, requires_grad=True), codes_of(labels), Objective(loss, n_overlapping=3)
    value = objective(x, codes)
    value.backward()
    assert np.array_equal(x.grad.numpy() != 0, labels >= 0)
    other = torch.where(torch.from_numpy(labels < 0), 30 * torch.randn_like(x), x)
    assert torch.equal(objective(other, codes), value)


@pytest.mark.parametrize("loss", OF_LABELS)
def test_gradients_of_labels_are_those_of_finite_differences(loss):
    logits, labels = drawn((2, 3, 3, 4))
    objective, codes = Objective(loss, n_overlapping=3), codes_of(labels)
    assert torch.autograd.gradcheck(lambda x: objective(x, codes), torch.tensor(logits, requires_grad=True))


@pytest.mark.parametrize("loss", OF_LABELS)
def test_labels_that_are_right_cost_nothing_and_what_nobody_knows_at_all_has_no_loss(loss):
    _, labels = drawn()
    objective = Objective(loss, n_overlapping=3)
    right = torch.from_numpy(np.where(labels == 1, 40.0, -40.0)).requires_grad_()
    assert objective(right, codes_of(labels)).item() == pytest.approx(0, abs=1e-6)
    value = objective(right, codes_of(np.full_like(labels, -1)))
    value.backward()
    assert value.item() == 0
    assert (right.grad == 0).all()


def test_dice_is_of_each_label_and_of_none_where_they_are_known():
    tally, both, either = _EachLabel(3), np.zeros(4), np.zeros(4)
    for seed in range(3):
        logits, labels = drawn(seed=seed)
        codes = codes_of(labels)
        tally.add(None, torch.tensor(logits), Batch(torch.zeros(1), codes, None), codes != IGNORED)
        got, want, known = logits > 0, labels == 1, labels >= 0
        for c in range(3):
            both[c + 1] += (got & want)[:, c][known[:, c]].sum()
            either[c + 1] += got[:, c][known[:, c]].sum() + want[:, c][known[:, c]].sum()
        every = known.all(axis=1)
        got, want = ~got.any(axis=1)[every], ~want.any(axis=1)[every]
        both[0] += (got & want).sum()
        either[0] += got.sum() + want.sum()
    assert tally.figures()["dice"] == pytest.approx(2 * both / either)
    assert _EachLabel(2).figures() == {"dice": (None, None, None)}


def test_labels_move_with_the_image_and_rare_ones_are_drawn_though_others_hide_them():
    rng = np.random.default_rng(0)
    cell = (np.add.outer(np.arange(60) // 12, np.arange(60) // 12) % 2).astype(np.int8)
    nucleus = np.zeros_like(cell)
    nucleus[6, [18, 42]] = 1  # within cells
    image = (cell + 2 * nucleus).astype(np.float32)[None]
    source = Source(image, in_memory(Overlapping((cell, nucleus))), ((0.0, 1.0),), Box.whole(cell.shape))
    assert (cell[nucleus == 1] == 1).all()
    turns = orientations((8, 8), halo=(0, 0), voxel_size_um=None)
    still = Augmentation(brightness=0, contrast=0)
    patches = Patches((source,), (8, 8), (0, 0), (), 2, turns, still, n_overlapping=2).with_foreground(1.0)
    batch = batch_of(patches.batch(40, rng), device="cpu")
    assert torch.equal(batch.images[:, 0].long(), (batch.classes & 1) + (batch.classes & 2))
    about_a_nucleus = float((batch.classes[:, 3:5, 3:5] & 2 > 0).any(2).any(1).float().mean())
    assert 0.3 < about_a_nucleus < 0.7  # the other half is about cells, or none: the rarer of them
