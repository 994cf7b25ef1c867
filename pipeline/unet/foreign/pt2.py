"""What ``torch.export.save`` writes (.pt2), read without torch's own reader.

``torch.export.load`` of torch 2.13 unpickles (example inputs, and weights of odd kinds, with weights_only=False where
True fails), evaluates the sizes' formulas as Python, and calls whatever function below ``torch`` the file names: a
file may do anything. Here only the graph's JSON and the raw bytes of its tensors are read, and only calls of torch's
tensor operators are taken; what needs more is refused. Sizes' formulas and guards are not read at all.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.unet.foreign.program import Argument, Call, Program, number_of, value_of

SCHEMA = 8
# As torch._export.serde.schema.ScalarType numbers them.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool",
    13: "bfloat16",
}  # fmt: skip
_MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
# What an exported program asserts of its input, and no more.
_ASSERTIONS = ("_assert_", "sym_constrain_range")


@dataclass(frozen=True, slots=True)
class Exported:
    """A program out of a file.

    Attributes
    ----------
    tensors : by the names that the program's state has
    input_shape : of the example that it was exported with, (batch, channels, *spatial)
    torch_version : that wrote it
    """

    program: Program
    tensors: dict[str, Tensor]
    input_shape: tuple[int, ...]
    torch_version: str


def read_pt2(content: bytes, *, output: int = 0) -> Exported:
    """Return the program in the bytes of a .pt2 file.

    Parameters
    ----------
    output : which of several outputs to take, from 0

    Raises
    ------
    ModelError : it is no such file, damaged, of another schema, has pickled parts, or does more than call operators.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read(_Archive(archive), output)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"a program must be an undamaged file of torch.export.save, got {cause}; export and save it anew"
        ) from error


class _Archive:
    """The files of a .pt2, which all lie in one folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._folder = archive.namelist()[0].partition("/")[0]
        if self.read("byteorder") != b"little":
            raise ModelError("a program must have little-endian weights, got others; save it on another machine")

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._folder}/{name}")

    def json(self, name: str) -> Any:  # noqa: ANN401 whatever a file holds
        return json.loads(self.read(name))


def _read(archive: _Archive, output: int) -> Exported:
    document = archive.json("models/model.json")
    if (got := document["schema_version"]["major"]) != SCHEMA:
        raise ModelError(f"a program must be of schema {SCHEMA}, got {got}; export it with torch 2.13, say")
    module = document["graph_module"]
    signature, graph = module["signature"], module["graph"]
    name, state = _inputs(signature["input_specs"])
    kinds = [next(iter(spec)) for spec in signature["output_specs"]]
    if set(kinds) != {"user_output"}:
        raise ModelError(f"a program must change nothing, got {sorted(set(kinds))}; call eval() before torch.export")
    if not 0 <= output < len(kinds):
        raise ModelError(f"a program must have the output asked for, got {output} of {len(kinds)}; give a smaller one")
    calls = tuple(call for node in graph["nodes"] if (call := _call(node)) is not None)
    (result,) = _names(signature["output_specs"][output]["user_output"]["arg"])
    program = Program(name, result, tuple((value, tensor) for value, tensor, _ in state), calls).pruned()
    used = {tensor for _, tensor in program.state}
    constant = {tensor for _, tensor, is_constant in state if is_constant}
    tensors = {**_tensors(archive, "weights", used - constant), **_tensors(archive, "constants", used & constant)}
    shape = tuple(_hint(size) for size in graph["tensor_values"][name]["sizes"])
    if (dtype := _DTYPES.get(graph["tensor_values"][name]["dtype"])) != "float32":
        raise ModelError(f"a program must take float32, got {dtype}; export it with a float32 example")
    return Exported(program, tensors, shape, str(document.get("torch_version") or "unknown"))


def _inputs(specs: list[Any]) -> tuple[str, list[tuple[str, str, bool]]]:
    """Return the input's name, and for each weight value, tensor, and whether it lies among the constants."""
    users, state = [], []
    for spec in specs:
        ((kind, about),) = spec.items()
        match kind:
            case "user_input":
                users += list(_names(about["arg"]))
            case "parameter":
                state.append((about["arg"]["name"], about["parameter_name"], False))
            case "buffer":
                state.append((about["arg"]["name"], about["buffer_name"], not about["persistent"]))
            case "tensor_constant":
                state.append((about["arg"]["name"], about["tensor_constant_name"], True))
            case _:
                raise ModelError(f"a program must take tensors, got {kind}; export a network of one image")
    if len(users) != 1:
        raise ModelError(f"a program must take one image, got {len(users)} inputs; export a network of one input")
    return users[0], state


def _call(node: dict[str, Any]) -> Call | None:
    """Return a node as a call, or None where it only asserts."""
    operator = node["target"].removeprefix("torch.ops.")
    if operator.removeprefix("aten.").startswith(_ASSERTIONS):
        return None
    positional, named = [], {}
    for each in node["inputs"]:
        if each.get("kind", 1) == 2:  # as ArgumentKind.KEYWORD
            named[each["name"]] = _argument(each["arg"])
        else:
            positional.append(_argument(each["arg"]))
    outputs = node["outputs"]
    several = len(outputs) > 1 or any("as_tensors" in each for each in outputs)
    results = tuple(name for each in outputs for name in _names(each))
    if len(outputs) > 1 and any("as_tensors" in each for each in outputs):
        raise ModelError(f"an operator must make values or one list, got both of {operator}; export another network")
    return Call(operator, json.dumps(positional), json.dumps(named), results, several)


def _argument(arg: dict[str, Any]) -> Argument:
    ((kind, value),) = arg.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return value_of(value["name"])
        case "as_tensors":
            return [value_of(each["name"]) for each in value]
        case "as_optional_tensor":
            return _argument(value)
        case "as_optional_tensors" | "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_argument(each) for each in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _argument(value)
        case "as_name":
            return value_of(value)
        case "as_int" | "as_ints" | "as_bool" | "as_bools" | "as_string":
            return value
        case "as_float":
            return number_of(float(value))
        case "as_floats":
            return [number_of(float(each)) for each in value]
        case "as_scalar_type":
            return {"dtype": _DTYPES[value]}
        case "as_memory_format":
            return {"memory_format": _MEMORY_FORMATS[value]}
        case "as_device":
            return {"device": None}
        case "as_layout":
            return None
        case _:
            raise ModelError(f"a program must call operators with tensors and numbers, got {kind}; export without it")


def _names(output: dict[str, Any]) -> Iterator[str]:
    ((kind, value),) = output.items()
    match kind:
        case "as_tensor":
            yield value["name"]
        case "as_tensors":
            yield from (each["name"] for each in value)
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            yield value["as_name"]
        case "as_none":
            yield ""
        case _:
            raise ModelError(f"a program's values must be tensors or sizes, got {kind}; export a network of one image")


def _hint(size: dict[str, Any]) -> int:
    """Return a size of the example input."""
    return int(size["as_int"] if "as_int" in size else size["as_expr"]["hint"]["as_int"])


def _tensors(archive: _Archive, kind: str, names: set[str]) -> dict[str, Tensor]:
    """Return the tensors of these names, from their raw bytes."""
    if not names:
        return {}
    config = archive.json(f"data/{kind}/model_{kind}_config.json")["config"]
    if missing := names - set(config):
        raise ModelError(f"a program's file must hold its {kind}, got none of {sorted(missing)[0]}; save it anew")
    return {name: _tensor(archive, f"data/{kind}/", name, config[name]) for name in sorted(names)}


def _tensor(archive: _Archive, folder: str, name: str, about: dict[str, Any]) -> Tensor:
    meta = about["tensor_meta"]
    if about["use_pickle"] or meta is None or meta["dtype"] not in _DTYPES:
        raise ModelError(f"no pickle is ever loaded, got {name} as one; keep dense tensors of plain numbers alone")
    dtype: torch.dtype = getattr(torch, _DTYPES[meta["dtype"]])
    sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
    if not prod(sizes):
        return torch.zeros(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(archive.read(folder + about["path_name"])), dtype=dtype)
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).contiguous()
