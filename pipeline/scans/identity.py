"""Identity: what tells a scan from others, and from its own later versions, without reading it."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import xarray as xr

_LEFT_BY_BROWSERS = {".DS_Store", "Thumbs.db"}


def identity(scan: str, array: xr.DataArray) -> dict[str, Any]:
    """Return what tells a scan from others and from its own later versions, without reading it.

    Of a local one its files' names, sizes and times of change, as make and rsync go by; of a remote one its URL.
    """
    about = {"format": array.attrs.get("format", "unknown"), "shape": list(array.shape), "dtype": str(array.dtype)}
    return stamps(scan) | about


def stamps(scan: str) -> dict[str, Any]:
    """Return the part of a scan's identity that is known without opening it."""
    path, _, inner = str(scan).partition("::")
    about: dict[str, Any] = {
        "name": (path if "://" in path else path.rstrip("/").rsplit("/", 1)[-1]) + (f"::{inner}" if inner else "")
    }
    if files := _files(path):
        stats = [file.stat() for file in files]
        each_of = [[file.name, each.st_size, each.st_mtime_ns] for file, each in zip(files, stats, strict=True)]
        digest = hashlib.sha256(json.dumps(each_of).encode()).hexdigest()
        about |= {"n_bytes": sum(each.st_size for each in stats), "time_of_change": digest}
    return about


def _files(path: str) -> list[Path]:
    """Return the files that a local scan is made of: itself, those of its glob, or those right in its folder."""
    file = Path(path)
    if file.is_dir():
        return sorted(each for each in file.iterdir() if each.is_file() and each.name not in _LEFT_BY_BROWSERS)
    return [file] if file.is_file() else sorted(map(Path, glob.glob(path)))  # noqa: PTH207 absolute patterns
