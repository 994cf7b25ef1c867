"""Shelf: trained models by name and version, ``models/NAME/VERSION.safetensors`` in a folder or a bucket.

Wherever a model is asked for, its path will do as well as its name: ``cells`` is the newest version, ``cells@2`` that
one. Versions count from 1; none is ever written over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.lease import held
from pipeline.store.location import Location, check_ours

VARIABLE = "HALOSEG_MODELS"
ENDING = ".safetensors"
_LENGTH = 8  # bytes of a .safetensors file that tell how long the JSON object is which follows
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)(?:@(\d+))?")


def model_path(model: str) -> str:
    """Return the path of a model that is told by path, or by name, alone or with ``@VERSION``.

    Raises
    ------
    ModelError : there is no model of this name or version.
    """
    if (named := _named(model)) is None:
        return model
    name, version = named
    if not (there := _versions(name)):
        known = ", ".join(_names()) or "none"
        raise ModelError(f"a model must be a file or a name in {_root()} ({known}), got {model}; check it")
    if version is not None and version not in there:
        raise ModelError(f"versions of {name} in {_root()} are {', '.join(map(str, there))}, got {model}; choose one")
    return str(_root() / name / f"{there[-1] if version is None else version}{ENDING}")


def called(path: str) -> str:
    """Return what a model file is called: its name without the ending, ``cells-1`` of ``cells/1.safetensors``."""
    file = Location(path)
    stem = file.name.removesuffix(ENDING)
    return f"{file.parent.name}-{stem}" if stem.isdigit() else stem


@contextmanager
def to_be_written(model: str) -> Iterator[str]:
    """Yield where a model is to be written: at its path, or, told by name, as the next version, for this run alone.

    Raises
    ------
    ArgumentError : the name has a version, or a folder or a file of another kind lies at the path.
    TakenError : another run is making a model of this name.
    """
    if (named := _named(model)) is None:
        _check_file(model)
        yield model
        return
    name, version = named
    if version is not None:
        raise ArgumentError(f"a new model takes the next version of its name, got {model}; use {name}")
    with held((_root() / name).absolute(), what="a model"):
        there = _versions(name)
        yield str(_root() / name / f"{there[-1] + 1 if there else 1}{ENDING}")


def _check_file(model: str) -> None:
    """Refuse to write a model where a folder is, or over a file of a disk that is none."""
    location = Location(model)
    if location.is_local and Path(location.url).is_dir():
        raise ArgumentError(f"a model must be a file, got the folder {model}; name a file, such as cells{ENDING}")
    if location.is_local:
        check_ours(Path(location.url), rule="a model must not replace a file of another kind", mark=b"{", at=_LENGTH)


def _named(model: str) -> tuple[str, int | None] | None:
    """Return name and version, or None for what is a path: has a slash, ends as model files do, or is there."""
    found = _NAME.fullmatch(model)
    if found is None or model.endswith(ENDING) or Location(model).exists():
        return None
    return found[1], int(found[2]) if found[2] else None


def _root() -> Location:
    return Location(os.environ.get(VARIABLE) or "models")


def _names() -> list[str]:
    return [each.name for each in _root().entries() if each.is_folder] if _root().exists() else []


def _versions(name: str) -> list[int]:
    """Return the versions of a name, ascending."""
    folder = _root() / name
    stems = [each.name.removesuffix(ENDING) for each in folder.entries()] if folder.exists() else []
    return sorted(int(stem) for stem in stems if stem.isdigit())
