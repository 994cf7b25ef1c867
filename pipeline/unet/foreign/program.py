"""Program: a network as a list of calls of torch's operators, plain data that holds no code and no pickle.

    input ── conv2d ── relu ── max_pool2d ── ... ── output        values have names; each call takes and makes some

A program is what ``torch.export`` has written down of a network of any library, without the guards on its sizes: at
which sizes tiles give the numbers of one pass is measured (``receptive``), not believed. As JSON, a value is a name in
an object, {"value": "relu_1"}, and so are types; numbers, flags, words and lists are themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ModelError

# Names that no exported program has: theirs are words of Python.
_RAW, _CENTRED, _MEAN, _STD = "haloseg.raw", "haloseg.centred", "haloseg.mean", "haloseg.std"
_ACTIVATIONS = {"softmax": "softmax", "_softmax": "softmax", "log_softmax": "softmax", "sigmoid": "sigmoid"}

Argument = Any  # JSON: None, a flag, a number, a word, a list of arguments, or an object with one key


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    Attributes
    ----------
    operator : such as "aten.conv2d.default"
    arguments : by position, as JSON text
    named : by name, as JSON text
    results : names of the values that it makes; "" for one that nobody uses
    several : whether the operator returns a list or tuple, of which ``results`` are the items
    """

    operator: str
    arguments: str
    named: str
    results: tuple[str, ...]
    several: bool

    def takes(self) -> set[str]:
        """Return the names of the values that the call takes."""
        return set(values_in([json.loads(self.arguments), *json.loads(self.named).values()]))


@dataclass(frozen=True, slots=True)
class Program:
    """A network of one input and one output.

    Attributes
    ----------
    input, output : names of values, arrays of shape (batch, channels, *spatial)
    state : (name of the value, name of the tensor) of each weight and constant
    calls : in an order in which they can be made
    """

    input: str
    output: str
    state: tuple[tuple[str, str], ...]
    calls: tuple[Call, ...]

    def __post_init__(self) -> None:
        known = {self.input, *(value for value, _ in self.state)}
        for call in self.calls:
            if missing := call.takes() - known:
                raise ModelError(
                    f"a program's values must be made before they are used, got {sorted(missing)[0]}; export it anew"
                )
            known.update(call.results)
        if self.output not in known:
            raise ModelError(f"a program's output must be made by one of its calls, got {self.output}; export it anew")

    def to_json(self) -> dict[str, Any]:
        """Return the program as a JSON object."""
        calls = [
            [c.operator, json.loads(c.arguments), json.loads(c.named), list(c.results), c.several] for c in self.calls
        ]
        return {"input": self.input, "output": self.output, "state": [list(s) for s in self.state], "calls": calls}

    @classmethod
    def from_json(cls, document: Any) -> Program:  # noqa: ANN401 whatever a file holds
        """Return the program that ``to_json`` wrote.

        Raises
        ------
        ModelError : it is no such object.
        """
        try:
            calls = tuple(
                Call(str(operator), _text(arguments), _text(named), tuple(map(str, results)), bool(several))
                for operator, arguments, named, results, several in document["calls"]
            )
            state = tuple((str(value), str(tensor)) for value, tensor in document["state"])
            return cls(str(document["input"]), str(document["output"]), state, calls)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"a program must be one that haloseg import wrote, got {error}; import it anew") from error

    def without_activation(self, dims: int) -> tuple[Program, str | None]:
        """Return the program without the softmax or sigmoid at its end, and its name: what is left gives logits."""
        last = next((call for call in self.calls if self.output in call.results), None)
        name = last.operator.split(".")[1] if last else ""
        if last is None or name not in _ACTIVATIONS or not _over_channels(last, dims):
            return self, None
        (logits,) = last.takes()
        calls = tuple(call for call in self.calls if call is not last)
        if any(self.output in call.takes() for call in calls):
            return self, None
        return Program(self.input, logits, self.state, calls), _ACTIVATIONS[name]

    def scaled(self, mean: str, std: str) -> Program:
        """Return the program with ``(x - mean) / std`` before it; these are names of tensors, (channels, 1, ...)."""
        state = (*self.state, (_MEAN, mean), (_STD, std))
        shift = _text([value_of(_RAW), value_of(_MEAN)])
        scale = _text([value_of(_CENTRED), value_of(_STD)])
        calls = (
            Call("aten.sub.Tensor", shift, "{}", (_CENTRED,), several=False),
            Call("aten.div.Tensor", scale, "{}", (self.input,), several=False),
        )
        return Program(_RAW, self.output, state, calls + self.calls)

    def pruned(self) -> Program:
        """Return the program without what its output does not need; of one that writes in place all calls are kept."""
        in_place = any(call.operator.split(".")[1].endswith("_") for call in self.calls)
        needed, kept = {self.output}, list[Call]()
        for call in reversed(self.calls):
            if in_place or needed.intersection(call.results):
                kept.append(call)
                needed |= call.takes()
        state = tuple(each for each in self.state if each[0] in needed)
        return Program(self.input, self.output, state, tuple(reversed(kept)))


def _over_channels(call: Call, dims: int) -> bool:
    arguments = json.loads(call.arguments)
    return call.operator.startswith("aten.sigmoid") or (len(arguments) > 1 and arguments[1] in (1, -dims - 1))


def value_of(name: str) -> dict[str, str]:
    """Return the argument that stands for the value of this name."""
    return {"value": name}


def number_of(x: float) -> Argument:
    """Return a float as an argument; JSON has no infinity."""
    return x if math.isfinite(x) else {"float": str(x)}


def values_in(argument: Argument) -> Iterator[str]:
    """Yield the names of the values in an argument."""
    if isinstance(argument, list):
        for item in argument:
            yield from values_in(item)
    elif isinstance(argument, dict) and "value" in argument:
        yield argument["value"]


def _text(argument: Argument) -> str:
    return json.dumps(argument, sort_keys=True, allow_nan=False)
