"""Losses against their formulas, written down once more in plain numpy."""

import numpy as np
import pytest
import torch

from pipeline.unet.training.losses import Loss, Objective, balanced, voxel_weights
from pipeline.unet.training.patches import IGNORED

OF_CLASSES = [each for each in Loss if not each.is_of_values]
SHAPES = [(3, 4, 5, 6), (2, 3, 4, 3, 5)]


def drawn(shape, *, seed=0, share=0.3):
    """Return logits, classes with some ignored, and border weights."""
    rng = np.random.default_rng(seed)
    n_classes = shape[1]
    classes = rng.integers(0, n_classes, (shape[0], *shape[2:]))
    classes[rng.random(classes.shape) < share] = IGNORED
    return rng.normal(size=shape) * 2, classes, rng.uniform(0, 3, classes.shape)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def by_numpy(loss, logits, classes, borders, class_weights, gamma=2.0):
    """Return the loss, summed voxel by voxel."""
    likely, sums, weights = softmax(logits), 0.0, 0.0
    for at in zip(*np.nonzero(classes != IGNORED), strict=True):
        c, (b, *place) = classes[at], at
        w = (1.0 if class_weights is None else class_weights[c]) + (0.0 if borders is None else borders[at])
        if loss.is_of_labels:
            p = 1 / (1 + np.exp(-logits[(b, slice(None), *place)]))
            g = np.arange(1, len(p) + 1) == c
            each = np.mean(-np.where(g, np.log(p), np.log(1 - p)))
        else:
            p = likely[(b, c, *place)]
            each = -np.log(p) * ((1 - p) ** gamma if loss is Loss.FOCAL else 1)
        sums, weights = sums + w * each, weights + w
    total = 0.0 if loss is Loss.DICE else sums / weights
    if loss in {Loss.DICE, Loss.DICE_CROSS_ENTROPY, Loss.DICE_BINARY_CROSS_ENTROPY}:
        overlaps, likely = [], 1 / (1 + np.exp(-logits)) if loss.is_of_labels else likely
        for c in range(logits.shape[1]):
            g, p = (classes == c + loss.is_of_labels).astype(float), likely[:, c] * (classes != IGNORED)
            if g.any():
                overlaps.append(2 * (g * p).sum() / ((g**2).sum() + (p**2).sum()))
        total += 1 - np.mean(overlaps)
    return total


@pytest.mark.parametrize("loss", OF_CLASSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_their_formulas(loss, shape, weighted):
    logits, classes, borders = drawn(shape)
    n_classes = shape[1] + loss.is_of_labels
    by_class = np.linspace(0.5, 2, n_classes) if weighted else None
    borders = borders if weighted else None
    objective = Objective(loss, None if by_class is None else torch.from_numpy(by_class))
    given = None if borders is None else torch.from_numpy(borders)
    got = objective(torch.from_numpy(logits), torch.from_numpy(classes), given)
    assert float(got) == pytest.approx(by_numpy(loss, logits, classes, borders, by_class), rel=1e-6)


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_gradients_are_those_of_finite_differences(loss):
    logits, classes, borders = (torch.from_numpy(each) for each in drawn((2, 3, 3, 4)))
    objective = Objective(loss)
    assert torch.autograd.gradcheck(lambda x: objective(x, classes, borders), logits.requires_grad_())


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_voxels_that_are_ignored_have_no_gradient_and_no_effect(loss):
    logits, classes, borders = (torch.from_numpy(each) for each in drawn((2, 3, 6, 7)))
    ignored = (classes == IGNORED).unsqueeze(1).expand_as(logits)
    logits.requires_grad_()
    value = Objective(loss)(logits, classes, borders)
    value.backward()
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    assert torch.equal(Objective(loss)(other, classes, borders), value)


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_a_batch_without_labels_has_no_loss_and_no_gradient(loss):
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    value = Objective(loss)(logits, torch.full((1, 4, 4), IGNORED))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_what_is_right_costs_nothing_and_what_is_wrong_costs_more(loss):
    _, classes, _ = drawn((2, 3, 6, 7))
    channels = np.arange(3) + loss.is_of_labels
    right = torch.from_numpy(np.where(classes[:, None] == channels.reshape(1, 3, 1, 1), 40.0, -40.0))
    objective, truth = Objective(loss), torch.from_numpy(classes)
    assert float(objective(right, truth)) == pytest.approx(0, abs=1e-6)
    costs = [float(objective(right * share, truth)) for share in (0.1, 0.0, -0.1)]
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize("loss", [each for each in OF_CLASSES if each.takes_weights])
def test_equal_weights_change_nothing(loss):
    logits, classes, _ = (torch.from_numpy(each) for each in drawn((2, 3, 6, 7)))
    plain, heavy = Objective(loss), Objective(loss, torch.full((4,), 7.0))
    assert float(heavy(logits, classes)) == pytest.approx(float(plain(logits, classes)), rel=1e-6)


def test_cross_entropy_is_torchs_and_focal_without_focus_is_it():
    logits, classes, _ = (torch.from_numpy(each) for each in drawn((2, 3, 6, 7)))
    expected = float(torch.nn.functional.cross_entropy(logits, classes, ignore_index=IGNORED))
    assert float(Objective()(logits, classes)) == pytest.approx(expected, rel=1e-6)
    assert float(Objective(Loss.FOCAL, focal_gamma=0.0)(logits, classes)) == pytest.approx(expected, rel=1e-6)


def test_focal_has_a_gradient_where_all_is_right():
    for gamma in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[[[200.0]], [[-200.0]]]], requires_grad=True)
        Objective(Loss.FOCAL, focal_gamma=gamma)(logits, torch.zeros((1, 1, 1), dtype=torch.int64)).backward()
        assert torch.isfinite(logits.grad).all()


def test_weights_are_the_papers_sum():
    classes = torch.tensor([[0, 1, 2, IGNORED]])
    got = voxel_weights(classes, class_weights=torch.tensor([0.5, 1.0, 3.0]), borders=torch.tensor([[10.0, 0, 1, 5]]))
    assert got.tolist() == [[10.5, 1.0, 4.0, 0.0]]
    assert voxel_weights(classes).tolist() == [[1, 1, 1, 0]]


def test_balanced_classes_count_alike():
    counts = torch.tensor([10, 30, 0, 60])
    weights = balanced(counts)
    assert (weights * counts)[counts > 0].tolist() == pytest.approx([100 / 3] * 3)
    assert float(weights[2]) == 1
