"""Listing: what lies below a folder or prefix, and when it was last changed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import time

from fsspec.utils import glob_translate

from pipeline.errors import ArgumentError, PipelineError
from pipeline.scans.files import may_be_dicom
from pipeline.scans.registry import is_dicom, is_dicom_volume
from pipeline.store.location import Entry, Location


def pattern_of(glob: str) -> re.Pattern[str]:
    """Return what the relative paths that a glob means match."""
    try:
        return re.compile(glob_translate(glob))
    except (ValueError, re.error) as error:
        raise ArgumentError(f"a pattern must be a glob such as **/*.tif, got {glob!r}: {error}") from error


def matching(root: Location, pattern: str) -> tuple[dict[str, Entry], list[str]]:
    """Return what lies below a folder and is meant by a pattern, by its relative path; and the names of what cannot be.

    Of DICOM files that lie together each is a slice, and their folder is meant, but those of many frames are volumes.
    The root itself is none.
    """
    globs, others = [pattern_of(each.strip()) for each in pattern.split(",")], list[str]()
    folders, found, slices = dict[str, Entry](), dict[str, Entry](), defaultdict[str, list[str]](list)
    for relative, entry in walk(root, "", seen=set(), others=others):
        if relative.endswith("/"):
            folders[relative] = entry
        if any(each.fullmatch(relative) for each in globs):
            found[relative] = entry
            if root.is_local and not entry.is_folder and may_be_dicom(entry.name) and _is_dicom(root / relative):
                slices[relative[: -len(entry.name)]].append(relative)
    for folder, together in slices.items():
        files = _slices(root, together, found)
        if len(files) < len(together):
            found.pop(folder, None)
        if not files or (len(files) == 1 and folder not in found):
            continue
        for each in files:
            del found[each]
        if folder:
            found[folder] = folders[folder]
        else:
            others += [f"{each} (a DICOM slice; move those of a series into a folder)" for each in files]
    return found, others


def _slices(root: Location, files: list[str], found: dict[str, Entry]) -> list[str]:
    """Return the DICOM files of a folder that are no volumes of their own; if the largest is none, none is."""
    if not is_dicom_volume(str(root / max(files, key=lambda each: found[each].n_bytes))):
        return files
    return [each for each in files if not is_dicom_volume(str(root / each))]


def _is_dicom(file: Location) -> bool:
    try:
        return is_dicom(str(file))
    except OSError:
        return False


def walk(folder: Location, relative: str, *, seen: set[str], others: list[str]) -> Iterator[tuple[str, Entry]]:
    """Yield what lies below a folder by its relative path, folders with a slash; a Zarr is not looked into."""
    real = str(Path(folder.url).resolve()) if folder.is_local else folder.url
    if real in seen:
        return
    seen.add(real)
    try:
        entries = folder.entries()
    except (OSError, PipelineError) as error:
        others.append(f"{relative or folder.url} ({type(error).__name__})")
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.endswith(".lease"):
            continue
        inside = f"{relative}{entry.name}"
        if not entry.is_folder or entry.name.endswith(".zarr"):
            yield inside, entry
        else:
            yield f"{inside}/", entry
            yield from walk(folder / entry.name, f"{inside}/", seen=seen, others=others)


def changed_s(path: Location) -> float | None:
    """Return when a file, or the newest of those in a folder, was last changed; of a Zarr all of what is below counts.

    A time to come, of an instrument whose clock is ahead, counts as the time at which the file came here.
    """
    if not path.is_local:
        return max((entry.changed_s for entry in path.below()), default=None)
    file, now, newest = Path(path.url), time(), None
    deep = path.name.endswith(".zarr")
    inside = iter([file])
    if file.is_dir():
        inside = file.rglob("*") if deep else file.iterdir()
    for each in inside:
        try:
            about = each.stat()
        except OSError:
            continue
        if deep or each.is_file():
            changed = about.st_mtime if about.st_mtime <= now else about.st_ctime
            newest = changed if newest is None else max(newest, changed)
    return newest
