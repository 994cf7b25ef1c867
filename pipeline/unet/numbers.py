"""From intensities to a network's numbers, and how exactly a device is to compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pipeline.store.scaling import Windows, spread_out

Pairs = tuple[tuple[float, float], ...]  # (offset, scale) of each channel


def normalised(voxels: Tensor, windows: Windows, *, device: torch.device) -> Tensor:
    """Return what the network sees, float32 on the device, of voxels (channels, ...) on the host; see ``spread_out``.

    What float32 cannot hold is subtracted in float64. Nothing here waits for what the device still has to do.
    """
    fits = voxels.dtype.itemsize <= 2 or voxels.dtype == torch.float32
    wide = torch.float32 if fits else torch.float64
    x = voxels.to(device, non_blocking=True).to(wide)
    columns = spread_out(windows, n_axes=voxels.ndim - 1)
    offset, scale, low, high = (
        torch.from_numpy(each).to(wide).to(device, non_blocking=True) for each in columns
    )
    x = ((x - offset) * scale).to(torch.float32)
    if np.isfinite(columns[2]).any() or np.isfinite(columns[3]).any():
        x.clamp_(low.to(torch.float32), high.to(torch.float32))
    return x


def batched(x: Tensor, *, dims: int, neighbours: int = 0) -> Tensor:
    """Return voxels (channels, *spatial) as a network of ``dims`` axes takes them, (batch, channels, *its axes).

    Of one axis more the first is that of slices, each of which is one of the batch. Where it sees ``neighbours`` on
    each side, too, x has so many slices more at either end; the order of channels is that of ``UNetSettings``.
    """
    if x.ndim == dims + 1:
        return x[None]
    return x.unfold(1, 2 * neighbours + 1, 1).permute(1, 0, 4, 2, 3).flatten(1, 2)


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, for what is small beside 1."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def restored(values: Tensor, windows: Pairs) -> Tensor:
    """Return ``values / scale + offset`` as float32, the inverse of ``normalised``; shape (batch, channels, ...).

    Computed in float64, so that large offsets cost no more than float32 itself does.
    """
    offset, scale = torch.tensor(windows, dtype=torch.float64, device=values.device).unbind(1)
    shape = (-1,) + (1,) * (values.ndim - 2)
    return (values.double() / scale.reshape(shape) + offset.reshape(shape)).to(torch.float32)


@contextmanager
def exactly(*, tf32: bool = False) -> Iterator[None]:
    """Compute by algorithms that give the same bits each time, and in full float32 unless TF32 is asked for."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was
