"""What a network's passes cost: multiplications and bytes, counted layer by layer in plain integers."""

from __future__ import annotations

from collections import Counter
from math import prod

from pipeline.config import ONE_PASS, Passes
from pipeline.unet.families import chain_of
from pipeline.unet.foreign.appraisal import foreign_bare_multiply_adds, foreign_multiply_adds
from pipeline.unet.foreign.network import ForeignSettings
from pipeline.unet.layers import Axes, Chain, Join, Pool, multiply_adds, n_weights, shapes
from pipeline.unet.schedule import Schedule
from pipeline.unet.settings import UNetSettings

ALLOCATOR = 1.08
_FLOAT, _DOUBLE = 4, 8


def bare_multiply_adds(
    settings: UNetSettings | ForeignSettings, shape: tuple[int, ...], *, passes: Passes = ONE_PASS
) -> int:
    """Return the multiplications of passes over a scan of this shape without any halo.

    These are the least there can be.

    ``shape`` may have one axis more in front than the network: slices, one pass each.
    """
    if isinstance(settings, ForeignSettings):
        return passes.n * foreign_bare_multiply_adds(settings, shape)
    slices, inner = prod(shape[: len(shape) - settings.dims]), shape[len(shape) - settings.dims :]
    return passes.n * slices * sum(
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


def weight_bytes(chain: Chain, *, itemsize: int, passes: Passes = ONE_PASS) -> int:
    """Return the most bytes of the weights: in float32 from the file, and of every pass as its kernels want them.

    Beside them lie, at first, what the largest layer's are made of and, of turns, a network's turned ones; in the end,
    for the certificate, those of each network as it is written. With the allocator's share: of networks of width 64, 1
    or 5 of them, 1.01 to 1.07 times the rest was measured.
    """
    every = list(map(n_weights, chain))
    turned = _FLOAT * sum(every) if passes.n_turns > 1 else 0
    made = (_DOUBLE + 2 * itemsize) * max(every) + turned
    kept = sum(every) * (_FLOAT + itemsize * passes.n_turns)
    return passes.n_networks * int(ALLOCATOR * (kept + max(made, _FLOAT * sum(every))))


def stream_bytes(schedule: Schedule, *, itemsize: int, n_streams: int = 1) -> int:
    """Return the bytes of what streams keep between slabs, and of what the layers of one at a time make of one.

    The allocator's share is in it: what the heap grew to was 0.86 to 1.11 times this, of 10 networks measured.
    """
    kept = sum(
        ring.n_rows * schedule.channels[tensor] * prod(stop - start for start, stop in ring.cross)
        for tensor, ring in schedule.rings.items()
    )
    kept += sum(n_rows * schedule.row_size(at) for at, n_rows in enumerate(schedule.kept) if n_rows)
    bench = max(map(schedule.taken_size, range(len(schedule.chain))))
    means = 2 * _FLOAT * schedule.slab_size(len(schedule.chain)) if n_streams > 1 else 0
    return int(ALLOCATOR * ((n_streams * kept + bench + _passing_size(schedule)) * itemsize + means))


def _passing_size(schedule: Schedule) -> int:
    """Return the numbers in the slabs that come and go with a step, as many as there are together.

    Each resolution counts for itself: the heap seldom puts a tensor where others of another size were.
    """
    live, most = Counter[Axes](), Counter[Axes]()
    place: list[Axes] = [(), *(layer.scale for layer in schedule.chain)]
    live[()] = most[()] = schedule.slab_size(0)
    for at, layer in enumerate(schedule.chain):
        if isinstance(layer, Join):
            continue
        here, made = place[at + 1], schedule.slab_size(at + 1)
        freed = [(place[tensor], schedule.slab_size(tensor)) for tensor in schedule.freed[at]]
        is_early = schedule.is_own(at) or schedule.taken_size(at) > 0  # what it takes is gone before it makes its own
        on_its_way = schedule.slab_size(layer.source) // 2 if type(layer) is Pool else 0
        for where, size in freed * is_early:
            live[where] -= size
        most[here] = max(most[here], live[here] + made + on_its_way)
        live[here] += made if at + 1 in schedule.at_hand else 0
        for where, size in freed * (not is_early):
            live[where] -= size
    return most.total()
