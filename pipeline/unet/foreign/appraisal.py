"""What a tile costs a network from elsewhere: its program is run on tensors without numbers, and counted."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ArgumentError
from pipeline.unet.foreign.network import ForeignNetwork, ForeignSettings

# of what is alive, what the heap and the convolutions' workspace take beside it; as for ours (memory.ALLOCATOR)
ALLOCATOR = 2.5
_WEIGHT_COPIES = 3  # from the file, and as kernels want them
_FLOAT = 4


def foreign_peak_bytes(settings: ForeignSettings, tile_shape: tuple[int, ...], *, n_slices: int = 1) -> int:
    """Return the bytes that one pass needs: weights, values that are alive at its worst moment, classes, workspace.

    Raises
    ------
    ArgumentError : the network does not accept such a tile.
    """
    together = n_slices if settings.together else 1
    weights, alive, leaving = _alive_bytes(settings, (together, *tile_shape))
    entering = _FLOAT * n_slices * settings.in_channels * prod(tile_shape)
    ending = entering + (n_slices // together) * leaving * 2 + 3 * _FLOAT * n_slices * prod(tile_shape)
    return weights + int(ALLOCATOR * max(alive + entering, ending))


@lru_cache(maxsize=4096)
def foreign_multiply_adds(settings: ForeignSettings, tile_shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a tile, halo included, as torch counts them.

    A network that takes one size only makes a pass for each core of a larger tile.
    """
    if settings.tile and tile_shape != settings.tile:
        core = settings.rule.core_shape(tile_shape)
        n_tiles = prod(n // s for n, s in zip(core, settings.rule.stride, strict=True))
        return n_tiles * foreign_multiply_adds(settings, settings.tile)
    with FlopCounterMode(display=False) as counter:
        _pass(settings, (1, *tile_shape))
    return int(counter.get_total_flops()) // 2


def foreign_bare_multiply_adds(settings: ForeignSettings, shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a scan of this shape without any halo; slices one by one."""
    slices, inner = prod(shape[: len(shape) - settings.dims]), shape[len(shape) - settings.dims :]
    if settings.tile:
        return slices * foreign_multiply_adds(settings, settings.tile) * prod(inner) // prod(settings.tile)
    rule = settings.rule
    losses = [halo - trim for halo, trim in zip(rule.halo, rule.trim, strict=True)]
    least = tuple(-(-n // s) * s + 2 * loss for n, s, loss in zip(inner, rule.stride, losses, strict=True))
    try:
        return slices * foreign_multiply_adds(settings, least)
    except ArgumentError:
        return slices * foreign_multiply_adds(settings, rule.tile_shape(inner))


@lru_cache(maxsize=4096)
def _alive_bytes(settings: ForeignSettings, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the bytes of weights, of what is alive at the worst moment beside the input, and of the output."""
    most = 0

    def on_step(values: dict[str, Any]) -> None:
        nonlocal most
        storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in _tensors(values)}
        most = max(most, sum(storages.values()))

    output = _pass(settings, shape, on_step)
    weights = sum(each.numel() * each.itemsize for each in _network(settings).buffers())
    return _WEIGHT_COPIES * weights, most, output.numel() * output.itemsize


def _tensors(values: dict[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]


def _pass(settings: ForeignSettings, shape: tuple[int, ...], on_step: Any = None) -> Tensor:  # noqa: ANN401 as run has it
    """Return the output of one pass, without numbers; ``shape`` is (tiles, *spatial)."""
    x = torch.empty((shape[0], settings.in_channels, *shape[1:]), device="meta")
    try:
        with torch.no_grad():
            return _network(settings).run(x, on_step)
    except Exception as error:  # operators refuse a size by whatever error they like
        cause = " ".join(str(error).split())[:200]
        raise ArgumentError(f"the network must accept tiles of {shape[1:]}, got {cause}; use another size") from error


@lru_cache(maxsize=4)
def _network(settings: ForeignSettings) -> ForeignNetwork:
    """Return the network without numbers."""
    weights = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, shape, dtype in settings.shapes
    }
    return ForeignNetwork(settings, weights)
