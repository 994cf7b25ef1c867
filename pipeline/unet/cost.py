"""What a network's passes cost: multiplications and bytes, counted layer by layer in plain integers."""

from __future__ import annotations

from math import prod

from pipeline.unet.families import chain_of
from pipeline.unet.foreign.appraisal import foreign_bare_multiply_adds, foreign_multiply_adds
from pipeline.unet.foreign.network import ForeignSettings
from pipeline.unet.layers import Axes, Chain, Conv, Join, Pool, Span, Up, lags, multiply_adds, n_weights, shapes
from pipeline.unet.settings import UNetSettings

ALLOCATOR = 1.2


def bare_multiply_adds(settings: UNetSettings | ForeignSettings, shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a scan of this shape without any halo: the least there can be.

    ``shape`` may have one axis more in front than the network: slices, one pass each.
    """
    if isinstance(settings, ForeignSettings):
        return foreign_bare_multiply_adds(settings, shape)
    slices, inner = prod(shape[: len(shape) - settings.dims]), shape[len(shape) - settings.dims :]
    return slices * sum(
        multiply_adds(layer, settings) * prod(-(-n // scale) for n, scale in zip(inner, layer.scale, strict=True))
        for layer in chain_of(settings)
    )


def tile_multiply_adds(settings: UNetSettings | ForeignSettings, tile_shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a tile, halo included, with the padding that the network has."""
    if isinstance(settings, ForeignSettings):
        return foreign_multiply_adds(settings, tile_shape)
    chain = chain_of(settings)
    made = zip(chain, shapes(chain, tile_shape, settings.padding)[1:], strict=True)
    return sum(multiply_adds(layer, settings) * prod(shape) for layer, shape in made)


def weight_bytes(chain: Chain, *, itemsize: int) -> int:
    """Return the bytes of the weights, in float32 from the file and twice as the kernels want them."""
    return sum(map(n_weights, chain)) * (4 + 2 * itemsize)


def stream_bytes(
    chain: Chain, cross: tuple[tuple[Span, ...], ...], *, order: Axes, slab: int, itemsize: int, in_channels: int
) -> int:
    """Return the bytes that a stream keeps between slabs and those of the layer at work, at the worst moment.

    The allocator's share is in it: what it holds was 0.9 to 1.1 times this, above some 20 MiB, of 7 networks measured.

    Parameters
    ----------
    cross : for every tensor its extent across the column, one (start, stop) per axis
    order : the network's axes, the streamed one first
    """
    axis, *across = order
    behind = lags(chain, axis)
    areas = [prod(stop - start for start, stop in each) for each in cross]
    channels = [in_channels, *(layer.out for layer in chain)]
    rows = [slab, *(slab // layer.scale[axis] for layer in chain)]
    kept, working = 0, 0
    for at, layer in enumerate(chain):
        made = channels[at + 1] * rows[at + 1] * areas[at + 1]
        if isinstance(layer, Conv):
            reached = zip(cross[at + 1], across, strict=True)
            needed = prod(b - a + 2 * layer.reach[each] for (a, b), each in reached) * layer.into
            kept += 2 * layer.reach[axis] * needed
            taken = (rows[at] + 2 * layer.reach[axis]) * needed
            source = channels[at] * rows[at] * areas[at] if any(layer.reach) else 0
            working = max(working, taken + max(made, source))
        elif isinstance(layer, Join):
            skip, = layer.skips
            wait = -(-(behind[skip] - behind[at]) // rows[at + 1]) + 1
            kept += wait * rows[at + 1] * channels[skip] * areas[at + 1]
        elif isinstance(layer, Up):
            working = max(working, made + channels[at] * rows[at] * areas[at])
        elif isinstance(layer, Pool):
            working = max(working, channels[at] * rows[at] * areas[at] * 2)
    return int(ALLOCATOR * (kept + working) * itemsize)
