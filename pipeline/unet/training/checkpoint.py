"""Checkpoint: a training on disk, from which the same command goes on after it was killed. No pickle is ever loaded.

A .safetensors file whose metadata holds one JSON document under ``haloseg`` and the SHA-256 of it and all tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.location import Location, storage_errors
from pipeline.unet.training.course import Validation
from pipeline.unet.training.learner import below

FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A training after a validation.

    Attributes
    ----------
    elapsed_s : time spent in this run and in those that it went on from
    curve : all validations, the last one of this moment
    state : see ``Learner.state``
    best : the weights of lowest validation loss
    """

    elapsed_s: float
    curve: tuple[Validation, ...]
    state: dict[str, Tensor]
    best: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """Where a training is kept while it runs.

    Attributes
    ----------
    path : path or URL
    run : settings that must be the same for a run to go on, a JSON object
    """

    path: str
    run: dict[str, Any]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in place of the one before, at once or not at all."""
        tensors = {f"state.{name}": tensor.contiguous() for name, tensor in checkpoint.state.items()}
        tensors |= {f"best.{name}": tensor.contiguous() for name, tensor in checkpoint.best.items()}
        curve = [asdict(each) for each in checkpoint.curve]
        document = {"format": FORMAT, "run": self.run, "elapsed_s": checkpoint.elapsed_s, "curve": curve}
        text = json.dumps(document, sort_keys=True, allow_nan=False)
        content = save_tensors(tensors, {"haloseg": text, "sha256": _digest(text, tensors)})
        Location(self.path).write_bytes(content)

    def load(self) -> Checkpoint | None:
        """Return the checkpoint of this run; None where there is none.

        Raises
        ------
        ModelError : the file is damaged.
        ArgumentError : it is of another run.
        """
        location = Location(self.path)
        with storage_errors(location.parent):
            if not location.exists():
                return None
            content = location.read_bytes()
        try:
            document, tensors = _opened(content)
            curve = tuple(Validation(**each | {"dice": tuple(each["dice"])}) for each in document["curve"])
            run, elapsed_s = dict(document["run"]), float(document["elapsed_s"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise ModelError(
                f"a checkpoint must be undamaged and written by haloseg, got {self.path}: {cause}; delete it to begin "
                "anew"
            ) from error
        self._check_same(run)
        return Checkpoint(elapsed_s, curve, below("state.", tensors), below("best.", tensors))

    def remove(self) -> None:
        """Delete the file; nothing happens where there is none."""
        with storage_errors(Location(self.path).parent):
            Location(self.path).delete()
            Location(self.path).delete_leftovers()

    def _check_same(self, run: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings."""
        if differing := difference(self.run, run, path=self.path):
            raise ArgumentError(
                f"a training goes on with the settings it began with, got {differing}; use those, or delete the file "
                "to begin anew"
            )


def _opened(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return document and tensors of a file whose digest is right."""
    tensors = load_tensors(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = header["__metadata__"]
    if _digest(about["haloseg"], tensors) != about["sha256"]:
        raise ValueError("its SHA-256 is not that of its content")
    document = json.loads(about["haloseg"])
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']}, not {FORMAT}")
    return document, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a text and of all tensors by their names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def difference(here: dict[str, Any], there: dict[str, Any], *, path: str) -> str:
    """Return the first setting in which a run differs from that of a file, and how many more do; empty if none does."""
    ours, theirs = dict(_leaves(json.loads(json.dumps(here)))), dict(_leaves(there))
    differing = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    if not differing:
        return ""
    name, *others = differing
    more = f" and {len(others)} more" if others else ""
    return f"{name} {ours.get(name)!r}{more} where {path} has {theirs.get(name)!r}"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 whatever JSON holds
    """Yield the settings in a JSON value with dotted names."""
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
