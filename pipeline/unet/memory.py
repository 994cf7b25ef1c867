"""How much memory a tile takes, known before it is run, and the tile that a budget allows.

The layers of one pass are gone through in order, and the tensors that are alive at each are added up: the network's
input, skips that wait for their level, what the level's convolutions began with, and what the layer takes and makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

from pipeline.errors import BudgetError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.cost import weight_bytes
from pipeline.unet.layers import Conv, Join, Pool, Up, chain_of
from pipeline.unet.model import Model
from pipeline.unet.settings import Padding, UNetSettings, Upsampling

# What the heap grows to, of the live bytes, where freed memory is kept: 1.1 to 2.35 for 7 networks, 2-D and 3-D, valid
# and same, of 4 to 32 channels; test_unet_memory.py measures some of them again. Streams allocate once: 1.2.
ALLOCATOR = 2.5
_FLOAT = 4


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
    for size in tile_shape:
        settings.check_size(size)
    weights = weight_bytes(chain_of(settings), settings, itemsize=_FLOAT)
    return weights + int(ALLOCATOR * _FLOAT * n_slices * _live_floats(settings, tile_shape))


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
        if peak_bytes(model.settings, tile) <= budget_bytes:
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


@lru_cache(maxsize=1024)
def _live_floats(settings: UNetSettings, tile_shape: tuple[int, ...]) -> int:
    """Return how many numbers are alive at the worst moment of a pass, the classes at its end included."""
    shape, channels = list(tile_shape), settings.in_channels
    sizes = [entering := channels * prod(shape)]
    loss = 2 if settings.padding is Padding.VALID else 0
    chain, most, began = chain_of(settings), 0, entering
    joins = {layer.skip for layer in chain if isinstance(layer, Join)}
    waiting: list[int] = []
    for at, layer in enumerate(chain, start=1):
        taken, others = sizes[-1], entering + sum(waiting)
        match layer:
            case Conv():
                shape = [n - loss * layer.reach for n in shape]
                made = layer.out * prod(shape)
                normalised = made if settings.batch_norm and layer.relu else 0
                alive = others + began + max(taken if taken != began else 0, normalised) + made
            case Pool():
                shape = [n // 2 for n in shape]
                began = made = layer.out * prod(shape)
                alive = others + made
            case Up():
                coarse = layer.out * prod(shape) if settings.up is Upsampling.RESIZE else 0
                shape = [2 * n for n in shape]
                made = layer.out * prod(shape)
                alive = others + taken + coarse + made
            case Join():
                began = made = layer.out * prod(shape)
                alive = others + taken + made
                waiting.pop()
        if at in joins:
            waiting.append(made)
        sizes.append(made)
        most = max(most, alive)
    logits = sizes[-1]
    return max(most, entering + 2 * logits + 3 * prod(shape))
