"""Whole: files that are there at once or not at all."""

from __future__ import annotations

import os
from glob import escape
from pathlib import Path
from uuid import uuid4

from pipeline.store.location import Location, storage_errors


def write_whole(path: str, content: bytes) -> None:
    """Write a file at a path or URL, so that readers and a killed run leave the old or the new one, whole.

    Raises
    ------
    StorageError : the disk is full, the folder may not be written, or storage does not answer.
    """
    location = Location(path)
    with storage_errors(location.parent):
        if location.is_local:
            _replace(Path(location.url), content)
        else:
            location.write_bytes(content)  # an object store puts it at once


def remove_whole(path: str) -> None:
    """Delete a file at a path or URL, and what killed runs left of writing it; nothing happens where nothing lies."""
    location = Location(path)
    with storage_errors(location.parent):
        location.delete()
        if location.is_local:
            for left in Path(location.parent.url).glob(f".{escape(location.name)}.*.partial"):
                left.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
