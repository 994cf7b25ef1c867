"""Typed: values of a TOML file as settings of a recipe have them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pipeline.errors import ArgumentError
from pipeline.unet.settings import as_poolings

_NUMBERS = {"window", "percentiles", "voxel_size_um"}


def typed(name: str, value: Any, kind: type) -> Any:  # noqa: ANN401 whatever TOML holds
    """Return a TOML value as its field's type; a whole number may stand for a real one, nothing else is converted."""
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise ArgumentError(f"{name} must be one of {', '.join(kind)}, got {value!r}; choose one")
        return kind(value)
    if name == "poolings":
        return as_poolings(value)
    if name in _NUMBERS:
        return _numbers(name, value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple:
        if type(value) is not list or not all(type(each) is str for each in value):
            raise ArgumentError(f"{name} must be a list of texts, got {value!r}; correct it")
        return tuple(value)
    if type(value) is not kind:
        raise ArgumentError(f"{name} must be of type {kind.__name__}, got {value!r}; correct it")
    return value


def _numbers(name: str, value: Any) -> tuple[Any, ...]:  # noqa: ANN401 whatever TOML holds
    """Return a list of numbers as a tuple of floats; a window, or a list of such, as a tuple of pairs."""
    if name == "window" and type(value) is list:
        pairs = value if all(type(each) is list for each in value) else [value]
        return tuple(_numbers("each window", pair) for pair in pairs)
    if type(value) is not list or not all(type(each) in {int, float} for each in value):
        raise ArgumentError(f"{name} must be a list of numbers, got {value!r}; correct it")
    return tuple(map(float, value))
