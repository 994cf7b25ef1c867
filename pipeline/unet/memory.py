"""How much memory a tile takes, known before it is run, and the tile that a budget allows.

The layers of one pass are gone through in order, and their tensors put on a heap: the network's input, what each layer
makes, on its way, too, and the classes. Each lies there until the last layer that takes it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

from pipeline.config import ONE_PASS, Passes, Tta
from pipeline.errors import BudgetError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.cost import weight_bytes
from pipeline.unet.families import chain_of
from pipeline.unet.foreign.appraisal import foreign_peak_bytes
from pipeline.unet.foreign.network import ForeignSettings
from pipeline.unet.heap import Heap
from pipeline.unet.layers import Up, last_uses, shapes
from pipeline.unet.model import Model
from pipeline.unet.settings import Block, UNetSettings, Upsampling

# What memory grows to, of the heap's end, where freed memory is kept: 0.8 to 1.57 for 4 networks, 2-D and 3-D, valid
# and same, of 8 to 32 channels, by both engines, 7 runs each; one of them has 0.84, 1.17, 1.24 and 1.57 by turns.
# test_unet_memory.py measures them again.
ALLOCATOR = 1.65
# The same where layers branch within a level, by residuals or gates, and pass more small tensors: 1.4 to 1.85.
BRANCHING = 2.0
_FLOAT = 4


def peak_bytes(
    settings: UNetSettings | ForeignSettings, tile_shape: tuple[int, ...], *, n_slices: int = 1,
    passes: Passes = ONE_PASS,
) -> int:
    """Return the bytes that one forward pass needs: weights, activations, classes, and the convolutions' workspace.

    Parameters
    ----------
    tile_shape : voxels that enter the network along each of its axes, halo included
    n_slices : tiles that enter at once
    passes : one after another, whose probabilities are added up; the weights are those of one network

    Raises
    ------
    ArgumentError : the network does not accept such a tile.
    """
    if passes.n > 1:
        averaged = 2 * _FLOAT * n_slices * prod(tile_shape) * (settings.in_channels + settings.n_classes)
        return averaged + peak_bytes(settings, tile_shape, n_slices=n_slices)
    if isinstance(settings, ForeignSettings):
        return foreign_peak_bytes(settings, tile_shape, n_slices=n_slices)
    for axis, size in enumerate(tile_shape):
        settings.check_size(size, axis)
    weights = weight_bytes(chain_of(settings), itemsize=_FLOAT)
    held = BRANCHING if settings.attention or settings.block is not Block.PLAIN else ALLOCATOR
    return weights + int(held * _FLOAT * n_slices * _heap_floats(settings, tile_shape))


def other_networks_bytes(model: Model) -> int:
    """Return the bytes of the weights of all networks of an ensemble but one, which a pass counts itself."""
    others = model.n_networks - 1
    return others * weight_bytes(chain_of(model.unet), itemsize=_FLOAT) if others else 0


def choose_tile(
    model: Model, *, budget_bytes: int, largest_core: tuple[int, ...], tta: Tta = Tta.NONE
) -> tuple[int, ...]:
    """Return the tile shape, halo included, that enters the fewest voxels per block and fits the budget.

    Parameters
    ----------
    largest_core : the block's core along the network's axes; no tile has a larger one, rounded up to the stride

    Raises
    ------
    BudgetError : not even the smallest tile fits.
    """
    rule, passes = model.rule, model.passes(tta)
    if isinstance(model.settings, ForeignSettings) and model.settings.tile:
        largest_core = rule.stride  # its only tile
    for core in _by_halo_overhead(rule, largest_core):
        tile = rule.tile_shape(core)
        if peak_bytes(model.settings, tile, passes=passes) <= budget_bytes:
            return tile
    least = rule.tile_shape(rule.stride)
    needed = peak_bytes(model.settings, least, passes=passes)
    raise BudgetError(
        f"the smallest tile {least} needs {needed:,} bytes, got a budget of {max(0, budget_bytes):,}; raise --budget"
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


@lru_cache(maxsize=1024)
def _heap_floats(settings: UNetSettings, tile_shape: tuple[int, ...]) -> int:
    """Return how far a pass makes a heap grow, the classes at its end included, in numbers."""
    chain, heap = chain_of(settings), Heap()
    every, last = shapes(chain, tile_shape, settings.padding), last_uses(chain)
    heap.take(0, settings.in_channels * prod(tile_shape))
    for at, layer in enumerate(chain):
        coarse = isinstance(layer, Up) and settings.up is Upsampling.RESIZE
        if coarse:
            heap.take("coarse", layer.out * prod(every[layer.source]))
        heap.take(at + 1, layer.out * prod(every[at + 1]))
        if coarse:
            heap.free("coarse")
        for tensor in {layer.source, *layer.skips} - {0}:
            if last[tensor] == at:
                heap.free(tensor)
    heap.take("best", prod(every[-1]))
    heap.take("classes", prod(every[-1]))
    return heap.most
