"""Import: a network from elsewhere becomes a model of ours, with its tile rule measured."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from argparse import Namespace
from dataclasses import replace
from typing import Any

import yaml

from pipeline.errors import ArgumentError, ModelError
from pipeline.replacing import save_new
from pipeline.store.location import Location
from pipeline.store.shelf import to_be_written
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.adopt import Description, adopt
from pipeline.unet.foreign.bioimageio import Package, package_of
from pipeline.unet.foreign.pt2 import read_pt2
from pipeline.unet.foreign.rdf import check_test_output
from pipeline.unet.foreign.smp import smp_program
from pipeline.unet.model import Model
from pipeline.unet.settings import Head


def import_program(path: str | os.PathLike[str], *, about: Description, output: int = 0) -> Model:
    """Return the model of a .pt2 file, not saved yet.

    Raises
    ------
    ModelError : there is no such file, or its network cannot be tiled.
    """
    content = _content(os.fspath(path))
    exported = read_pt2(content, output=output)
    digest = hashlib.sha256(content).hexdigest()
    record = (*about.record, ("sha256", digest), ("torch", exported.torch_version))
    return adopt(exported, replace(about, record=record))


def _content(path: str) -> bytes:
    try:
        return Location(path).read_bytes()
    except (OSError, ImportError, ValueError) as error:
        cause = type(error).__name__
        raise ModelError(f"a network must be a readable file, got {path} ({cause}); check the path") from error


def import_package(path: str, *, about: Description, trust: bool) -> Model:
    """Return the model of a bioimage.io package, a .zip or its rdf.yaml, not saved yet.

    Parameters
    ----------
    about : what it says goes before what the package says; its source and record do not
    trust : run the code that comes with the weights

    Raises
    ------
    ModelError : the description does not suffice, nobody trusts it, or the test output does not come out.
    """
    package = open_package(path)
    exported = package.program(trust=trust)
    scale = package.scale() if about.normalisation is None else None
    filled = replace(
        about, source=f"bioimage.io package {package.name}", head=about.head or package.head,
        record=(("package", package.name), ("torch", exported.torch_version)),
    )  # fmt: skip
    if scale is not None:
        n = exported.input_shape[1]
        mean, std = (each * n if len(each) == 1 else each for each in (scale.mean, scale.std))
        filled = replace(
            filled, normalisation=scale.normalisation, limits=scale.limits, mean=about.mean or mean,
            std=about.std or std,
        )  # fmt: skip
    model = adopt(exported, filled)
    model = _named(model, package.classes) if not about.classes else model
    if scale is not None and package.test_output is not None:
        check_test_output(model, package)
    return model


def _named(model: Model, names: tuple[str, ...]) -> Model:
    """Return the model with the names of the package's output channels, if they are as many."""
    classes = names if model.settings.head is Head.SOFTMAX else ("none", *names)
    fits = len(names) == model.settings.n_classes and len(set(classes)) == len(classes)
    return replace(model, classes=classes) if fits else model


def open_package(path: str) -> Package:
    """Return the package at a path."""
    try:
        content = Location(path).read_bytes()
        if path.endswith(".zip"):
            files = zipfile.ZipFile(io.BytesIO(content))
            names = [name for name in files.namelist() if name.endswith(("rdf.yaml", "bioimageio.yaml"))]
            return package_of(yaml.safe_load(files.read(names[0])), files.read)
        return package_of(yaml.safe_load(content), lambda name: _beside(path, name))
    except (OSError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile, yaml.YAMLError) as error:
        cause = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ModelError(
            f"a package must be a .zip or rdf.yaml of bioimage.io, got {path}: {cause}; download it anew"
        ) from error


def _beside(path: str, name: str) -> bytes:
    """Return a file of the description's own folder."""
    if "://" in name or ".." in name.split("/") or name.startswith("/"):
        raise ModelError(f"a package's files must lie beside its rdf.yaml, got {name}; download the package as .zip")
    return (Location(path).parent / name).read_bytes()


def command(args: Namespace) -> dict[str, Any]:
    """Import what the command line names, save it, and tell what it is."""
    given = None if args.normalisation is None else _normalisation(args.normalisation)
    about = Description(
        f"torch.export program {Location(args.network).name}", args.classes, channels=args.channels,
        normalisation=given, mean=args.mean, std=args.std, output_mean=args.output_mean,
        output_std=args.output_std, voxel_size_um=args.voxel_size_um,
        head=None if args.head is None else Head(args.head),
    )  # fmt: skip
    if args.network.startswith("smp:"):
        model = _import_smp(args, about)
    elif args.network.endswith((".zip", ".yaml", ".yml")):
        model = import_package(args.network, about=about, trust=args.trust)
    else:
        model = import_program(args.network, about=about, output=args.output)
    with to_be_written(args.model) as path:
        return described(save_new(model, path), path)


def _import_smp(args: Namespace, about: Description) -> Model:
    """Return the model of a network of segmentation-models-pytorch."""
    name = args.network.removeprefix("smp:")
    if not args.encoder or not args.weights:
        raise ArgumentError("a network of smp needs --encoder and --weights, got none; --weights random tries it out")
    weights = None if args.weights == "random" else _content(args.weights)
    program = smp_program(
        name, encoder=args.encoder, in_channels=args.in_channels, n_classes=args.n_classes, weights=weights
    )
    source = f"segmentation-models-pytorch {name}, {args.encoder}"
    return adopt(program, replace(about, source=source, record=(("weights", Location(args.weights).name),)))


def described(model: Model, path: str) -> dict[str, Any]:
    """Return what was imported as a JSON document."""
    return {
        "model": path, "sha256": model.digest, "network": model.settings.to_json(), "classes": list(model.classes),
        "normalisation": model.normalisation.value, "stride_shape": list(model.rule.stride),
        "halo_shape": list(model.rule.halo), "trim_shape": list(model.rule.trim),
    }  # fmt: skip


def _normalisation(name: str) -> Normalisation:
    try:
        return Normalisation(name)
    except ValueError:
        raise ArgumentError(
            f"normalisation must be one of {', '.join(Normalisation)}, got {name}; give one of them"
        ) from None
