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
