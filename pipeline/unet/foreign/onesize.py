"""The tile rule of a network that takes inputs of one size only, measured like that of any other (``receptive``).

    |hhhhhh|cccccccccccc|hhhhhh|      the one tile that it takes; its core is the rule's stride
           s  s  s  s  s              where the network's own stride lets the tile lie

NaN probes near the middle tell reach and stride. Then the input is shifted by one stride, and the cores of both passes
must hold the same numbers where they overlap: a network that knows the position does not pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.receptive import LARGEST_STRIDE, RELATIVE_TOLERANCE, covers, exact_sums

Offsets = tuple[int, ...]


def measure_one_size(network: nn.Module, shape: tuple[int, ...], *, in_channels: int) -> TileRule:
    """Return the rule whose only tile has this shape: its stride is the core of that tile.

    Raises
    ------
    ModelError : the network's reach, or its stride, leaves no core in a tile of this size.
    """
    generator = torch.Generator().manual_seed(0)
    with exact_sums(network):
        x = torch.randn((1, in_channels, *shape), generator=generator)
        axes = [_measure_axis(network, x, axis) for axis in range(len(shape))]
    cores, halos, trims = (tuple(values) for values in zip(*axes, strict=True))
    return TileRule(cores, halos, trims)


def _measure_axis(network: nn.Module, x: Tensor, axis: int) -> tuple[int, int, int]:
    """Return core, halo and trim along one axis."""
    size, out = x.shape[axis + 2], network(x).shape[axis + 2]
    if out > size or (size - out) % 2:
        raise ModelError(
            f"an output must be its input less the same border on both sides, got {out} of {size} voxels along axis "
            f"{axis}; resample or crop inside the network"
        )
    loss = (size - out) // 2
    first, influences = _influences(network, x, axis, loss)
    for stride in range(1, min(LARGEST_STRIDE, (len(influences) - 2) // 2) + 1):
        if any(a != b for a, b in zip(influences, influences[stride:], strict=False)):
            continue
        phases = [influences[(p - first) % stride] for p in range(stride)]
        halos = [
            halo for halo in range(loss, (size - 2 * stride) // 2 + 1)
            if (size - 2 * halo) % stride == 0 and covers(phases, stride, halo)
        ]
        if halos and _agrees(network, x, axis, stride, halos[0], loss):
            # shards are multiples of chunk and core: a power of two keeps them small
            power = 1 << ((size - 2 * halos[0]).bit_length() - 1)
            halo = next((h for h in halos if size - 2 * h == power), halos[0])
            return size - 2 * halo, halo, halo - loss
    raise ModelError(
        f"a network that takes {size} voxels along axis {axis} only must reach less far than to its border, and alike "
        "everywhere, got one of which no part can be cut out (one input NaN at a time, and a shifted input); "
        "export it with a larger example, or with dynamic sizes"
    )


def _influences(network: nn.Module, x: Tensor, axis: int, loss: int) -> tuple[int, list[Offsets]]:
    """Return the first of the positions around the middle that reach no border, and the offsets that each reaches."""
    size = x.shape[axis + 2]
    low = high = size // 2
    found: dict[int, Offsets] = {}
    open_ends = {-1, 1}
    while open_ends and len(found) < 2 * LARGEST_STRIDE + 2:
        for end in sorted(open_ends):
            at = high if end > 0 else low - 1
            offsets = _influence(network, x, axis, at, loss) if 0 <= at < size else None
            if offsets is None:
                open_ends.discard(end)
                continue
            found[at] = offsets
            low, high = min(low, at), max(high, at + 1)
    return low, [found[at] for at in sorted(found)]


def _influence(network: nn.Module, x: Tensor, axis: int, at: int, loss: int) -> Offsets | None:
    probe = x.clone()
    probe.select(axis + 2, at).fill_(torch.nan)
    out = network(probe).isnan().movedim(axis + 2, 0).flatten(1).any(1)
    reached = out.nonzero().flatten().tolist()
    if reached and (reached[0] == 0 or reached[-1] == len(out) - 1):
        return None
    return tuple(q + loss - at for q in reached)


def _agrees(network: nn.Module, x: Tensor, axis: int, stride: int, halo: int, loss: int) -> bool:
    """Whether the tile one stride further gives the same numbers where both cores are."""
    at, size, trim = axis + 2, x.shape[axis + 2], halo - loss
    longer = torch.cat((x, x.narrow(at, 0, stride).flip(at)), dim=at)
    here, there = network(x), network(longer.narrow(at, stride, size))
    n = size - 2 * halo - stride
    a, b = here.narrow(at, trim + stride, n), there.narrow(at, trim, n)
    return bool(((a - b).abs() <= RELATIVE_TOLERANCE * float(here.abs().max())).all())
