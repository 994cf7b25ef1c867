"""Which engine computes a network, and how its process keeps its memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

from pipeline.config import Precision
from pipeline.unet.cuda import CudaEngine, can_fuse
from pipeline.unet.engine import Engine
from pipeline.unet.network import UNet
from pipeline.unet.onednn import OneDnnEngine, has_onednn

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def make_engine(network: UNet, *, device: str, precision: Precision = Precision.FLOAT32, first: int = 0) -> Engine:
    """Return the fastest engine for a network on a device."""
    kind: type[Engine] = Engine
    if device == "cpu" and has_onednn():
        kind = OneDnnEngine
    if device == "cuda" and can_fuse():
        kind = CudaEngine
    dtype, tf32 = _DTYPES.get(precision, torch.float32), precision is Precision.TF32
    return kind(network, device=device, dtype=dtype, first=first, tf32=tf32)


@cache
def keep_freed_memory() -> bool:
    """Keep the memory of freed activations in this process, so that the kernel need not hand it out page by page.

    Page faults cost up to 1.7 times on large activations (measured, glibc). Returns whether the allocator can do it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    return bool(set_option(mmap_max, 0) & set_option(trim_threshold, 2**31 - 1) & set_option(top_pad, 64 << 20))
