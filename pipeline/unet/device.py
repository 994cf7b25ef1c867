"""Where networks run."""

from __future__ import annotations

import os
from platform import node
from typing import Any

import torch

from pipeline.errors import ArgumentError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def pick_device(name: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda"; auto takes a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        seen = os.environ.get(VISIBLE)
        where = node() if seen is None else f"{node()} with {VISIBLE}={seen}"
        raise ArgumentError(f"device cuda needs a GPU that torch can use, got none on {where}; use --device cpu")
    return name


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs here that torch can use, each by its name for CUDA_VISIBLE_DEVICES; nothing is begun on any.

    Where that variable is set, they are what it names: numbers, UUIDs, or slices of a GPU (MIG), of which CUDA shows
    any one process the first alone.
    """
    n_gpus, named = torch.cuda.device_count(), os.environ.get(VISIBLE)
    if named is None:
        return tuple(map(str, range(n_gpus)))
    names = tuple(filter(None, map(str.strip, named.split(","))))
    return names[: len(names) if n_gpus and names[0].startswith("MIG-") else n_gpus]


def gpus_for(n_workers: int | None) -> tuple[str, ...]:
    """Return a GPU for each of so many worker processes, as ``visible_gpus`` names them; None takes all.

    Raises
    ------
    ArgumentError : there are fewer: two processes on one would take turns, and each its memory.
    """
    gpus = visible_gpus()
    if n_workers is not None and n_workers > (n := len(gpus)):
        raise ArgumentError(f"each worker needs a GPU of its own, got {n_workers} and {n} GPUs; use {n} or fewer")
    return gpus[:n_workers]


def workers_here(device: str, *, asked: int | None, usual: int) -> tuple[int, tuple[str, ...]]:
    """Return how many processes of this machine share a run, and of each its GPU: all there are, unless told otherwise.

    Parameters
    ----------
    asked, usual : how many there are to be, and how many there are on a device without GPUs where that is None
    """
    gpus = gpus_for(asked) if device == "cuda" else ()
    return len(gpus) or asked or usual, gpus


def has_bf16(device: str) -> bool:
    """Whether a device has instructions for bfloat16, which train a network 1.6 to 2.9 times as fast on a processor."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def peak_device_bytes(device: str) -> int:
    """Return the most memory of a GPU that this process has had; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
