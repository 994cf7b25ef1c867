"""Copies between host and device, for which neither waits: the device goes on with the next slab meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def locks(device: str | torch.device) -> bool:
    """Whether a device fetches by itself what lies in memory that is locked in place."""
    return torch.device(device).type == "cuda"


def staged(raw: NDArray[Any], *, device: torch.device) -> Tensor:
    """Return a copy of voxels that a device can fetch by itself."""
    voxels = torch.from_numpy(np.array(raw, dtype=raw.dtype.newbyteorder("=")))
    return voxels.pin_memory() if locks(device) else voxels


def sent(array: NDArray[Any], *, device: str | torch.device) -> Tensor:
    """Return an array on the device; a GPU copies it while the processor goes on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if locks(device) else tensor.to(device)


@dataclass(frozen=True, slots=True)
class Leaving:
    """Values on their way from a device."""

    values: Tensor
    left: Any  # torch.cuda.Event, which torch has not typed

    @classmethod
    def of(cls, values: Tensor) -> Leaving:
        """Have the values copied, after what the device has been given to do."""
        if not locks(values.device):
            return cls(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        left.record()
        return cls(host, left)

    def arrived(self) -> NDArray[Any]:
        """Return the values once they are there."""
        if self.left is not None:
            self.left.synchronize()
        array: NDArray[Any] = self.values.numpy()
        return array
