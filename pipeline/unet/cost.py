"""What a network's passes cost: multiplications and bytes, counted layer by layer in plain integers."""

from __future__ import annotations

from math import prod

from pipeline.unet.layers import Chain, Conv, Join, Pool, Span, Up, chain_of, lags, multiply_adds
from pipeline.unet.settings import Padding, UNetSettings

ALLOCATOR = 1.2


def bare_multiply_adds(settings: UNetSettings, shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a scan of this shape without any halo: the least there can be.

    ``shape`` may have one axis more in front than the network: slices, one pass each.
    """
    slices, inner = prod(shape[: len(shape) - settings.dims]), shape[len(shape) - settings.dims :]
    return slices * sum(
        multiply_adds(layer, settings) * prod(-(-n // (1 << layer.level)) for n in inner)
        for layer in chain_of(settings)
    )


def tile_multiply_adds(settings: UNetSettings, tile_shape: tuple[int, ...]) -> int:
    """Return the multiplications of one pass over a tile, halo included, with the padding that the network has."""
    shape, total = list(tile_shape), 0
    loss = 2 if settings.padding is Padding.VALID else 0
    for layer in chain_of(settings):
        match layer:
            case Conv():
                shape = [n - loss * layer.reach for n in shape]
            case Pool():
                shape = [n // 2 for n in shape]
            case Up():
                shape = [2 * n for n in shape]
        total += multiply_adds(layer, settings) * prod(shape)
    return total


def weight_bytes(chain: Chain, settings: UNetSettings, *, itemsize: int) -> int:
    """Return the bytes of the weights, in float32 from the file and twice as the kernels want them."""
    n = 0
    for layer in chain:
        if isinstance(layer, Conv):
            n += layer.into * layer.out * (2 * layer.reach + 1) ** settings.dims
        elif isinstance(layer, Up):
            n += layer.into * layer.out * 2**settings.dims
    return n * (4 + 2 * itemsize)


def stream_bytes(
    chain: Chain, cross: tuple[tuple[Span, ...], ...], *, slab: int, itemsize: int, in_channels: int
) -> int:
    """Return the bytes that a stream keeps between slabs and those of the layer at work, at the worst moment.

    The allocator's share is in it: what it holds was 0.9 to 1.1 times this, above some 20 MiB, of 7 networks measured.

    Parameters
    ----------
    cross : for every tensor its extent across the column, one (start, stop) per axis
    """
    behind = lags(chain)
    areas = [prod(stop - start for start, stop in each) for each in cross]
    channels = [in_channels, *(layer.out for layer in chain)]
    rows = [slab >> level for level in (0, *(layer.level for layer in chain))]
    kept, working = 0, 0
    for at, layer in enumerate(chain):
        made = channels[at + 1] * rows[at + 1] * areas[at + 1]
        if isinstance(layer, Conv):
            needed = prod(b - a + 2 * layer.reach for a, b in cross[at + 1]) * layer.into
            kept += 2 * layer.reach * needed
            taken = (rows[at] + 2 * layer.reach) * needed
            source = channels[at] * rows[at] * areas[at] if layer.reach else 0
            working = max(working, taken + max(made, source))
        elif isinstance(layer, Join):
            skip = layer.skip
            wait = -(-(behind[skip] - behind[at]) // rows[at + 1]) + 1
            kept += wait * rows[at + 1] * channels[skip] * areas[at + 1]
        elif isinstance(layer, Up):
            working = max(working, made + channels[at] * rows[at] * areas[at])
        elif isinstance(layer, Pool):
            working = max(working, channels[at] * rows[at] * areas[at] * 2)
    return int(ALLOCATOR * (kept + working) * itemsize)
