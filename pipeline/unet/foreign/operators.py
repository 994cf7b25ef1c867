"""Which operators a program may call: torch's tensor operators, and arithmetic of sizes; nothing that is code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import ModelError

Operator = Callable[..., Any]

_SIZES: dict[str, Operator] = {
    **{f"_operator.{f.__name__}": f for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
        operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    )},
    "torch.sym_max": max, "torch.sym_min": min, "torch.sym_int": int, "torch.sym_float": float,
    "torch.sym_not": operator.not_, "math.ceil": math.ceil, "math.floor": math.floor, "math.trunc": math.trunc,
}  # fmt: skip
# A view is refused where channels lie last in memory; the numbers of both are the same.
_SAME = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}
# These read or change how tensors lie in memory, which is ours to choose, or read files.
_REFUSED = ("as_strided", "set_", "resize_", "from_file")
_NAME = re.compile(r"aten\.(?P<name>[a-z_0-9]+)\.(?P<overload>[A-Za-z_0-9]+)")


def resolve(name: str) -> Operator:
    """Return the operator of a name such as "aten.conv2d.default".

    Raises
    ------
    ModelError : torch has no such tensor operator, or it may not be called.
    """
    if name in _SIZES:
        return _SIZES[name]
    found = _NAME.fullmatch(_SAME.get(name, name))
    if found is None or found["name"].startswith(_REFUSED):
        raise ModelError(f"a program may call tensor operators of aten, got {name}; export the network without it")
    packet = getattr(torch.ops.aten, found["name"], None)
    called = getattr(packet, found["overload"], None)
    # what only TorchScript has, files and containers among it, has no kernel of the dispatcher
    if not isinstance(called, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(called.name()):  # type: ignore[no-untyped-call]
        raise ModelError(f"torch {torch.__version__} has no operator {name}; update torch, or export the network anew")
    return called
