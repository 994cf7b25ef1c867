"""Test-time augmentation: the mean of what a network says of a scan that is flipped and turned in several ways.

A network that sees a turned scan, and whose answer is turned back, is a network itself: that with every kernel turned
back. So the scan stays as it is, and tile rule, streaming and certificate are those of one network; several run side by
side on the same voxels, and their probabilities are averaged. So do the networks of an ensemble, each in every turn.

nnU-Net flips along every axis (doi:10.1038/s41592-020-01008-z); with quarter turns these are all symmetries of the
plane's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pipeline.config import Precision, Tta
from pipeline.errors import ArgumentError
from pipeline.unet.engine import Engine
from pipeline.unet.engines import make_engine
from pipeline.unet.foreign.network import ForeignNetwork, ForeignSettings
from pipeline.unet.network import UNet, channels_last
from pipeline.unet.readout import mean
from pipeline.unet.settings import UNetSettings


@dataclass(frozen=True, slots=True)
class Turn:
    """A symmetry of the grid: the last two axes exchanged, or not, then some axes flipped.

    Attributes
    ----------
    flipped : the last axes of a tensor that are spatial, each whether it is flipped
    """

    flipped: tuple[bool, ...]
    exchanged: bool = False

    def of(self, x: Tensor) -> Tensor:
        """Return a tensor, spatial axes last, turned."""
        return self._flipped(x.transpose(-1, -2) if self.exchanged else x)

    def back(self, x: Tensor) -> Tensor:
        """Return what ``of`` has turned as it was."""
        x = self._flipped(x)
        return x.transpose(-1, -2) if self.exchanged else x

    def _flipped(self, x: Tensor) -> Tensor:
        axes = [at - len(self.flipped) for at, each in enumerate(self.flipped) if each]
        return x.flip(axes) if axes else x


def turns_of(tta: Tta, dims: int) -> tuple[Turn, ...]:
    """Return the turns of a network of so many axes; the first one leaves all as it is."""
    if tta is Tta.NONE:
        return (Turn((False,) * dims),)
    exchanges = (False, True) if tta is Tta.ROTATIONS else (False,)
    return tuple(Turn(flipped, each) for each in exchanges for flipped in product((False, True), repeat=dims))


def check_turns(settings: UNetSettings | ForeignSettings, tta: Tta) -> None:
    """Refuse to exchange y and x where a network does not treat them alike.

    Raises
    ------
    ArgumentError : they differ in poolings, or in the tiles that they need.
    """
    along_y, along_x = (_along(settings, axis) for axis in (-2, -1))
    if tta is Tta.ROTATIONS and along_y != along_x:
        raise ArgumentError(
            f"rotations need a network that treats y and x alike, got {along_y} along y and {along_x} along x; use "
            "--tta flips"
        )


def _along(settings: UNetSettings | ForeignSettings, axis: int) -> tuple[int, ...]:
    """Return how a network treats an axis: its poolings, or its tile rule and its only tile."""
    if isinstance(settings, UNetSettings):
        return settings.factors(axis)
    rule, tile = settings.rule, settings.tile or (0, 0)
    return rule.stride[axis], rule.halo[axis], rule.trim[axis], tile[axis]


def engines_of(
    networks: Sequence[UNet], tta: Tta, *, device: str, precision: Precision = Precision.FLOAT32, first: int = 0
) -> tuple[Engine, ...]:
    """Return an engine for each turn of each network; see ``make_engine``."""
    return tuple(
        make_engine(turned(network, turn), device=device, precision=precision, first=first)
        for network in networks
        for turn in turns_of(tta, network.settings.dims)
    )


def turned(network: UNet, turn: Turn) -> UNet:
    """Return the network that says of a scan what this one says of the turned scan, turned back; in eval mode."""
    if turn == Turn((False,) * network.settings.dims):
        return network
    with torch.device("meta"):
        other = UNet(network.settings)
    kernel_axes = network.settings.dims + 2
    weights = {
        name: turn.back(each) if each.ndim == kernel_axes else each for name, each in network.state_dict().items()
    }
    other.load_state_dict(weights, assign=True)
    return other.eval().requires_grad_(False)


class Mean:
    """Several networks of the same settings as one, whose probabilities, or values, are the mean of theirs.

    Called with a tile (batch, channels, *spatial), it returns logits (batch, n_classes, *spatial).
    """

    training = False

    def __init__(
        self, networks: Sequence[Callable[[Tensor], Tensor]], settings: UNetSettings | ForeignSettings
    ) -> None:
        self.settings, self._networks = settings, tuple(networks)
        self.tf32 = any(isinstance(each, Engine) and each.tf32 for each in self._networks)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of a tile."""
        logits = mean((network(x) for network in self._networks), self.settings.head)
        assert logits is not None
        return logits


def mean_of(networks: Sequence[UNet | ForeignNetwork], tta: Tta) -> Mean:
    """Return the mean of networks as they are written over turned tiles: nothing is turned but what they see."""
    settings = networks[0].settings
    dims = settings.dims

    def seen(network: UNet | ForeignNetwork, turn: Turn) -> Callable[[Tensor], Tensor]:
        return lambda x: turn.back(network(turn.of(x).contiguous(memory_format=channels_last(dims))))

    return Mean([seen(network, turn) for network in networks for turn in turns_of(tta, dims)], settings)
