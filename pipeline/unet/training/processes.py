"""Processes: a training that several of them share on this machine, one per GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.errors import ArgumentError
from pipeline.unet.settings import UNetSettings
from pipeline.unet.training.checkpoint import CheckpointFile
from pipeline.unet.training.course import Step, Validation
from pipeline.unet.training.fit import Fitted, fit
from pipeline.unet.training.launch import launch
from pipeline.unet.training.loading import Loading
from pipeline.unet.training.patches import Patches
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.team import Team


def processes_for(device: str, *, asked: int | None, n_patches: int) -> int:
    """Return how many processes share a training: as many as asked for, else one per GPU, each with a patch at least.

    Raises
    ------
    ArgumentError : there are fewer GPUs, or a batch has fewer patches.
    """
    n_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if asked is None:
        return max(1, min(n_gpus, n_patches))
    if asked > n_patches:
        raise ArgumentError(
            f"each process needs a patch of every batch, got {asked} processes and batch {n_patches}; use --processes "
            f"{n_patches}, or a larger batch in the recipe"
        )
    if device == "cuda" and asked > n_gpus:
        raise ArgumentError(f"each process needs a GPU of its own, got {asked} and {n_gpus} GPUs; use {n_gpus}")
    return asked


def fit_together(
    settings: UNetSettings, patches: Patches, *, n: int, validation: Patches, recipe: Recipe, device: str, seed: int,
    minutes: float | None = None, checkpoint: CheckpointFile | None = None,
    on_progress: Callable[[Validation], None] = lambda _: None, on_step: Callable[[Step], None] = lambda _: None,
    loading: Loading | None = None,
) -> Fitted:
    """Return what ``fit`` returns, made by ``n`` processes: the same up to the rounding of sums, see ``team``.

    Each process takes its share of the very batch that one process would draw. Images in memory are there once per
    process, and twice where another one reads for it. What is said of repeated and of killed runs there holds for runs
    with as many processes.

    Raises
    ------
    RunError : a process died, or the loss is no longer finite; none is left.
    InputError : as of ``fit``.
    """

    def hear(word: Step | Validation) -> None:
        if isinstance(word, Step):
            on_step(word)
        else:
            on_progress(word)

    work = partial(
        _share, settings=settings, patches=patches, validation=validation, recipe=recipe, device=device, seed=seed,
        minutes=minutes, checkpoint=checkpoint, loading=loading,
    )
    return launch(work, n, device=device, on_word=hear)


def _share(
    *, team: Team, say: Callable[[object], None], settings: UNetSettings, patches: Patches, validation: Patches,
    recipe: Recipe, device: str, seed: int, minutes: float | None, checkpoint: CheckpointFile | None,
    loading: Loading | None,
) -> Fitted:
    """Do the part of one process."""
    return fit(
        settings, patches, validation=validation, recipe=recipe, device=device, seed=seed, minutes=minutes,
        checkpoint=checkpoint, on_progress=say, on_step=say, team=team, loading=loading,
    )
