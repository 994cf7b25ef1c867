"""Import: a network from elsewhere becomes a model of ours, with its tile rule measured."""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from typing import Any

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.location import Location
from pipeline.store.statistics import Normalisation
from pipeline.unet.adopt import Description, adopt
from pipeline.unet.model import Model, save_model
from pipeline.unet.pt2 import read_pt2
from pipeline.unet.settings import Head


def import_program(path: str | os.PathLike[str], *, about: Description, output: int = 0) -> Model:
    """Return the model of a .pt2 file, not saved yet.

    Raises
    ------
    ModelError : there is no such file, or its network cannot be tiled.
    """
    try:
        content = Location(os.fspath(path)).read_bytes()
    except (OSError, ImportError, ValueError) as error:
        cause = type(error).__name__
        raise ModelError(f"a network must be a readable file, got {path} ({cause}); check the path") from error
    exported = read_pt2(content, output=output)
    digest = hashlib.sha256(content).hexdigest()
    record = (*about.record, ("sha256", digest), ("torch", exported.torch_version))
    return adopt(exported, about.of_record(record))


def command(args: Namespace) -> dict[str, Any]:
    """Import what the command line names, save it, and tell what it is."""
    about = Description(
        f"torch.export program {Location(args.network).name}", args.classes, channels=args.channels,
        normalisation=_normalisation(args.normalisation), mean=args.mean, std=args.std,
        voxel_size_um=args.voxel_size_um, head=None if args.head is None else Head(args.head),
    )  # fmt: skip
    model = save_model(import_program(args.network, about=about, output=args.output), args.model)
    return described(model, args.model)


def described(model: Model, path: str) -> dict[str, Any]:
    """Return what was imported as a JSON document."""
    return {
        "model": path, "sha256": model.digest, "network": model.settings.to_json(), "classes": list(model.classes),
        "normalisation": model.normalisation.value, "stride_shape": list(model.rule.stride),
        "halo_shape": list(model.rule.halo), "trim_shape": list(model.rule.trim),
    }  # fmt: skip


def _normalisation(name: str | None) -> Normalisation:
    try:
        return Normalisation(name or "zscore")
    except ValueError:
        raise ArgumentError(
            f"normalisation must be one of {', '.join(Normalisation)}, got {name}; give one of them"
        ) from None
