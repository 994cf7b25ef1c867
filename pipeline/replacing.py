"""Replacing: a model is kept where the same run is to write it again; another one is never written over it."""

from __future__ import annotations

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.location import Location, storage_errors
from pipeline.unet.model import Model, as_saved, load_model, save_model


def model_at(path: str) -> Model | None:
    """Return the model that lies where one is to be written; None where nothing does.

    Raises
    ------
    ArgumentError : something else lies there, or what is left of a model.
    """
    location = Location(path)
    with storage_errors(location.parent):
        if not location.exists() or not location.entry().n_bytes:
            return None
    try:
        return load_model(path)
    except ModelError as error:
        raise in_the_way(path, why="which is no model, or damaged") from error


def save_new(model: Model, path: str) -> Model:
    """Write a model where none lies yet, and return it with the digest of its file; the same one is left as it is.

    Raises
    ------
    ArgumentError : another model lies there.
    """
    there, made = model_at(path), as_saved(model)
    if there is None:
        return save_model(model, path)
    if there.digest != made.digest:
        raise in_the_way(path, why="which is another model")
    return there


def in_the_way(path: str, *, why: str) -> ArgumentError:
    """Return the error of a model that is to be written where something else lies."""
    return ArgumentError(f"a model must not replace another file, got {path}, {why}; name a new file, or delete that")
