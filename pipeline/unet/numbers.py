"""From intensities to a network's numbers, and how exactly a device is to compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Windows = tuple[tuple[float, float], ...]


def normalised(raw: NDArray[Any], windows: Windows, *, device: torch.device) -> Tensor:
    """Return ``(raw - offset) * scale`` as float32 on the device, shape (channels, ...) as ``raw`` has it.

    What float32 cannot hold is subtracted in float64.
    """
    fits = raw.dtype.itemsize <= 2 or raw.dtype == np.float32
    wide = torch.float32 if fits else torch.float64
    x = torch.from_numpy(np.array(raw, dtype=raw.dtype.newbyteorder("="))).to(device).to(wide)
    offset, scale = torch.tensor(windows, dtype=wide, device=device).unbind(1)
    shape = (-1,) + (1,) * (raw.ndim - 1)
    return ((x - offset.reshape(shape)) * scale.reshape(shape)).to(torch.float32)


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, for what is small beside 1."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
