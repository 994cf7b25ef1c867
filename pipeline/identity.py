"""Identity: what tells a scan from others, and from its own later versions, without reading it."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import xarray as xr

from pipeline.store.location import Location

_LEFT_BY_BROWSERS = {".DS_Store", "Thumbs.db"}


def identity(scan: str, array: xr.DataArray) -> dict[str, Any]:
    """Return what tells a scan from others and from its own later versions, without reading it.

    Of a local one its files' names, sizes and times of change, as make and rsync go by; of a remote one its URL and,
    where storage tells them, its files' sizes and tags (ETag, of their content) or times of change.
    """
    about = {"format": array.attrs.get("format", "unknown"), "shape": list(array.shape), "dtype": str(array.dtype)}
    return stamps(scan) | about


def stamps(scan: str) -> dict[str, Any]:
    """Return the part of a scan's identity that is known without opening it."""
    path, _, inner = str(scan).partition("::")
    about: dict[str, Any] = {
        "name": (path if "://" in path else path.rstrip("/").rsplit("/", 1)[-1]) + (f"::{inner}" if inner else "")
    }
    if files := (_remote_files(Location(path)) if "://" in path else _local_files(path)):
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        about |= {"n_bytes": sum(n_bytes for _, n_bytes, _ in files), "time_of_change": digest}
    return about


def _local_files(path: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of change, in nanoseconds, of each file of a scan."""
    stats = [(file.name, file.stat()) for file in _files(path)]
    return [(name, each.st_size, each.st_mtime_ns) for name, each in stats]


def _remote_files(scan: Location) -> list[tuple[str, int, str]]:
    """Return name, size and tag, or time of change, of each file of a scan; none where storage tells neither."""
    try:
        entries = [each for each in scan.entries() if not each.is_folder] or [scan.entry()]
    except (FileNotFoundError, NotImplementedError):
        return []
    tagged = [(each.name, each.n_bytes, each.tag or str(each.changed_s or "")) for each in entries]
    return tagged if all(tag for _, _, tag in tagged) else []


def _files(path: str) -> list[Path]:
    """Return the files that a local scan is made of: itself, those of its glob, or those right in its folder."""
    file = Path(path)
    if file.is_dir():
        return sorted(each for each in file.iterdir() if each.is_file() and each.name not in _LEFT_BY_BROWSERS)
    return [file] if file.is_file() else sorted(map(Path, glob.glob(path)))  # noqa: PTH207 absolute patterns
