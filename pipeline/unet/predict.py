"""Predictor: a block's classes or values, tile by tile, as one pass over the whole scan would give them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ArgumentError, BudgetError
from pipeline.geometry.box import Box
from pipeline.geometry.tiles import TileRule
from pipeline.store.scaling import Windows, of_slices
from pipeline.unet.engine import Engine
from pipeline.unet.foreign.network import ForeignNetwork
from pipeline.unet.network import UNet, channels_last
from pipeline.unet.numbers import Pairs, batched, exactly, normalised
from pipeline.unet.readout import Readout
from pipeline.unet.transfer import staged
from pipeline.unet.turns import Mean

log = logging.getLogger("haloseg")


class Predictor:
    """Runs a network over blocks by overlapping tiles; neither tiles nor their order change the result.

        |hhhh|ccccccccccccccccc|hhhh|     a block as read: core, rounded up to the stride, and mirrored halo
        |hhhh|cccccc|hhhh|                tiles: each enters the network, its core leaves it
               |hhhh|cccccc|hhhh|

    Parameters
    ----------
    network : in eval mode, on ``device``; an engine runs the same network in its own way
    rule : along the network's axes
    windows : of each channel of the scan; the network sees ``(intensity - offset) * scale`` within limits, in float32
    tile_shape : what enters the network, voxels along its axes; see ``choose_tile``
    device : "cpu" or "cuda"
    n_slices : slices that enter at once where a 2-D network runs over a volume
    on_tile : called before each tile
    target_windows : of a linear head, as the model has them
    """

    def __init__(
        self, network: UNet | ForeignNetwork | Engine | Mean, rule: TileRule, *, windows: Windows,
        tile_shape: tuple[int, ...], device: str, n_slices: int = 1, on_tile: Callable[[], None] = lambda: None,
        target_windows: Pairs = (),
    ) -> None:
        settings = network.settings
        if len(windows) != settings.image_channels or not rule.ndim == len(tile_shape) == settings.dims:
            raise ArgumentError(
                f"a predictor needs {settings.image_channels} windows and {settings.dims} axes, got {len(windows)}, "
                f"{rule} and tile {tile_shape}; give the model's own"
            )
        training = isinstance(network, UNet | ForeignNetwork) and network.training
        if training or n_slices < 1:
            raise ArgumentError(
                f"a predictor needs a network in eval mode and at least one slice, got training={training} and "
                f"n_slices={n_slices}; call eval()"
            )
        self.network, self.rule, self.windows, self.device = network, rule, windows, torch.device(device)
        self._on_tile, self.readout = on_tile, Readout(settings.head, target_windows)
        self.core_shape, self.n_slices, self._neighbours = rule.core_shape(tile_shape), n_slices, settings.neighbours

    def segment(self, raw: NDArray[Any], core: Box) -> NDArray[np.uint8]:
        """Return the classes of a block, uint8 of ``core.shape``.

        Parameters
        ----------
        raw : shape (channels, *tile), any integers or floats: the block's core, rounded up to the stride, and its
            mirrored halo, neighbours of slices included, as ``read_mirrored`` gives it for ``Block.tile``
        core : of the block, clipped to the scan; one axis more than the network's where it runs slice by slice

        Raises
        ------
        BudgetError : the device has not the memory for the smallest tile.
        """
        classes = np.empty(core.shape, np.uint8)
        self._fill(raw, core, classes, None)
        return classes

    def segment_with_probabilities(
        self, raw: NDArray[Any], core: Box
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return the classes of a block as ``segment`` does, and float32 probabilities (n_classes, *core.shape)."""
        classes = np.empty(core.shape, np.uint8)
        probabilities = np.empty((self.network.settings.n_classes, *core.shape), np.float32)
        self._fill(raw, core, classes, probabilities)
        return classes, probabilities

    def values(self, raw: NDArray[Any], core: Box) -> NDArray[np.float32]:
        """Return what a linear head makes of a block, float32 (n_outputs, *core.shape), in the target's intensities."""
        values = np.empty((self.network.settings.n_classes, *core.shape), np.float32)
        self._fill(raw, core, None, values)
        return values

    def _fill(
        self, raw: NDArray[Any], core: Box, classes: NDArray[np.uint8] | None, reals: NDArray[np.float32] | None
    ) -> None:
        """Fill the outputs; what a pass that ran out of device memory has left is written again."""
        rule = self.rule.over_slices(self._neighbours) if core.ndim == self.rule.ndim + 1 else self.rule
        self._check(raw, rule=rule, core_shape=core.shape)
        while not self._pass(raw, rule, core, classes, reals):
            self._halve(slices=rule.ndim > self.rule.ndim)

    def _check(self, raw: NDArray[Any], *, rule: TileRule, core_shape: tuple[int, ...]) -> None:
        if len(core_shape) != rule.ndim or raw.shape != (len(self.windows), *rule.tile_shape(core_shape)):
            raise ArgumentError(
                f"a block of core {core_shape} needs voxels of shape {len(self.windows)} channels and its tile for "
                f"{rule}, got {raw.shape}; read Block.tile"
            )
        if raw.dtype.kind not in "buif":
            raise ArgumentError(f"intensities must be integers or floats, got {raw.dtype}; convert the scan")

    def _pass(
        self, raw: NDArray[Any], rule: TileRule, block: Box, classes: NDArray[np.uint8] | None,
        reals: NDArray[np.float32] | None,
    ) -> bool:
        """Fill the outputs once; returns False where the device ran out of memory."""
        largest = (self.n_slices, *self.core_shape) if rule.ndim > self.rule.ndim else self.core_shape
        try:
            with torch.inference_mode(), exactly(tf32=isinstance(self.network, Engine | Mean) and self.network.tf32):
                for core in rule.cores(block.shape, largest):
                    self._on_tile()
                    first, n = block.start[0], self._neighbours
                    windows = of_slices(self.windows, first + core.start[0] - n, first + core.stop[0] + n)
                    logits = self._tile(raw, core, rule, windows)
                    if classes is not None:
                        classes[core.slices] = _to_scan(self.readout.classes(logits)[:, None], core)[0]
                    if reals is not None:
                        reals[(slice(None), *core.slices)] = _to_scan(self.readout.reals(logits), core)
        except torch.OutOfMemoryError:
            return False
        return True

    def _tile(self, raw: NDArray[Any], core: Box, rule: TileRule, windows: Windows) -> Tensor:
        """Return the logits of one core within the block, shape (slices or 1, classes, *network's axes)."""
        tile = Box(core.start, tuple(a + n for a, n in zip(core.start, rule.tile_shape(core.shape), strict=True)))
        x = normalised(staged(raw[(slice(None), *tile.slices)], device=self.device), windows, device=self.device)
        x = batched(x, dims=self.rule.ndim, neighbours=self._neighbours)
        x = x.contiguous(memory_format=channels_last(self.rule.ndim))
        logits: Tensor = self.network(x)
        inner = zip(self.rule.trim, core.shape[-self.rule.ndim :], strict=True)
        for axis, (trim, n) in enumerate(inner, start=2):
            logits = logits.narrow(axis, trim, n)
        return logits

    def _halve(self, *, slices: bool) -> None:
        """Take fewer slices at once, or halve the core along its longest axis, for all that follows."""
        units = [c // s for c, s in zip(self.core_shape, self.rule.stride, strict=True)]
        if slices and self.n_slices > 1:
            self.n_slices //= 2
        elif max(units) > 1:
            longest = units.index(max(units))
            units[longest] //= 2
            self.core_shape = tuple(u * s for u, s in zip(units, self.rule.stride, strict=True))
        else:
            least = self.rule.tile_shape(self.core_shape)
            raise BudgetError(
                f"the device needs memory for the smallest tile {least}, got out of memory; free it or use --device cpu"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of device memory: tiles of core %s from now on, same result", self.core_shape)


def _to_scan(values: Tensor, core: Box) -> NDArray[Any]:
    """Return (slices or 1, channels, *network's axes) as (channels, *core) on the CPU."""
    moved: NDArray[Any] = values.transpose(0, 1).reshape(values.shape[1], *core.shape).cpu().numpy()
    return moved
