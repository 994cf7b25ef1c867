"""Packages of bioimage.io (model RDF 0.4 and 0.5): a description, weights, and tensors to test them with.

A package's weights are code: a TorchScript archive, or a Python file that makes the network of a state dict. Nothing
of it is run unless the caller trusts it. The network then becomes a program, and must give the package's test output.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import ModelError
from pipeline.store.scaling import USUAL_PERCENTILES, Limits
from pipeline.store.statistics import PERCENTILES, Normalisation
from pipeline.unet.foreign.exporting import exported, exported_script
from pipeline.unet.foreign.pt2 import Exported
from pipeline.unet.settings import Head

TAKEN = ("pytorch_state_dict", "torchscript")
_IGNORED = ("ensure_dtype",)

Read = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a package brings intensities to its network's scale; ``limits`` are those of ``Scaling``."""

    normalisation: Normalisation = Normalisation.NONE
    limits: Limits = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Package:
    """What a description says, of either format.

    Attributes
    ----------
    read : returns the bytes of one of the package's files
    classes : names of the output's channels; empty where it has none
    head : of the postprocessing; None where there is none
    test_input, test_output : shape (1, channels, *spatial), intensities and what comes out; None where there are none
    """

    name: str
    description: dict[str, Any]
    read: Read
    preprocessing: tuple[dict[str, Any], ...]
    classes: tuple[str, ...]
    head: Head | None
    test_input: NDArray[np.float32]
    test_output: NDArray[np.float32] | None

    def program(self, *, trust: bool) -> Exported:
        """Return the network as a program.

        Raises
        ------
        ModelError : its weights are of another format, or nobody trusts them.
        """
        weights = {kind: each for kind, each in (self.description.get("weights") or {}).items() if each}
        kind = next((kind for kind in TAKEN if kind in weights), None)
        if kind is None:
            raise ModelError(
                f"a package's weights must be {' or '.join(TAKEN)}, got {', '.join(sorted(weights)) or 'none'}; "
                "convert them, or export its network with torch.export"
            )
        if not trust:
            raise ModelError(
                f"weights as {kind} come with code that is run once to import them, got no --trust for {self.name}; "
                "look at the package, then add --trust"
            )
        entry, shape = weights[kind], self.test_input.shape
        content = checked(self.read, entry)
        if kind == "torchscript":
            return exported_script(content, shape)
        network = _network(entry, self.read)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(
                f"a package's weights must be those of its network, got {cause}; export the package anew"
            ) from error
        return exported(network, shape)

    def scale(self) -> Preprocessing:
        """Return the preprocessing as one of ours; refuse any other."""
        steps = [step for step in self.preprocessing if _id(step) not in _IGNORED]
        kwargs = [step.get("kwargs") or {} for step in steps]
        match ", ".join(map(_id, steps)):
            case "":
                return Preprocessing()
            case "zero_mean_unit_variance" if kwargs[0].get("mode", "per_sample") != "fixed":
                return Preprocessing(Normalisation.ZSCORE)
            case "zero_mean_unit_variance" | "fixed_zero_mean_unit_variance":
                return Preprocessing(mean=_each(kwargs[0]["mean"]), std=_each(kwargs[0]["std"]))
            case "scale_linear":
                mean, std = _linear(kwargs[0])
                return Preprocessing(mean=_each(mean), std=_each(std))
            case "clip, scale_linear" if all(isinstance(kwargs[0].get(end), int | float) for end in ("min", "max")):
                low, high = float(kwargs[0]["min"]), float(kwargs[0]["max"])
                mean, std = (each / (high - low) for each in _linear(kwargs[1]))
                mean = mean - low / (high - low)
                window = Preprocessing(Normalisation.WINDOW, ((low, high),))
                return window if _is(mean, 0) and _is(std, 1) else replace(window, mean=_each(mean), std=_each(std))
            case "scale_range":
                ends = (float(kwargs[0].get("min_percentile", 0)), float(kwargs[0].get("max_percentile", 100)))
                if ends == (0.0, 100.0):
                    return Preprocessing(Normalisation.RANGE)
                if odd := sorted({*ends} - {0, *PERCENTILES, 100}):
                    raise ModelError(
                        f"a package's percentiles must be those that ingest stores, "
                        f"{', '.join(f'{p:g}' for p in PERCENTILES)}, got {odd[0]:g}; say --normalisation percentile "
                        "for 1 and 99"
                    )
                return Preprocessing(Normalisation.PERCENTILE, () if ends == USUAL_PERCENTILES else (ends,))
        raise ModelError(
            "a package's preprocessing must be one of zero_mean_unit_variance, scale_range, scale_linear, and clip "
            f"before scale_linear, got {', '.join(map(_id, steps))}; say what comes near it with --normalisation"
        )


def package_of(description: Any, read: Read) -> Package:  # noqa: ANN401 whatever a file holds
    """Return what a description says.

    Raises
    ------
    ModelError : it is no model of one image, or of another format.
    """
    if not isinstance(description, dict) or description.get("type", "model") != "model":
        raise ModelError("a package must describe a model of bioimage.io, got something else; check the path")
    version = str(description.get("format_version"))
    if not version.startswith(("0.4", "0.5")):
        raise ModelError(f"a package must be of model RDF 0.4 or 0.5, got {version}; update it with bioimageio.spec")
    inputs, outputs = description.get("inputs") or [], description.get("outputs") or []
    if len(inputs) != 1 or not outputs:
        raise ModelError(f"a network must have one input, got {len(inputs)}; import another model")
    axes = _axes(inputs[0]["axes"])
    if axes not in ("bcyx", "bczyx"):
        raise ModelError(f"a network must take axes bcyx or bczyx, got {axes}; export it with torch.export")
    ends = [inputs[0].get("test_tensor"), outputs[0].get("test_tensor")]
    if version.startswith("0.4"):
        ends = [(description.get(each) or [None])[0] for each in ("test_inputs", "test_outputs")]
    if ends[0] is None:
        raise ModelError(
            "a package must have a test input, which says the network's size, got none; add one with bioimageio.spec"
        )
    return Package(
        str(description.get("name", "a model")), description, read, tuple(inputs[0].get("preprocessing") or ()),
        _channels(outputs[0]["axes"]), _head(outputs[0].get("postprocessing") or ()), _array(read, ends[0]),
        None if ends[1] is None else _array(read, ends[1]),
    )  # fmt: skip


def checked(read: Read, entry: dict[str, Any] | str) -> bytes:
    """Return a file of the package; refuse one that is not what the description says."""
    source = entry if isinstance(entry, str) else str(entry["source"])
    content, digest = read(source), None if isinstance(entry, str) else entry.get("sha256")
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise ModelError(f"a package's files must be those described, got another {source}; download it anew")
    return content


def _array(read: Read, entry: dict[str, Any] | str) -> NDArray[np.float32]:
    try:
        return np.asarray(np.load(io.BytesIO(checked(read, entry)), allow_pickle=False), np.float32)
    except (ValueError, EOFError) as error:
        raise ModelError(
            f"a package's test tensors must be .npy files of numbers, got {error}; download it anew"
        ) from error


def _id(step: dict[str, Any]) -> str:
    return str(step.get("id", step.get("name")))


def _each(values: Any) -> tuple[float, ...]:  # noqa: ANN401 a number or some
    return tuple(float(v) for v in np.atleast_1d(np.asarray(values)))


def _linear(kwargs: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return gain and offset as what is subtracted and then divided by."""
    gain, offset = np.broadcast_arrays(kwargs.get("gain", 1.0), kwargs.get("offset", 0.0))
    return -offset / gain, 1 / gain


def _is(values: NDArray[np.float64], number: float) -> bool:
    return bool(np.allclose(values, number, rtol=0, atol=1e-6))


def _axes(axes: Any) -> str:  # noqa: ANN401 a word in 0.4, a list in 0.5
    if isinstance(axes, str):
        return axes
    return "".join({"batch": "b", "channel": "c"}.get(each["type"], str(each.get("id", "?"))) for each in axes)


def _channels(axes: Any) -> tuple[str, ...]:  # noqa: ANN401
    if isinstance(axes, str):
        return ()
    return tuple(str(name) for each in axes for name in each.get("channel_names", ()) if each["type"] == "channel")


def _head(steps: Any) -> Head | None:  # noqa: ANN401
    names = [_id(step) for step in steps if _id(step) not in _IGNORED]
    if not names:
        return None
    if names[0] not in set(Head):
        raise ModelError(
            f"a package's postprocessing must be softmax or sigmoid, got {', '.join(names)}; export the network without"
        )
    return Head(names[0])


def _network(entry: dict[str, Any], read: Read) -> nn.Module:
    """Return the network of a state dict, by running the code that the description names."""
    architecture = entry["architecture"]
    if isinstance(architecture, str):  # 0.4: "file.py:Class" or "library.Class"
        source, _, name = architecture.rpartition(":") if ":" in architecture else architecture.rpartition(".")
        about = {"sha256": entry.get("architecture_sha256"), "kwargs": entry.get("kwargs"), "callable": name}
        architecture = about | ({"source": source} if ":" in entry["architecture"] else {"import_from": source})
    try:
        if "source" in architecture:
            module = ModuleType("haloseg_package")
            exec(compile(checked(read, architecture), architecture["source"], "exec"), module.__dict__)
        else:
            module = import_module(architecture["import_from"])
        network = getattr(module, architecture["callable"])(**(architecture.get("kwargs") or {}))
    except ModelError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"a package's code must make its network, got {cause}; install what it needs") from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"a package's code must make a torch module, got {type(network).__name__}; mend its description"
        )
    return network
