"""Where networks run."""

from __future__ import annotations

import torch

from pipeline.errors import ArgumentError


def pick_device(name: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda"; auto takes a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device cuda needs a GPU that torch can use, got none; use --device cpu")
    return name


def peak_device_bytes(device: str) -> int:
    """Return the most memory of a GPU that this process has had; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
