"""A network written down as it runs, for one size: every call that depends on its input, all else as constants."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import ModelError
from pipeline.unet.foreign.program import Argument, Call, Program, number_of, value_of
from pipeline.unet.foreign.pt2 import Exported


def recorded(network: Any, x: Tensor) -> Exported:  # noqa: ANN401 a module or a TorchScript archive's
    """Return the program of one pass of a network in eval mode over x, (1, channels, *spatial)."""
    recorder = _Recorder(x)
    with torch.no_grad(), recorder:
        out = network(x)
    name = recorder.names.get(id(out)) if isinstance(out, Tensor) else None
    if name is None:
        raise ModelError(
            f"a network must return one array that depends on its input, got {type(out).__name__}; wrap it so"
        )
    state = tuple((each, each) for each in recorder.constants)
    program = Program("x", name, state, tuple(recorder.calls)).pruned()
    tensors = {each: recorder.constants[each] for each, _ in program.state}
    return Exported(program, tensors, tuple(x.shape), torch.__version__)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down calls; tensors are told apart by identity, hence all of them are kept."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.constants, self.calls = {id(x): "x"}, dict[str, Tensor](), list[Call]()
        self._kept: list[Tensor] = [x]
        self._fixed = dict[int, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        del types
        kwargs = kwargs or {}
        depends = any(isinstance(each, Tensor) and id(each) in self.names for each in tree_leaves((args, kwargs)))
        positional = self._argument(list(args)) if depends else None
        made = func(*args, **kwargs)
        if depends and isinstance(made, Tensor | list | tuple):
            named = {key: self._argument(each) for key, each in kwargs.items()}
            several = not isinstance(made, Tensor)
            results = tuple(self._named(each) for each in (made if several else (made,)))
            self.calls.append(Call(str(func), json.dumps(positional), json.dumps(named), results, several))
        return made

    def _named(self, made: Any) -> str:  # noqa: ANN401
        if not isinstance(made, Tensor):
            return ""
        if id(made) not in self.names:
            self._kept.append(made)
            self.names[id(made)] = f"v{len(self._kept)}"
        return self.names[id(made)]

    def _argument(self, each: Any) -> Argument:  # noqa: ANN401
        match each:
            case Tensor():
                return value_of(self.names.get(id(each)) or self._fixed.get(id(each)) or self._constant(each))
            case list() | tuple():
                return [self._argument(item) for item in each]
            case torch.dtype() | torch.memory_format():
                kind = "dtype" if isinstance(each, torch.dtype) else "memory_format"
                return {kind: str(each).removeprefix("torch.")}
            case torch.device():
                return {"device": None}
            case torch.layout():
                return None
            case bool() | int() | str() | None:
                return each
            case float():
                return number_of(each)
        raise ModelError(
            f"a network must call operators with tensors and numbers, got {type(each).__name__}; use torch.export.save"
        )

    def _constant(self, each: Tensor) -> str:
        self._kept.append(each)
        name = f"c{len(self._kept)}"
        self._fixed[id(each)] = name
        self.constants[name] = each.detach().clone()
        return name
