"""Members: the tensors of several networks in one file, each name behind the number of its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pipeline.errors import ModelError


def together(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of two or more networks under names such as "0.head.weight"."""
    return {f"{at}.{name}": tensor for at, each in enumerate(weights) for name, tensor in each.items()}


def apart(weights: dict[str, Tensor], n: int) -> tuple[dict[str, Tensor], ...]:
    """Return the tensors of each of n networks by its own names; those of one have no number.

    Raises
    ------
    ModelError : some are of none of the networks, or there are fewer tensors than networks.
    """
    if n == 1:
        return (weights,)
    if not 1 <= n <= len(weights):
        raise ModelError(f"an ensemble must have a network or more, each with tensors, got {n} of {len(weights)}")
    parts = {str(at): dict[str, Tensor]() for at in range(n)}
    for name, tensor in weights.items():
        number, _, inner = name.partition(".")
        if number not in parts:
            raise ModelError(f"tensors of an ensemble must begin with 0 to {n - 1}, the number of theirs, got {name}")
        parts[number][inner] = tensor
    return tuple(parts.values())
