"""Course: what the validations of a training so far say about how it goes on. Nothing but them is remembered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.unet.training.recipe import Recipe, Schedule

_FACTOR = 0.5


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was taken, the first being one.

    Attributes
    ----------
    loss : the recipe's loss before it
    rate : learning rate
    patches_per_s : of all processes together, from the end of the step before, without a validation between them
    """

    step: int
    loss: float
    rate: float
    patches_per_s: float


@dataclass(frozen=True, slots=True)
class Validation:
    """How well a network does at a step of its training.

    Attributes
    ----------
    train_loss : mean of the recipe's loss over the steps since the validation before; cross-entropy in nats
    loss : the same over the validation patches, by their labelled voxels, nothing changed in them
    dice : of each class over all validation patches together; None where neither labels nor network have it
    psnr : of values, peak signal-to-noise ratio in dB over all validation patches together, the peak being the span of
        the target's intensities; None where classes are learnt, or nothing differs
    """

    step: int
    train_loss: float
    loss: float
    dice: tuple[float | None, ...]
    psnr: float | None = None

    @property
    def told(self) -> str:
        """Its figures for people: Dice of each class, or how far values are from the target."""
        if self.dice:
            return "Dice " + ", ".join("-" if each is None else f"{each:.3f}" for each in self.dice)
        return "PSNR -" if self.psnr is None else f"PSNR {self.psnr:.2f} dB"


def best_of(curve: Sequence[Validation]) -> Validation:
    """Return the validation of lowest loss; of equal ones the first."""
    return min(curve, key=lambda each: each.loss)


def is_best(curve: Sequence[Validation]) -> bool:
    """Whether the last validation has a lower loss than all before it."""
    return bool(curve) and best_of(curve) is curve[-1]


def stalled(curve: Sequence[Validation]) -> int:
    """Return how many validations have passed since the best one."""
    return len(curve) - 1 - curve.index(best_of(curve)) if curve else 0


def is_over(curve: Sequence[Validation], recipe: Recipe) -> bool:
    """Whether the patience of the recipe has come to an end."""
    return 0 < recipe.patience <= stalled(curve)


def n_cuts(curve: Sequence[Validation], *, patience: int) -> int:
    """Return how often ``patience`` validations without progress have passed, counted anew after each cut."""
    lowest, waited, cuts = math.inf, 0, 0
    for each in curve:
        waited = 0 if each.loss < lowest else waited + 1
        lowest = min(lowest, each.loss)
        if waited == patience:
            waited, cuts = 0, cuts + 1
    return cuts


def rate(recipe: Recipe, done: float, *, step: int, curve: Sequence[Validation] = ()) -> float:
    """Return the learning rate of a step, the first being one, when this part of the training is done."""
    left = max(0.0, 1 - done)
    match recipe.schedule:
        case Schedule.CONSTANT:
            falls = 1.0
        case Schedule.COSINE:
            falls = 0.5 * (1 - math.cos(math.pi * left))
        case Schedule.POLY:
            falls = math.pow(left, 0.9)
        case Schedule.PLATEAU:
            falls = _FACTOR ** n_cuts(curve, patience=recipe.plateau_patience)
    rises = min(1.0, step / (recipe.warm_up_steps + 1))
    return recipe.learning_rate * falls * rises
