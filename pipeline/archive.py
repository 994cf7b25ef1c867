"""Archive: the scans under a folder or prefix, what has become of each, and in which order the rest is to be done.

What has been done is told by the published labels alone; there is no list beside them that could be wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from pathlib import Path, PurePosixPath
from time import time

from fsspec.utils import glob_translate

from pipeline.config import Precision
from pipeline.errors import ArgumentError, ScanError, StoreError
from pipeline.plan import fingerprint
from pipeline.scans.identity import stamps
from pipeline.scans.registry import format_of
from pipeline.segment import image_beside
from pipeline.store.image import read_image
from pipeline.store.labels import check_name, published, read_labels
from pipeline.store.lease import holder
from pipeline.store.location import Entry, Location
from pipeline.unet.model import Model, load_model

log = logging.getLogger("haloseg")

_OURS = (".lease", ".haloseg.zarr", ".partial")


class State(StrEnum):
    """What has become of a scan."""

    DONE = "done"  # labels of this scan by this model are published
    NEW = "new"
    UNFINISHED = "unfinished"  # an earlier run has begun; its work is kept
    GROWING = "growing"  # it was changed just now: whoever copies it may not be done
    TAKEN = "taken"  # another run is at it


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive, and what is to be made of each of its scans.

    Attributes
    ----------
    root : folder or URL prefix
    model : path of the model file
    pattern : globs of the scans below the root, separated by commas; "**/*" looks into subfolders, and one that ends in
        "/" names folders of slices
    name : the label volume of each image
    images : where images go, in the archive's own tree of folders; None: each beside its scan
    truth : where a scan's truth lies, "{stem}-truth.tif" or "truth/{name}", from the scan's folder; None: there is none
    settle_s : a scan that was changed less long ago is still being copied
    priority : globs; scans of the first one go first, and so on; then the oldest
    """

    root: str
    model: str
    pattern: str = "**/*"
    name: str = "classes"
    images: str | None = None
    truth: str | None = None
    settle_s: float = 60.0
    priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """A scan of an archive.

    Attributes
    ----------
    path : of the scan
    relative : the same from the archive's root
    image : where its image is or will be
    truth : path of its truth, where there is one
    detail : who is at it, or since when it has been as it is
    """

    path: str
    relative: str
    image: str
    truth: str | None
    changed_s: float
    n_voxels: int = 0
    state: State = State.NEW
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """An archive as it is now.

    Attributes
    ----------
    scans : those to be done first, first
    others : names of the files that are no scans of a kind that can be read
    """

    scans: tuple[Scan, ...]
    others: tuple[str, ...]

    @property
    def todo(self) -> tuple[Scan, ...]:
        """The scans that can be worked on now."""
        return tuple(scan for scan in self.scans if scan.state in (State.NEW, State.UNFINISHED))


def survey(archive: Archive) -> Survey:
    """Return what has become of each scan of an archive; nothing is written.

    Raises
    ------
    InputError : root, model or name cannot be used.
    """
    check_name(archive.name)
    root = Location(archive.root).absolute()
    if not root.exists():
        raise ArgumentError(f"an archive must be a folder or prefix that exists, got {archive.root}; mend the path")
    model = load_model(archive.model)
    scans, others = _listed(archive, root)
    found = sorted(
        (_judged(scan, archive, model) for scan in scans),
        key=lambda scan: (_rank(scan.relative, archive.priority), scan.changed_s, scan.relative),
    )
    return Survey(tuple(found), tuple(others))


def judge(scan: Scan, archive: Archive) -> Scan:
    """Return a scan with its state as it is now, when its turn has come."""
    changed_s = _changed_s(Location(scan.path))
    return _judged(replace(scan, changed_s=changed_s or scan.changed_s), archive, load_model(archive.model))


def _listed(archive: Archive, root: Location) -> tuple[list[Scan], list[str]]:
    """Return the scans of an archive, and the names of what is none."""
    matches = [re.compile(glob_translate(each.strip())) for each in archive.pattern.split(",")]
    entries = {
        relative: entry for relative, entry in _walk(root, "", seen=set())
        if any(each.fullmatch(relative) for each in matches)
    }  # fmt: skip
    truths = {_truth_of(relative, archive.truth) for relative in entries} if archive.truth else set()
    scans, others, images = [], [], []
    for relative, entry in entries.items():
        path = root / relative.rstrip("/")
        if relative in truths or entry.name.endswith(_OURS):
            continue
        if entry.name.endswith(".zarr") and read_image(path) is not None:
            images.append((relative, entry))
        elif _is_scan(path):
            scans.append(_scan(archive, root, relative, entry, image=_image_of(archive, root, relative)))
        else:
            others.append(relative)
    made = {scan.image for scan in scans}
    scans += [
        _scan(archive, root, relative, entry, image=root / relative)
        for relative, entry in images if str(root / relative) not in made and not _is_made(archive, root / relative)
    ]  # fmt: skip
    return scans, others


def _walk(folder: Location, relative: str, *, seen: set[str]) -> Iterator[tuple[str, Entry]]:
    """Yield what lies below a folder by its relative path, folders with a slash; a Zarr is not looked into."""
    real = str(Path(folder.url).resolve()) if folder.is_local else folder.url
    if real in seen:
        return
    seen.add(real)
    for entry in folder.entries():
        if entry.name.startswith(".") or entry.name.endswith(".lease"):
            continue
        inside = f"{relative}{entry.name}"
        if not entry.is_folder or entry.name.endswith(".zarr"):
            yield inside, entry
        else:
            yield f"{inside}/", entry
            yield from _walk(folder / entry.name, f"{inside}/", seen=seen)


def _scan(archive: Archive, root: Location, relative: str, entry: Entry, *, image: Location) -> Scan:
    path, truth = root / relative.rstrip("/"), None
    if archive.truth:
        there = root / _truth_of(relative, archive.truth)
        truth = str(there) if there.exists() else None
    changed_s = (_changed_s(path) or entry.changed_s) if entry.is_folder else entry.changed_s
    return Scan(str(path), relative.rstrip("/"), str(image), truth, changed_s)


def _judged(scan: Scan, archive: Archive, model: Model) -> Scan:
    """Return a scan with what has become of it."""
    location = Location(scan.image)
    image = read_image(location)
    if image is not None:
        same = scan.path == scan.image or stamps(scan.path).items() <= image.scan.items()
        labels = read_labels(location / "labels" / archive.name) if same and image.statistics else None
        if (
            labels is not None
            and archive.name in published(location / "labels")
            and labels.fingerprint == fingerprint(image, model, Precision.FLOAT32)
        ):
            return replace(scan, state=State.DONE, n_voxels=prod(image.spatial_shape))
    if by := holder(location):
        return replace(scan, state=State.TAKEN, detail=by)
    age_s = time() - scan.changed_s
    if 0 <= age_s < archive.settle_s:
        return replace(scan, state=State.GROWING, detail=f"changed {age_s:.0f} s ago")
    return replace(scan, state=State.NEW if image is None else State.UNFINISHED)


def _is_scan(path: Location) -> bool:
    """Whether a file or folder is of a kind that can be read, though perhaps damaged."""
    try:
        format_of(str(path))
    except ScanError:
        return False
    return True


def _is_made(archive: Archive, path: Location) -> bool:
    """Whether an image lies where this archive's images go, and so was made of one of its scans."""
    return bool(archive.images) and path.url.startswith(f"{Location(str(archive.images)).absolute()}/")


def _image_of(archive: Archive, root: Location, relative: str) -> Location:
    beside = image_beside(str(root / relative.rstrip("/")))
    if archive.images is None:
        return beside
    folder = PurePosixPath(relative.rstrip("/")).parent
    return Location(archive.images).absolute() / str(folder / beside.name)


def _truth_of(relative: str, template: str) -> str:
    path = PurePosixPath(relative.rstrip("/"))
    try:
        return str(path.parent / template.format(stem=path.stem, name=path.name))
    except (KeyError, IndexError, ValueError) as error:
        raise ArgumentError(
            f'truth must be a path with {{stem}} or {{name}}, got {template}; use such as "{{stem}}-truth.tif"'
        ) from error


def _changed_s(path: Location) -> float | None:
    """Return when a file, or the newest of those right in a folder, was last changed; in a Zarr folders count too."""
    try:
        if path.is_local and not Path(path.url).is_dir():
            return Path(path.url).stat().st_mtime
        inside = (each for each in path.entries() if not each.is_folder or path.name.endswith(".zarr"))
        return max((entry.changed_s for entry in inside), default=None)
    except (OSError, StoreError):
        return None


def _rank(relative: str, priority: tuple[str, ...]) -> int:
    for rank, pattern in enumerate(priority):
        if re.fullmatch(glob_translate(pattern), relative):
            return rank
    return len(priority)
