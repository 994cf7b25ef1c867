"""Validation: how well a network does on what is held out, as inference would: by overlapping tiles, whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.geometry.tiles import TileRule
from pipeline.unet.course import Validation
from pipeline.unet.losses import Objective
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.patches import IGNORED, Patches
from pipeline.unet.settings import closed_form_rule
from pipeline.unet.warp import batch_of

MOST_VOXELS = 2**21  # five slices of 512 x 512: a tenth of the time of the 50 steps between two validations
_LARGEST_CORE = {2: 512, 3: 96}


def validate(
    network: UNet, patches: Patches, *, objective: Objective, device: str, step: int, train_loss: float
) -> Validation:
    """Return loss and Dice over the regions of the patches; the network stays in eval mode.

    Raises
    ------
    ArgumentError : no voxel of the regions is labelled.
    """
    network.eval()
    n, head = network.settings.n_labels, network.settings.head
    total, n_voxels = 0.0, 0
    both, either = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    with torch.inference_mode():
        for logits, classes, borders in _tiles(network, patches, device=device):
            y = classes.cpu()
            counted = y != IGNORED
            if not bool(counted.any()):
                continue
            total += float(objective(logits, classes, borders)) * int(counted.sum())
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
    return Validation(step, train_loss, total / n_voxels, dice)


def cores(region: Box, rule: TileRule, *, largest: tuple[int, ...]) -> list[Box]:
    """Return boxes of whole strides that cover a region, each at most ``largest``.

    They begin at multiples of the stride from the scan's origin, as tiles do, so that a network sees in each what it
    sees in the whole scan.
    """
    start = tuple(a // s * s for a, s in zip(region.start, rule.stride, strict=True))
    shape = tuple(b - a for a, b in zip(start, region.stop, strict=True))
    return [core.round_up(rule.stride).shift(start) for core in rule.cores(shape, largest)]


def _tiles(network: UNet, patches: Patches, *, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield logits, classes and weights of the cores, of all of them or of as many as time allows, evenly spread."""
    rule = closed_form_rule(network.settings)
    over = rule.over_slices() if len(patches.core) > rule.ndim else rule
    largest = (*(1,) * (over.ndim - rule.ndim), *(_LARGEST_CORE[rule.ndim],) * rule.ndim)
    places = [
        (source, core) for source in patches.sources for core in cores(source.seen, over, largest=largest)
    ]  # fmt: skip
    share = MOST_VOXELS / sum(core.n_voxels for _, core in places)
    n_kept = max(1, min(len(places), round(share * len(places))))
    for at in np.unique(np.linspace(0, len(places) - 1, n_kept).round().astype(int)):
        source, core = places[at]
        seen = replace(patches, core=core.shape, halo=over.halo)
        batch = batch_of([seen.at(source, core)], device=device)
        logits = network(batch.images)
        for axis, (trim, n) in enumerate(zip(rule.trim, core.shape[-rule.ndim :], strict=True), start=2):
            logits = logits.narrow(axis, trim, n)
        yield logits, batch.classes, batch.borders
