"""Fit: a network learns from patches; one loop, read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ArgumentError, BudgetError, RunError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.losses import Objective, balanced
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.patches import IGNORED, Patch, Patches
from pipeline.unet.recipe import Optimiser, Recipe, Schedule
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule
from pipeline.unet.warp import batch_of

N_VALIDATION_PATCHES = 64


@dataclass(frozen=True, slots=True)
class Validation:
    """How well a network does at a step of its training.

    Attributes
    ----------
    train_loss : mean of the recipe's loss over the steps since the validation before; cross-entropy in nats
    loss : the same over the validation patches, by their labelled voxels, nothing changed in them
    dice : of each class over all validation patches together; None where neither labels nor network have it
    """

    step: int
    train_loss: float
    loss: float
    dice: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The weights of lowest validation loss, where they came from, and the whole course."""

    weights: dict[str, Tensor]
    best: Validation
    curve: tuple[Validation, ...]
    n_steps: int


def training_rule(settings: UNetSettings) -> TileRule:
    """Return the rule of patches: valid networks need their halo, the others learn from whole patches without one."""
    rule = closed_form_rule(settings)
    if settings.padding is Padding.VALID:
        return rule
    return TileRule(rule.stride, (0,) * rule.ndim, (0,) * rule.ndim)


def fit(
    settings: UNetSettings, patches: Patches, *, validation: Patches, recipe: Recipe, device: str, seed: int,
    minutes: float | None = None, on_progress: Callable[[Validation], None] = lambda _: None,
) -> Fitted:
    """Return a network that has learnt from the patches; the same for the same seed, machine and number of steps.

    Parameters
    ----------
    minutes : stop after so long, if the recipe's steps take longer; the learning rate then follows the clock

    Raises
    ------
    RunError : the loss is no longer finite.
    ArgumentError : no voxel is labelled where the network is to learn, or where it is held out.
    BudgetError : a batch does not fit the device.
    """
    begin, curve, losses, weights = perf_counter(), list[Validation](), list[float](), dict[str, Tensor]()
    with _same_each_time(seed), _memory(recipe):
        network = UNet(settings).to(device)
        optimizer, objective = _optimizer(network, recipe), _objective(patches, recipe)
        for step, drawn in enumerate(_batches(patches, recipe, seed=seed), start=1):
            spent = (perf_counter() - begin) / (60 * minutes) if minutes else 0.0
            optimizer.param_groups[0]["lr"] = _rate(recipe, max((step - 1) / recipe.steps, spent), step=step)
            network.train()
            optimizer.zero_grad(set_to_none=True)
            batch = batch_of(drawn, device=device)
            loss = objective(_core(network(batch.images), settings), batch.classes, batch.borders)
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
            optimizer.step()
            losses.append(_finite(loss.item(), step))

            over = step == recipe.steps or spent >= 1
            if over or step % recipe.validate_every == 0:
                now = validate(
                    network, validation, objective=objective, device=device, step=step,
                    train_loss=float(np.mean(losses)),
                )
                losses.clear()
                if now.loss < min((each.loss for each in curve), default=math.inf):
                    weights = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
                curve.append(now)
                on_progress(now)
            if over:
                break
    return Fitted(weights, min(curve, key=lambda each: each.loss), tuple(curve), step)


def _optimizer(network: UNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Return what takes the steps."""
    weights, rate, decay = network.parameters(), recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser is Optimiser.SGD:
        return torch.optim.SGD(weights, lr=rate, momentum=recipe.momentum, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay)


def _objective(patches: Patches, recipe: Recipe) -> Objective:
    """Return the loss, with weights by the frequency of classes where they are asked for."""
    weights = balanced(torch.from_numpy(patches.class_counts())) if recipe.balance_classes else None
    return Objective(recipe.loss, weights, recipe.focal_gamma)


def _batches(patches: Patches, recipe: Recipe, *, seed: int) -> Iterator[list[Patch]]:
    """Yield batches without end; the next one is read while the last one is learnt from."""
    rng, n = np.random.default_rng(seed), recipe.batch_size(patches.n_axes)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(patches.batch, n, rng)
        while True:
            drawn = coming.result()
            coming = reader.submit(patches.batch, n, rng)
            yield drawn


def validate(
    network: UNet, patches: Patches, *, objective: Objective, device: str, step: int, train_loss: float
) -> Validation:
    """Return loss and Dice over the fixed patches; the network stays in eval mode."""
    network.eval()
    n, head = network.settings.n_labels, network.settings.head
    total, n_voxels = 0.0, 0
    both, either = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    with torch.inference_mode():
        for source, core in patches.fixed(N_VALIDATION_PATCHES):
            batch = batch_of([patches.at(source, core)], device=device)
            logits, y = _core(network(batch.images), network.settings), batch.classes.cpu()
            counted = y != IGNORED
            total += float(objective(logits, batch.classes, batch.borders)) * int(counted.sum())
            n_voxels += int(counted.sum())
            got, want = classes_of(logits, head).cpu()[counted].long(), y[counted]
            both += torch.bincount(want[got == want], minlength=n)
            either += torch.bincount(got, minlength=n) + torch.bincount(want, minlength=n)
    if not n_voxels:
        raise ArgumentError(
            "the part that is held out must have labelled voxels, got none in it; label some of it, or set another "
            "validation_fraction"
        )
    dice = tuple(2 * b / e if e else None for b, e in zip(both.tolist(), either.tolist(), strict=True))
    return Validation(step, train_loss, _finite(total / n_voxels, step), dice)


def _core(logits: Tensor, settings: UNetSettings) -> Tensor:
    """Return the logits of the core."""
    for axis, trim in enumerate(training_rule(settings).trim, start=2):
        logits = logits.narrow(axis, trim, logits.shape[axis] - 2 * trim)
    return logits


def _rate(recipe: Recipe, done: float, *, step: int) -> float:
    """Return the learning rate of a step, the first being one, when this part of the training is done."""
    left = max(0.0, 1 - done)
    falls = {
        Schedule.CONSTANT: 1.0, Schedule.COSINE: 0.5 * (1 - math.cos(math.pi * left)),
        Schedule.POLY: math.pow(left, 0.9),
    }  # fmt: skip
    rises = min(1.0, step / (recipe.warm_up_steps + 1))
    return recipe.learning_rate * falls[recipe.schedule] * rises


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise RunError(
            f"the loss must stay finite, got {loss} at step {step}; lower learning_rate in the recipe, "
            "or set clip_norm = 1"
        )
    return loss


@contextmanager
def _same_each_time(seed: int) -> Iterator[None]:
    """Draw the same numbers for the same seed and leave the caller's random state alone.

    On a GPU the gradient of 3-D max pooling is summed in any order (torch 2.13): there, results differ in rounding.
    """
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        torch.manual_seed(seed)
        yield


@contextmanager
def _memory(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"a batch must fit the device, got out of memory with batch {recipe.batch} and patch {recipe.patch} (0 is "
            "the default); set smaller ones in the recipe"
        ) from error
