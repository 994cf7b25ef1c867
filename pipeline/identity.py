"""Identity: what tells a scan from others, and from its own later versions, without reading it."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan
from pipeline.scans.registry import is_remote_file
from pipeline.store.location import Location

_STAMPS = ("name", "n_bytes", "time_of_change")
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
    if files := (_remote_files(path) if "://" in path else _local_files(path)):
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        about |= {"n_bytes": sum(n_bytes for _, n_bytes, _ in files), "time_of_change": digest}
    return about


def open_identified(scan: str) -> tuple[xr.DataArray, dict[str, Any]]:
    """Return a scan and its identity, which are of one version of it."""
    before, array = stamps(scan), open_scan(scan)
    about = identity(scan, array)
    check_unchanged(scan, before)
    return array, about


def file_stamps(scan: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the stamps in a scan's identity where they are of one file, which can be compared at any time."""
    path = str(scan).partition("::")[0]
    one = is_remote_file(path) if "://" in path else Path(path).is_file()
    return {key: about[key] for key in _STAMPS if key in about} if one else None


@contextmanager
def unchanged(scan: str, stamps: Mapping[str, Any] | None) -> Iterator[None]:
    """See that what the block reads is of the scan as it was, also where it seems damaged; see check_unchanged."""
    try:
        yield
    finally:
        if stamps is not None:
            check_unchanged(scan, stamps)


def check_unchanged(scan: str, before: Mapping[str, Any]) -> None:
    """Refuse a scan that was written anew since ``before``, its stamps or identity; what was read may be of two.

    Raises
    ------
    ScanError : it is another version now, or gone.
    """
    now = stamps(scan)
    if now != {key: before.get(key) for key in now} or ("n_bytes" in before and "n_bytes" not in now):
        raise ScanError(
            f"a scan must stay as it is while it is copied, got another version of {scan} than at the start; let it "
            "come to rest and run the same command again"
        )


def _local_files(path: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of change, in nanoseconds, of each file of a scan."""
    stats = [(file.name, file.stat()) for file in _files(path)]
    return [(name, each.st_size, each.st_mtime_ns) for name, each in stats]


def _remote_files(url: str) -> list[tuple[str, int, str]]:
    """Return name, size and tag, or time of change, of each file of a scan; none where storage tells neither.

    A scan in one file is asked for by its name, at the price of one request: this is done after every block.
    """
    scan = Location(url)
    try:
        several = [] if is_remote_file(url) else [each for each in scan.entries() if not each.is_folder]
        entries = several or [scan.entry()]
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
