"""Fit: a network learns from patches; one loop, read from top to bottom."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ArgumentError, BudgetError, ModelError, RunError
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.settings import UNetSettings
from pipeline.unet.training.batches import network_seed
from pipeline.unet.training.checkpoint import Checkpoint, CheckpointFile
from pipeline.unet.training.course import Step, Validation, best_of, is_best, is_over, rate
from pipeline.unet.training.learner import Learner
from pipeline.unet.training.loading import Loading, loaded, loading_for
from pipeline.unet.training.losses import Objective, balanced
from pipeline.unet.training.patches import Patches
from pipeline.unet.training.reader import Task
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.team import ALONE, Team
from pipeline.unet.training.validation import validate
from pipeline.unet.training.warp import unpacked
from pipeline.unet.transfer import Leaving


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The weights of lowest validation loss, where they came from, and the whole course.

    Attributes
    ----------
    n_before : steps of ``n_steps`` that were taken before this run went on from a checkpoint
    """

    weights: dict[str, Tensor]
    best: Validation
    curve: tuple[Validation, ...]
    n_steps: int
    n_before: int = 0


class _Losses:
    """The losses of the steps. A GPU's is read while it works on the step after, so that neither waits for the other.

    Parameters
    ----------
    on_step : told of each step
    """

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self._on_step, self._read = on_step, list[float]()
        self._coming = deque[tuple[Leaving, Step]]()

    def put(self, loss: Tensor, step: Step) -> None:
        """Take the loss of a step, whose own is not known yet."""
        self._coming.append((Leaving.of(loss), step))
        self._take(but=int(loss.is_cuda))

    def mean(self) -> float:
        """Return the mean loss of the steps since this was last asked."""
        self._take(but=0)
        mean = float(np.mean(self._read))
        self._read.clear()
        return mean

    def _take(self, *, but: int) -> None:
        """Read and tell all losses but the last ones."""
        while len(self._coming) > but:
            loss, step = self._coming.popleft()
            self._read.append(_finite(float(loss.arrived()), step.step))
            self._on_step(replace(step, loss=self._read[-1]))


def fit(
    settings: UNetSettings, patches: Patches, *, validation: Patches, recipe: Recipe, device: str, seed: int,
    minutes: float | None = None, checkpoint: CheckpointFile | None = None,
    on_progress: Callable[[Validation], None] = lambda _: None, on_step: Callable[[Step], None] = lambda _: None,
    team: Team = ALONE, loading: Loading | None = None,
) -> Fitted:
    """Return a network that has learnt from the patches; the same for the same seed, machine and number of steps.

    Parameters
    ----------
    minutes : stop after so long, if the recipe's steps take longer; the learning rate then follows the clock, which
        goes on from what a checkpoint says, and no two runs are the same bit by bit
    checkpoint : written at each validation; where it is there, the training goes on from it and, without ``minutes``,
        ends in the very weights of one that was never stopped
    on_progress : told of each validation, after a restart first of all those before it
    on_step : told of each step that is taken
    team : the processes that take every step together, all of which must call this; the first one validates, writes,
        and tells of both
    loading : who reads the patches; None: as ``loading_for`` says

    Raises
    ------
    RunError : the loss is no longer finite, a patch cannot be read, or the process that reads them died.
    ArgumentError : no voxel is labelled where the network is to learn, or where it is held out; or the checkpoint is
        of a run with other settings.
    ModelError : the checkpoint is damaged.
    BudgetError : a batch does not fit the device.
    """
    keep_freed_memory()  # a step takes and frees the same again: 1.1 times as fast on the CPU
    begin, losses, n = perf_counter(), _Losses(on_step), recipe.batch_size(patches.n_axes)
    before = team.first(lambda: checkpoint.load() if checkpoint else None) or Checkpoint(0.0, (), {}, {})

    def elapsed_s() -> float:
        return before.elapsed_s + perf_counter() - begin

    over = bool(before.curve) and (is_over(before.curve, recipe) or _spent(before.elapsed_s, minutes) >= 1)
    first, last = before.curve[-1].step + 1 if before.curve else 1, 0 if over else recipe.steps
    task = Task(patches, n, seed, first, last, team.share(n))
    with _same_each_time(seed), _memory(recipe), loaded(task, loading=loading or loading_for(device)) as steps:
        objective = _objective(patches, recipe, device)
        learner = Learner.new(settings, objective=objective, recipe=recipe, device=device, team=team)
        curve, best = _taken_up(before, learner, told=on_progress), before.best
        mark = perf_counter()
        for step, packed in steps:
            spent = team.first(lambda: _spent(elapsed_s(), minutes)) if minutes else 0.0
            now_rate = rate(recipe, max((step - 1) / recipe.steps, spent), step=step, curve=curve)
            torch.manual_seed(network_seed(seed, step))
            loss = learner.learn(unpacked(packed, device=device), step=step, rate=now_rate)
            took, mark = perf_counter() - mark, perf_counter()
            losses.put(loss, Step(step, math.nan, now_rate, n / took))
            if step % recipe.validate_every and step < recipe.steps and spent < 1:
                continue

            now = team.first(partial(
                validate, learner.kept, validation, objective=objective, device=device, step=step,
                train_loss=losses.mean(),
            ))
            _finite(now.loss, step)
            curve.append(now)
            best = learner.weights() if is_best(curve) else best
            if checkpoint and team.leads:
                checkpoint.save(Checkpoint(elapsed_s(), tuple(curve), learner.state(), best))
            on_progress(now)
            mark = perf_counter()
            if spent >= 1 or is_over(curve, recipe):
                break
    return Fitted(best, best_of(curve), tuple(curve), curve[-1].step, first - 1)


def _taken_up(before: Checkpoint, learner: Learner, *, told: Callable[[Validation], None]) -> list[Validation]:
    """Return the validations of a checkpoint, with the learner in its state; none where there is no checkpoint."""
    if before.curve:
        try:
            learner.restore(before.state)
        except (RuntimeError, ValueError, KeyError) as error:
            cause = " ".join(str(error).split())
            raise ModelError(
                f"a checkpoint must be of this network and optimiser, got one that does not fit ({cause}); delete it "
                "to begin anew"
            ) from error
    for each in before.curve:
        told(each)
    return list(before.curve)


def _spent(elapsed_s: float, minutes: float | None) -> float:
    """Return which part of the time is over."""
    return elapsed_s / (60 * minutes) if minutes else 0.0


def _objective(patches: Patches, recipe: Recipe, device: str) -> Objective:
    """Return the loss, with weights by the frequency of classes where they are asked for."""
    weights = balanced(torch.from_numpy(patches.class_counts())).to(device) if recipe.balance_classes else None
    return Objective(recipe.loss, weights, recipe.focal_gamma, patches.n_overlapping)


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
    if seed < 0:
        raise ArgumentError(f"seed must be at least 0, got {seed}; use 0")
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
