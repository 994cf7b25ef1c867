"""Ensemble: several networks that were trained alike become one model, whose result is the mean of theirs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.errors import ArgumentError, ModelError
from pipeline.replacing import save_new
from pipeline.store.location import Location
from pipeline.store.shelf import called, model_path, to_be_written
from pipeline.unet.families import name_of
from pipeline.unet.foreign.network import ForeignSettings
from pipeline.unet.members import together
from pipeline.unet.model import Model, load_model
from pipeline.unet.settings import UNetSettings

# What must be the same, and how it is called where it is not.
_ALIKE = {
    "classes": "classes", "class_values": "class values", "normalisation": "normalisation", "limits": "limits",
    "channels": "channels", "voxel_size_um": "voxel size in um", "input_windows": "scaling of images",
    "target_windows": "scaling of targets",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Member:
    """A model, and where it was found."""

    path: str
    model: Model


def ensemble(models: Sequence[str]) -> Model:
    """Return the model of several networks, not saved yet: its result is the mean of their probabilities, or values.

    Each counts alike, and their order decides nothing but the last bit of a sum. The record of each one's training is
    kept.

    Parameters
    ----------
    models : paths or URLs of models of one network each

    Raises
    ------
    ArgumentError : they are fewer than two, or one is there twice.
    ModelError : one is no model, an ensemble itself, or from elsewhere, or they differ in more than their weights.
    """
    if len(models) < 2:
        raise ArgumentError(f"an ensemble needs two models or more, got {len(models)}; name the others, too")
    members = [_Member(path, load_model(path)) for path in models]
    for each in members:
        _check_alone(each)
    for first, second in combinations(members, 2):
        _check_pair(first, second)
    return joined([each.model for each in members], names=[called(path) for path in models], made_by="haloseg ensemble")


def joined(models: Sequence[Model], *, names: Sequence[str], made_by: str) -> Model:
    """Return the model of several, not saved yet, which have a network each and differ in their weights alone."""
    record = [
        {"model": name, "sha256": each.digest, "training": each.training}
        for name, each in zip(names, models, strict=True)
    ]  # fmt: skip
    made = {
        "made_by": made_by, "members": record,
        "versions": {package: version(package) for package in ("haloseg", "torch", "numpy")},
    }  # fmt: skip
    weights = together([each.weights for each in models])
    return replace(models[0], weights=weights, training=made, n_networks=len(models), digest="")


def _check_alone(member: _Member) -> None:
    """Refuse a member that is not one network of ours."""
    model, path = member.model, member.path
    if isinstance(model.settings, ForeignSettings):
        raise ModelError(
            f"an ensemble must be of networks of ours, got one from elsewhere, {model.settings.source}, in {path}; "
            "leave it out"
        )
    if model.n_networks > 1:
        raise ModelError(
            f"a member must be a single network, since each counts alike, got an ensemble of {model.n_networks} in "
            f"{path}; name its members instead"
        )


def _check_pair(first: _Member, second: _Member) -> None:
    """Refuse two members that are the same, or differ in more than their weights."""
    if first.model.digest == second.model.digest:
        raise ArgumentError(
            f"each model must be there once, got the same file twice, {first.path} and {second.path}; leave one out"
        )
    if differences := _differences(first.model, second.model):
        raise ModelError(
            f"members of an ensemble must differ in their weights alone, got {'; '.join(differences)} in {first.path} "
            f"and {second.path}; train them by the same recipe"
        )


def _differences(one: Model, other: Model) -> list[str]:
    """Return what differs between two models, weights and training aside."""
    pairs = [
        *((field.name, getattr(one.settings, field.name), getattr(other.settings, field.name))
          for field in fields(UNetSettings)),
        *((told, getattr(one, name), getattr(other, name)) for name, told in _ALIKE.items()),
    ]  # fmt: skip
    return [f"{name} {_told(a)} and {_told(b)}" for name, a, b in pairs if a != b]


def _told(value: Any) -> str:  # noqa: ANN401 fields differ in type
    """Return a field's value as people read it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_told, value))})"
    return str(value)


def members_told(model: Model) -> list[dict[str, Any]]:
    """Return which models an ensemble was made of, and how good each was on what it was validated on."""
    members = model.training.get("members", []) if model.n_networks > 1 else []
    return [{"member": each["model"], "sha256": each["sha256"], **figures_of(each["training"])} for each in members]


def figures_of(training: dict[str, Any]) -> dict[str, Any]:
    """Return how good a network was on what it was validated on, by the record of its training."""
    best = training.get("best", {})
    name, told = ("dice", "validation_dice") if best.get("dice") else ("psnr", "validation_psnr_db")
    return {"validation_loss": best.get("loss"), told: best.get(name)}


def kind_of(model: Model) -> str:
    """Return what a model is called, such as "mean of 5 networks, each a 3-D U-Net"."""
    name = name_of(model.settings)
    return name if model.n_networks == 1 else f"mean of {model.n_networks} networks, each a {name}"


def command(args: Namespace) -> dict[str, Any]:
    """Make the ensemble that the command line names, save it, and tell what it is."""
    paths = [model_path(each) for each in args.models]
    model = ensemble(paths)
    with to_be_written(args.model) as path:
        if _resolved(path) in map(_resolved, paths):
            raise ArgumentError(f"an ensemble must not take its member's place, got {path}; name another file")
        saved = save_new(model, path)
    return {
        "model": path, "sha256": saved.digest, "kind": kind_of(saved), "networks": saved.n_networks,
        "classes": list(saved.classes), "members": members_told(saved),
    }  # fmt: skip


def _resolved(path: str) -> str:
    """Return the one path of a file, dots and links followed; a URL as it is."""
    location = Location(path).absolute()
    return str(Path(location.url).resolve()) if location.is_local else location.url
