"""Networks from elsewhere: a program of torch's operators, run tile by tile, counted by passes without numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config import EngineName, Scheme
from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.foreign.operators import Operator, resolve
from pipeline.unet.foreign.program import Argument, Program
from pipeline.unet.settings import LARGEST_CLASS, Head

GRAPH = "graph"  # name of the tensor that holds the program's JSON, uint8
WEIGHTS = "weights."  # before the names of all others


@dataclass(frozen=True, slots=True)
class ForeignSettings:
    """What is known of a network from elsewhere; it has the fields of ``UNetSettings`` that running one needs.

    Attributes
    ----------
    dims : spatial axes, 2 or 3
    in_channels : channels of the image
    n_classes : channels of the output
    head : how logits become probabilities
    source : where it came from, in words
    tile : the only input size that it takes, along each axis; empty where it takes any that its tile rule allows
    together : whether several tiles may enter at once
    rule : as measured
    program : its calls, which a model file keeps beside the weights
    shapes : shape of each weight, by name
    """

    neighbours: ClassVar[int] = 0
    dims: int
    in_channels: int
    n_classes: int
    head: Head
    source: str
    tile: tuple[int, ...]
    together: bool
    rule: TileRule
    program: Program = field(repr=False)
    shapes: tuple[tuple[str, tuple[int, ...], str], ...] = field(repr=False)

    def __post_init__(self) -> None:
        if self.dims not in (2, 3) or self.in_channels < 1:
            raise ArgumentError(
                f"a network needs 2 or 3 dims and at least 1 channel, got {self.dims} and {self.in_channels}; "
                "export it with an example of shape (1, channels, [z,] y, x)"
            )
        fewest = 2 if self.head is Head.SOFTMAX else 1
        if self.n_classes < fewest or self.n_labels > LARGEST_CLASS + 1:
            raise ArgumentError(
                f"a {self.head} head needs {fewest} to {LARGEST_CLASS + fewest - 1} classes, got {self.n_classes}; "
                "use the other --head"
            )

    @property
    def image_channels(self) -> int:
        """Channels of the image."""
        return self.in_channels

    @property
    def n_labels(self) -> int:
        """Values that a segmented voxel may have; see ``UNetSettings.n_labels``."""
        if self.head is Head.LINEAR:
            return 0
        return self.n_classes + (1 if self.head is Head.SIGMOID else 0)

    @property
    def n_parameters(self) -> int:
        """Numbers in the weights and constants."""
        return sum(prod(shape) for _, shape, _ in self.shapes)

    def to_json(self) -> dict[str, Any]:
        """Return what a model file says of the network; the program lies beside it."""
        return {
            "kind": "program", "dims": self.dims, "in_channels": self.in_channels, "n_classes": self.n_classes,
            "head": self.head.value, "source": self.source, "tile": list(self.tile), "together": self.together,
            "operators": len(self.program.calls),
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: dict[str, Any], rule: TileRule, tensors: dict[str, Tensor]) -> ForeignSettings:
        """Return the settings that ``to_json`` wrote, of a file with this rule and these tensors.

        Raises
        ------
        ModelError : they do not fit together.
        """
        try:
            program = Program.from_json(json.loads(bytes(tensors[GRAPH].tolist())))
            return cls(
                int(document["dims"]), int(document["in_channels"]), int(document["n_classes"]),
                Head(document["head"]), str(document["source"]), tuple(map(int, document["tile"])),
                bool(document["together"]), rule, program, shapes_of(tensors),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"a network from elsewhere must be as haloseg import wrote it, got {error}; import it again"
            ) from error

    def check_weights(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors that are not those of the program, or not finite."""
        expected = {GRAPH, *(WEIGHTS + tensor for _, tensor in self.program.state)}
        if odd := sorted(expected ^ set(tensors)):
            raise ModelError(
                f"tensors must be those of the program, got {len(odd)} too many or missing: {odd[0]}; import it again"
            )
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ModelError(f"tensor {name} must be finite, got NaN or infinity; import weights that are")


def scheme_for(settings: object, scheme: Scheme) -> Scheme:
    """Return how a model is run: a network from elsewhere as it is written, in float32, by overlapping tiles.

    Raises
    ------
    ArgumentError : something was asked for that only networks of ours can do.
    """
    if not isinstance(settings, ForeignSettings):
        return scheme
    if scheme.engine is EngineName.FUSED:
        raise ArgumentError("a network from elsewhere runs as it is written, got engine fused; leave --engine out")
    return replace(scheme, engine=EngineName.REFERENCE)


def graph_tensor(program: Program) -> Tensor:
    """Return a program as the bytes of its JSON, uint8."""
    text = json.dumps(program.to_json(), sort_keys=True, allow_nan=False)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def shapes_of(tensors: dict[str, Tensor]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Return (name, shape, dtype) of each weight of a model file."""
    return tuple(
        (name, tuple(each.shape), str(each.dtype).removeprefix("torch."))
        for name, each in sorted(tensors.items()) if name != GRAPH
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Step:
    """A call that is ready to be made, and the values that nothing needs after it."""

    operator: Operator
    arguments: list[Argument]
    named: dict[str, Argument]
    results: tuple[str, ...]
    several: bool
    last_used: tuple[str, ...]


class ForeignNetwork(nn.Module):
    """A program as a network: ``forward`` returns logits (batch, classes, *spatial) of (batch, channels, *spatial).

    Parameters
    ----------
    weights : as in a model file; on the meta device where only shapes matter
    """

    def __init__(self, settings: ForeignSettings, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.settings = settings
        for name, tensor in weights.items():
            if name != GRAPH:
                _place(self, name, tensor)
        self._state = tuple((value, WEIGHTS + tensor) for value, tensor in settings.program.state)
        self._steps = _steps(settings.program)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float32 on the device of x."""
        if x.shape[0] > 1 and not self.settings.together:
            return torch.cat([self.run(one[None]) for one in x])
        return self.run(x)

    def run(self, x: Tensor, on_step: Callable[[dict[str, Any]], None] | None = None) -> Tensor:
        """Return the output of one pass; ``on_step`` sees the values that are alive after each call."""
        values: dict[str, Any] = {value: self.get_buffer(name) for value, name in self._state}
        weights = set(values)
        values[self.settings.program.input] = x
        for step in self._steps:
            named = {name: _filled(each, values, x.device) for name, each in step.named.items()}
            made = step.operator(*_filled(step.arguments, values, x.device), **named)
            if step.several:
                values.update(zip(step.results, made, strict=True))
            elif step.results:
                values[step.results[0]] = made
            if on_step is not None:
                on_step({name: value for name, value in values.items() if name not in weights})
            for name in step.last_used:
                values.pop(name, None)
        output: Tensor = values[self.settings.program.output]
        return output


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor under a dotted name, with a module for each part of it."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(last, tensor)


def _steps(program: Program) -> tuple[_Step, ...]:
    steps, later = [], {program.output}
    for call in reversed(program.calls):
        used = call.takes() | set(call.results)
        steps.append(_Step(
            resolve(call.operator), json.loads(call.arguments), json.loads(call.named), call.results, call.several,
            tuple(sorted(used - later)),
        ))  # fmt: skip
        later |= used
    return tuple(reversed(steps))


def _filled(argument: Argument, values: dict[str, Any], device: torch.device) -> Any:  # noqa: ANN401 whatever one takes
    """Return an argument with the values for their names."""
    if isinstance(argument, list):
        return [_filled(each, values, device) for each in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, what),) = argument.items()
    match kind:
        case "value":
            return values[what]
        case "float":
            return float(what)
        case "device":
            return device
    named = getattr(torch, str(what), None)
    if not isinstance(named, torch.dtype | torch.memory_format):
        raise ModelError(f"a program's arguments must be tensors, numbers and types, got {kind} {what}; import it anew")
    return named
