"""Losses: how far logits are from the classes or the target; what nobody has labelled counts in none of them.

Sums over voxels are divided by the sum of their weights, so that equal weights change nothing and the learning rate
keeps its meaning. A batch without a labelled voxel has the loss zero, and no gradient. Sums go through ``total``, so
that processes which learn together, each from a share of the batch, have the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ArgumentError
from pipeline.unet.training.overlapping import MOST_LABELS
from pipeline.unet.training.patches import IGNORED
from pipeline.unet.training.team import total


class Loss(StrEnum):
    """What is made small."""

    CROSS_ENTROPY = "cross_entropy"  # of a softmax; the paper's
    DICE = "dice"  # one minus the overlap of each class (doi:10.1109/3DV.2016.79)
    DICE_CROSS_ENTROPY = "dice_cross_entropy"  # their sum
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"  # of a sigmoid for each label, or each class but the first, none
    DICE_BINARY_CROSS_ENTROPY = "dice_binary_cross_entropy"  # that, and one minus the overlap of each of them
    FOCAL = "focal"  # cross-entropy with less of what is right already (doi:10.1109/ICCV.2017.324)
    L1 = "l1"  # of values: the mean distance from the target; tends to the median of what may be
    L2 = "l2"  # of values: the mean squared distance; tends to the mean

    @property
    def is_of_values(self) -> bool:
        """Whether it compares values with a target image, voxel by voxel, not classes with labels."""
        return self in (Loss.L1, Loss.L2)

    @property
    def is_of_labels(self) -> bool:
        """Whether it takes each label for itself, by a sigmoid: a voxel may have any number of them."""
        return self in (Loss.BINARY_CROSS_ENTROPY, Loss.DICE_BINARY_CROSS_ENTROPY)

    @property
    def takes_weights(self) -> bool:
        """Whether it is a sum over voxels, which weights make sense for."""
        return self is not Loss.DICE


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """A loss with its settings.

    Attributes
    ----------
    class_weights : float32 (classes,), the paper's w_c; None: all are one
    focal_gamma : how much less easy voxels count
    n_overlapping : labels whose codes are compared, see ``Overlapping``; 0: each voxel is of one class
    """

    loss: Loss = Loss.CROSS_ENTROPY
    class_weights: Tensor | None = None
    focal_gamma: float = 2.0
    n_overlapping: int = 0

    def __call__(
        self, logits: Tensor, classes: Tensor, borders: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar.

        Parameters
        ----------
        logits : (batch, channels, *core); classes : int64 (batch, *core), IGNORED where nobody knows
        borders : (batch, *core), what is added to a voxel's weight
        target : (batch, channels, *core), normalised, for losses of values
        """
        if self.loss.is_of_values != (target is not None):
            raise ArgumentError(
                f"l1 and l2 need a target image, and other losses labels, got loss {self.loss}; give the other, or "
                "another loss"
            )
        weights = voxel_weights(classes, class_weights=self.class_weights, borders=borders).to(logits.dtype)
        match self.loss:
            case Loss.CROSS_ENTROPY:
                return cross_entropy(logits, classes, weights)
            case Loss.DICE:
                return dice(logits, classes)
            case Loss.DICE_CROSS_ENTROPY:
                return dice(logits, classes) + cross_entropy(logits, classes, weights)
            case Loss.BINARY_CROSS_ENTROPY | Loss.DICE_BINARY_CROSS_ENTROPY:
                truth, known = (of_codes if self.n_overlapping else of_classes)(classes, logits.shape[1])
                each = binary_cross_entropy(logits, truth, weights.unsqueeze(1) * known)
                return each if self.loss is Loss.BINARY_CROSS_ENTROPY else each + dice_of_labels(logits, truth, known)
            case Loss.FOCAL:
                return focal(logits, classes, weights, gamma=self.focal_gamma)
            case Loss.L1 | Loss.L2:
                assert target is not None
                return distance(logits, target, weights, power=1 if self.loss is Loss.L1 else 2)


def voxel_weights(classes: Tensor, *, class_weights: Tensor | None = None, borders: Tensor | None = None) -> Tensor:
    """Return the weight of each voxel, ``w(x) = w_c(x) + border(x)``; zero where it is ignored.

    Ronneberger et al. 2015, doi:10.1007/978-3-319-24574-4_28, equation 2.
    """
    counted = classes != IGNORED
    weights = counted.float() if class_weights is None else class_weights.to(classes.device)[_known(classes)]
    if borders is not None:
        weights = weights + borders
    return weights * counted


def balanced(counts: Tensor) -> Tensor:
    """Return the weights of classes with which each counts as much as another, one on average; counts: (classes,).

    A class without a voxel has the weight one.
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp_min(1))
    return torch.where(present, weights, 1.0).float()


def cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of -log(probability of the class), natural logarithm, over the weights."""
    return _mean(functional.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none"), weights)


def focal(logits: Tensor, classes: Tensor, weights: Tensor, *, gamma: float) -> Tensor:
    """Return the mean of -(1 - p)^gamma log(p), p being the probability of the class; gamma 0 is cross-entropy.

    Lin et al. 2017, doi:10.1109/ICCV.2017.324, with a softmax for any number of classes.
    """
    minus_log = functional.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none")
    wrong = -torch.expm1(-minus_log)
    # the gradient of a power is infinite at zero for gamma below one
    return _mean(wrong.clamp_min(torch.finfo(logits.dtype).tiny) ** gamma * minus_log, weights)


def binary_cross_entropy(logits: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of the cross-entropies of all channels over the weights; all of the logits' shape."""
    each = functional.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
    return _mean(each, weights)


def of_classes(classes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return which voxels have each of ``n`` labels, and of which that is known, bool (batch, n, *core).

    Channel c tells of class c + 1, and of class 0 none does.
    """
    known = (classes != IGNORED).unsqueeze(1)
    return _one_hot(classes, n + 1)[:, 1:], known.expand(-1, n, *known.shape[2:])


def of_codes(codes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the same of overlapping labels; see ``Overlapping``."""
    bits = torch.arange(n, device=codes.device).reshape(1, n, *(1,) * (codes.ndim - 1))
    spread = codes.unsqueeze(1)
    return (spread >> bits & 1) > 0, (spread >= 0) & ((spread >> (MOST_LABELS + bits) & 1) == 0)


def distance(values: Tensor, target: Tensor, weights: Tensor, *, power: int) -> Tensor:
    """Return the mean of ``|value - target| ** power`` over channels and weights; both (batch, channels, *core)."""
    return _mean((values - target).abs().pow(power).mean(dim=1), weights)


def dice(logits: Tensor, classes: Tensor) -> Tensor:
    """Return one minus the mean over classes of ``2 sum(p g) / (sum(p^2) + sum(g^2))``, over the whole batch.

    Classes of which the batch has no voxel are left out: their overlap is zero, whatever is predicted.

    Milletari et al. 2016, doi:10.1109/3DV.2016.79, equation 3, for several classes.
    """
    counted = (classes != IGNORED).unsqueeze(1)
    return _dice(logits.softmax(dim=1) * counted, _one_hot(classes, logits.shape[1]) & counted)


def dice_of_labels(logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return the same of labels of which a voxel may have any number, over the voxels where each is known.

    A label that no voxel of the batch has is left out, as a class is.

    Parameters
    ----------
    truth, known : bool, of the shape of the logits
    """
    return _dice(logits.sigmoid() * known, truth & known)


def _dice(likely: Tensor, truth: Tensor) -> Tensor:
    """Return one minus the mean overlap of the channels that are in the truth; both zero where nobody knows."""
    truth, over = truth.to(likely.dtype), (0, *range(2, likely.ndim))
    both, likely_squared, n_true = total(
        torch.stack([(likely * truth).sum(over), likely.square().sum(over), truth.sum(over)])
    ).unbind()
    overlap = 2 * both / (likely_squared + n_true).clamp_min(1e-7)
    present = n_true > 0
    return ((1 - overlap) * present).sum() / present.sum().clamp_min(1)


def _known(classes: Tensor) -> Tensor:
    """Return the classes with any one where they are ignored."""
    return classes.clamp_min(0)


def _one_hot(classes: Tensor, n: int) -> Tensor:
    """Return whether each voxel is of each class, bool (batch, n, *core)."""
    numbers = torch.arange(n, device=classes.device).reshape(1, n, *(1,) * (classes.ndim - 1))
    return _known(classes).unsqueeze(1) == numbers


def _mean(each: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the weights, zero where there are none."""
    weighed, weight = total(torch.stack([(each * weights).sum(), weights.sum()])).unbind()
    return weighed / torch.where(weight > 0, weight, 1.0)
