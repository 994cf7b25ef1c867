"""How much memory a tile takes, known before it is run, and the tile that a budget allows.

The network is run on torch's meta device, which has shapes but no numbers, while every storage that comes to life or
dies is counted. That follows the code that really runs: skips that wait for their level, crops that keep the whole
alive, concatenations, and the copies that a convolution makes of its input and output. On top come the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import BudgetError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.model import Model
from pipeline.unet.network import UNet, classes_of
from pipeline.unet.settings import UNetSettings

# What the allocator keeps beside the live bytes: on a CPU the measured peaks of 15 networks, 2-D and 3-D, valid and
# same, of 2 to 64 channels, were 0.7 to 1.35 of the live bytes; test_unet_memory.py measures some of them again.
ALLOCATOR = 1.4
# oneDNN convolves copies of input and output whose channels are rounded up to the width of its vectors.
CHANNEL_BLOCK = 16


def peak_bytes(settings: UNetSettings, tile_shape: tuple[int, ...], *, n_slices: int = 1) -> int:
    """Return the bytes that one forward pass needs: weights, activations, classes, and the convolutions' workspace.

    Parameters
    ----------
    tile_shape : voxels that enter the network along each of its axes, halo included
    n_slices : tiles that enter at once

    Raises
    ------
    ArgumentError : the network does not accept such a tile.
    """
    weights, activations = _traced(settings, tile_shape, n_slices)
    return weights + int(ALLOCATOR * activations)


def choose_tile(model: Model, *, budget_bytes: int, largest_core: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tile shape, halo included, that enters the fewest voxels per block and fits the budget.

    Parameters
    ----------
    largest_core : the block's core along the network's axes; no tile has a larger one, rounded up to the stride

    Raises
    ------
    BudgetError : not even the smallest tile fits.
    """
    rule = model.rule
    for core in _by_halo_overhead(rule, largest_core):
        tile = rule.tile_shape(core)
        if _least_bytes(model.settings, tile) <= budget_bytes and peak_bytes(model.settings, tile) <= budget_bytes:
            return tile
    least = rule.tile_shape(rule.stride)
    raise BudgetError(
        f"the smallest tile {least} needs {peak_bytes(model.settings, least):,} bytes, got a budget of "
        f"{max(0, budget_bytes):,}; raise --budget"
    )


def _by_halo_overhead(rule: TileRule, largest_core: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield balanced cores, those first with which the fewest voxels enter the network for one block."""
    axes = []
    for size, stride in zip(largest_core, rule.stride, strict=True):
        units = -(-size // stride)
        steps = {-(-units // n) for n in range(1, units + 1)}
        axes.append([(step * stride, -(-units // step)) for step in steps])

    def entering(choice: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        tile = rule.tile_shape(tuple(core for core, _ in choice))
        return prod(tile) * prod(n for _, n in choice), prod(tile)

    yield from (tuple(core for core, _ in choice) for choice in sorted(product(*axes), key=entering))


def _least_bytes(settings: UNetSettings, tile_shape: tuple[int, ...]) -> int:
    """Return what the tile and the first convolution's output take: a bound from below that needs no trace."""
    inner = prod(max(1, n - settings.kernel + 1) for n in tile_shape)
    return 4 * (settings.in_channels * prod(tile_shape) + settings.width * inner)


@lru_cache(maxsize=1024)
def _traced(settings: UNetSettings, tile_shape: tuple[int, ...], n_slices: int) -> tuple[int, int]:
    """Return bytes of weights, and bytes of activations alive at the worst moment."""
    with torch.device("meta"):
        network = UNet(settings).eval()
    tensors = [*network.parameters(), *network.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    counter = _LiveBytes(tensors)
    with torch.no_grad(), counter:
        x = torch.empty((n_slices, settings.in_channels, *tile_shape), device="meta")
        logits = network(x)
        classes_of(logits, settings.head)
        network.probabilities(logits)
    return weights, counter.peak


def _blocked_bytes(x: Tensor) -> int:
    """Return the bytes of a copy of (batch, channels, *spatial) with its channels in blocks."""
    n_blocks = -(-x.shape[1] // CHANNEL_BLOCK) if x.shape[1] > 1 else 0
    return x.element_size() * x.shape[0] * n_blocks * CHANNEL_BLOCK * prod(x.shape[2:])


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages alive, except those of the given tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 torch's own signature
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            workspace = _blocked_bytes(args[0]) + _blocked_bytes(out)
            self.peak = max(self.peak, self.live + workspace + out.untyped_storage().nbytes())
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:  # noqa: ANN401
        if storage in self._seen:
            return
        self._seen.add(storage)
        n = storage.nbytes()
        self.live += n
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, n)

    def _release(self, n: int) -> None:
        self.live -= n
