"""Validation: how well a network does on what is held out, as inference would: by overlapping tiles, whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.geometry.tiles import TileRule
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.readout import mean
from pipeline.unet.settings import Head, closed_form_rule
from pipeline.unet.training.course import Validation
from pipeline.unet.training.losses import Objective, of_codes
from pipeline.unet.training.overlapping import first_of
from pipeline.unet.training.patches import IGNORED, Patches
from pipeline.unet.training.source import Source
from pipeline.unet.training.warp import Batch, batch_of

MOST_VOXELS = 2**21  # five slices of 512 x 512: a tenth of the time of the 50 steps between two validations
_LARGEST_CORE = {2: 512, 3: 96}


def validate(
    network: UNet, patches: Patches, *, objective: Objective, device: str, step: int, train_loss: float
) -> Validation:
    """Return loss and Dice, or PSNR, over the regions of the patches; the network stays in eval mode.

    Raises
    ------
    ArgumentError : no voxel of the regions is labelled.
    """
    network.eval()
    tally = _tally(network, patches)
    total, n_voxels = 0.0, 0
    with torch.inference_mode():
        for source, logits, batch in _tiles(network, patches, device=device):
            counted = (batch.classes != IGNORED).cpu()
            if not bool(counted.any()):
                continue
            total += float(objective(logits, batch.classes, batch.borders, batch.target)) * int(counted.sum())
            n_voxels += int(counted.sum())
            tally.add(source, logits, batch, counted)
    if not n_voxels:
        raise ArgumentError(
            "the part that is held out must have labelled voxels, got none in it; label some of it, or set another "
            "validation_fraction"
        )
    return Validation(step, train_loss, total / n_voxels, **tally.figures())


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What a network makes of a part of what is held out.

    Attributes
    ----------
    image : float32, the first channel of what entered the network, of neighbouring slices the middle one's, (*tile)
    truth, found : classes, int64 (*core), IGNORED where they do not count; of overlapping labels the first that a voxel
        has, and the likeliest; of targets the first channel, float32
    """

    image: NDArray[np.float32]
    truth: NDArray[Any]
    found: NDArray[Any]


def sample(networks: Sequence[UNet], patches: Patches, *, device: str) -> Sample:
    """Return the middle one of the cores that the regions of the patches are cut into, and the mean of what they say.

    Parameters
    ----------
    networks : in eval mode, of the same settings
    """
    network, places = networks[0], _places(networks[0], patches)
    with torch.inference_mode():
        every = [_passed(each, patches, *places[len(places) // 2], device=device) for each in networks]
        logits, batch = mean((each for each, _ in every), network.settings.head), every[0][1]
    assert logits is not None
    image = batch.images[0, network.settings.neighbours].cpu().numpy()
    if batch.target is not None:
        return Sample(image, batch.target[0, 0].cpu().numpy(), logits[0, 0].cpu().numpy())
    truth, found = batch.classes[0].cpu().numpy(), classes_of(logits, network.settings.head)[0].cpu().numpy()
    return Sample(image, first_of(truth) if patches.n_overlapping else truth, found)


class _Tally(Protocol):
    """Adds up what is told besides the loss."""

    def add(self, source: Source, logits: Tensor, batch: Batch, counted: Tensor) -> None:
        """Take one core; ``counted`` are the voxels whose truth is known, on the CPU."""
        ...

    def figures(self) -> dict[str, Any]:
        """Return them by their names in ``Validation``."""
        ...


class _Overlaps:
    """Dice of each class."""

    def __init__(self, network: UNet) -> None:
        self._head, self._n = network.settings.head, network.settings.n_labels
        self._both, self._either = torch.zeros((2, self._n), dtype=torch.int64)

    def add(self, source: Source, logits: Tensor, batch: Batch, counted: Tensor) -> None:
        """Take one core."""
        del source
        got, want = classes_of(logits, self._head).cpu()[counted].long(), batch.classes.cpu()[counted]
        self._both += torch.bincount(want[got == want], minlength=self._n)
        self._either += torch.bincount(got, minlength=self._n) + torch.bincount(want, minlength=self._n)

    def figures(self) -> dict[str, Any]:
        """Return 2 (both) / (either) of each class; None where there is none of it."""
        return {"dice": _dice(self._both, self._either)}


class _EachLabel:
    """Dice of voxels without a label, and of each of the labels, which may overlap; where they are known."""

    def __init__(self, n_labels: int) -> None:
        self._n = n_labels
        self._both, self._either = torch.zeros((2, n_labels + 1), dtype=torch.int64)

    def add(self, source: Source, logits: Tensor, batch: Batch, counted: Tensor) -> None:
        """Take one core."""
        del source, counted
        want, known = (each.cpu() for each in of_codes(batch.classes, self._n))
        got = logits.cpu() > 0
        every = known.all(dim=1, keepdim=True)
        got, want, known = (
            torch.cat([first, each], dim=1)
            for first, each in ((~got.any(1, keepdim=True), got), (~want.any(1, keepdim=True), want), (every, known))
        )
        over = (0, *range(2, got.ndim))
        self._both += (got & want & known).sum(over)
        self._either += (got & known).sum(over) + (want & known).sum(over)

    def figures(self) -> dict[str, Any]:
        """Return 2 (both) / (either) of each; None where there is none of it."""
        return {"dice": _dice(self._both, self._either)}


class _Errors:
    """Mean squared error in proportion to the span of the target's intensities."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, source: Source, logits: Tensor, batch: Batch, counted: Tensor) -> None:
        """Take one core."""
        assert source.target is not None
        assert batch.target is not None
        spans = torch.tensor(source.target.scaled_spans).reshape(1, -1, *(1,) * (logits.ndim - 2))
        squares = ((logits - batch.target).cpu() / spans).double().square() * counted[:, None]
        self._sum += float(squares.sum())
        self._n += int(counted.sum()) * logits.shape[1]

    def figures(self) -> dict[str, Any]:
        """Return the ratio in dB; None where nothing differs."""
        return {"dice": (), "psnr": -10 * math.log10(self._sum / self._n) if self._sum else None}


def _dice(both: Tensor, either: Tensor) -> tuple[float | None, ...]:
    return tuple(2 * b / e if e else None for b, e in zip(both.tolist(), either.tolist(), strict=True))


def _tally(network: UNet, patches: Patches) -> _Tally:
    """Return what adds up the figures of a network."""
    if network.settings.head is Head.LINEAR:
        return _Errors()
    return _EachLabel(patches.n_overlapping) if patches.n_overlapping else _Overlaps(network)


def cores(region: Box, rule: TileRule, *, largest: tuple[int, ...]) -> list[Box]:
    """Return boxes of whole strides that cover a region, each at most ``largest``.

    They begin at multiples of the stride from the scan's origin, as tiles do, so that a network sees in each what it
    sees in the whole scan.
    """
    start = tuple(a // s * s for a, s in zip(region.start, rule.stride, strict=True))
    shape = tuple(b - a for a, b in zip(start, region.stop, strict=True))
    return [core.round_up(rule.stride).shift(start) for core in rule.cores(shape, largest)]


def _rules(network: UNet, patches: Patches) -> tuple[TileRule, TileRule]:
    """Return the network's tile rule, and the one over the axes of the images."""
    rule = closed_form_rule(network.settings)
    return rule, rule.over_slices(network.settings.neighbours) if len(patches.core) > rule.ndim else rule


def _places(network: UNet, patches: Patches) -> list[tuple[Source, Box]]:
    """Return all cores, of one source after the other."""
    rule, over = _rules(network, patches)
    largest = (*(1,) * (over.ndim - rule.ndim), *(_LARGEST_CORE[rule.ndim],) * rule.ndim)
    return [(source, core) for source in patches.sources for core in cores(source.seen, over, largest=largest)]


def _tiles(network: UNet, patches: Patches, *, device: str) -> Iterator[tuple[Source, Tensor, Batch]]:
    """Yield logits and truth of the cores, of all of them or of as many as time allows, evenly spread."""
    places = _places(network, patches)
    share = MOST_VOXELS / sum(core.n_voxels for _, core in places)
    n_kept = max(1, min(len(places), round(share * len(places))))
    for at in np.unique(np.linspace(0, len(places) - 1, n_kept).round().astype(int)):
        yield places[at][0], *_passed(network, patches, *places[at], device=device)


def _passed(network: UNet, patches: Patches, source: Source, core: Box, *, device: str) -> tuple[Tensor, Batch]:
    """Return the logits of a core, and the batch of it alone."""
    rule, over = _rules(network, patches)
    seen = replace(patches, core=core.shape, halo=over.halo)
    batch = batch_of([seen.at(source, core)], device=device)
    logits: Tensor = network(batch.images)
    for axis, (trim, n) in enumerate(zip(rule.trim, core.shape[-rule.ndim :], strict=True), start=2):
        logits = logits.narrow(axis, trim, n)
    return logits, batch
