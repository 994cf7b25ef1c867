"""Archive: the scans under a folder or prefix, what has become of each, and in which order the rest is to be done.

What has been done is told by the published labels alone; there is no list beside them that could be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from pathlib import Path, PurePosixPath
from posixpath import normpath
from time import time

from pipeline.config import Precision, Tta
from pipeline.errors import ArgumentError, PipelineError, ScanError
from pipeline.identity import stamps
from pipeline.listing import changed_s, matching, pattern_of
from pipeline.provenance import differing, fingerprint
from pipeline.scans.registry import check_on_disk, format_of, is_remote_file
from pipeline.segment import image_beside, stem_of
from pipeline.store.image import read_image
from pipeline.store.labels import check_name
from pipeline.store.lease import holder
from pipeline.store.location import Entry, Location
from pipeline.store.results import is_published, read_result
from pipeline.store.scaling import Scaling
from pipeline.unet.model import load_model

_OURS = (".lease", ".haloseg.zarr", ".partial")


class State(StrEnum):
    """What has become of a scan."""

    DONE = "done"  # what this model makes of this scan is published
    NEW = "new"
    UNFINISHED = "unfinished"  # an earlier run has begun; its work is kept
    UNREPORTED = "unreported"  # published by a run that ended before it evaluated and reported
    GROWING = "growing"  # it was changed just now: whoever copies it may not be done
    TAKEN = "taken"  # another run is at it
    BLOCKED = "blocked"  # somebody must act first; the detail says what


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive, and what is to be made of each of its scans.

    Attributes
    ----------
    root : folder or URL prefix
    model : path of the model file
    pattern : globs of the scans below the root, separated by commas; "**/*" looks into subfolders, and one that ends in
        "/" names folders of slices; DICOM files that lie together are one scan, their folder
    name : the label volume of each image
    images : where images go, in the archive's own tree of folders; None: each beside its scan
    truth : where a scan's truth lies, "{stem}-truth.tif" or "truth/{name}", from the scan's folder; None: there is none
    settle_s : a scan that was changed less long ago is still being copied
    priority : globs; scans of the first one go first, and so on; then the oldest
    precision, tta : with which results are made; those of another are not done
    """

    root: str
    model: str
    pattern: str = "**/*"
    name: str = "classes"
    images: str | None = None
    truth: str | None = None
    settle_s: float = 60.0
    priority: tuple[str, ...] = ()
    precision: Precision = Precision.FLOAT32
    tta: Tta = Tta.NONE


@dataclass(frozen=True, slots=True)
class Scan:
    """A scan of an archive.

    Attributes
    ----------
    path : of the scan
    relative : the same from the archive's root
    image : where its image is or will be
    truth : path of its truth, where there is one
    detail : who is at it, since when it has been as it is, or what is to be done
    """

    path: str
    relative: str
    image: str
    truth: str | None
    changed_s: float
    n_voxels: int = 0
    state: State = State.NEW
    detail: str = ""

    @property
    def is_todo(self) -> bool:
        """Whether it can be worked on now."""
        return self.state in (State.NEW, State.UNFINISHED, State.UNREPORTED)


@dataclass(frozen=True, slots=True)
class Survey:
    """An archive as it is now.

    Attributes
    ----------
    scans : those to be done first, first
    others : names of the files that are no scans of a kind that can be read
    model_sha256, scaling : of the model that the states are about
    folder : of an image, in which results of this model lie: labels or predictions
    """

    scans: tuple[Scan, ...]
    others: tuple[str, ...]
    model_sha256: str
    scaling: Scaling
    folder: str = "labels"

    @property
    def todo(self) -> tuple[Scan, ...]:
        """The scans that can be worked on now."""
        return tuple(scan for scan in self.scans if scan.is_todo)


def survey(archive: Archive) -> Survey:
    """Return what has become of each scan of an archive; nothing is written.

    Raises
    ------
    InputError : root, model or name cannot be used.
    """
    check_name(archive.name)
    root = Location(archive.root).absolute()
    if not root.exists() or (root.is_local and not Path(root.url).is_dir()):
        raise ArgumentError(f"an archive must be a folder or prefix that exists, got {archive.root}; mend the path")
    model = load_model(archive.model)
    scans, others = _listed(archive, root)
    found = sorted(
        (judge(scan, archive, model_sha256=model.digest, scaling=model.scaling) for scan in scans),
        key=lambda scan: (_rank(scan.relative, archive.priority), scan.changed_s, scan.relative),
    )
    folder = "labels" if model.classes else "predictions"
    return Survey(tuple(found), tuple(others), model.digest, model.scaling, folder)


def judge(scan: Scan, archive: Archive, *, model_sha256: str, scaling: Scaling) -> Scan:
    """Return a scan with what has become of it by now; one that cannot be judged is blocked by its cause."""
    try:
        return _state_of(scan, archive, model_sha256, scaling)
    except (PipelineError, OSError, LookupError, TypeError, ValueError) as error:
        told = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        return replace(scan, state=State.BLOCKED, detail=told)


def _listed(archive: Archive, root: Location) -> tuple[list[Scan], list[str]]:
    """Return the scans of an archive, and the names of what is none."""
    entries, others = matching(root, archive.pattern)
    truths = {_truth_of(relative, archive.truth) for relative in entries} if archive.truth else set()
    scans, images = [], []
    for relative, entry in entries.items():
        path = root / relative.rstrip("/")
        if relative in truths or entry.name.endswith(_OURS):
            continue
        if not relative.isprintable():  # a name that no store and no page can be told
            others.append(repr(relative))
        elif entry.name.endswith(".zarr") and _is_image(path):
            images.append((relative, entry))
        elif _is_scan(path):
            scans.append(_scan(archive, root, relative, entry, image=_image_of(archive, root, relative)))
        else:
            others.append(relative)
    scans = _told_apart(scans)
    made = {scan.image for scan in scans}
    scans += [
        _scan(archive, root, relative, entry, image=root / relative)
        for relative, entry in images if str(root / relative) not in made and not _is_made(archive, root / relative)
    ]  # fmt: skip
    return scans, others


def _told_apart(scans: list[Scan]) -> list[Scan]:
    """Return the scans with an image for each: of two that would have one, x.tif and x.png, each keeps its ending."""
    by_image: dict[str, list[Scan]] = {}
    for scan in scans:
        by_image.setdefault(scan.image, []).append(scan)

    def apart(scan: Scan) -> Scan:
        image = Location(scan.image)
        if len(by_image[scan.image]) == 1 or _is_of(scan, image):
            return scan
        return replace(scan, image=str(image.parent / f"{Location(scan.path).name}.zarr"))

    return [apart(scan) for scan in scans]


def _is_of(scan: Scan, location: Location) -> bool:
    """Whether an image was made of a scan of this name."""
    try:
        image = read_image(location)
    except PipelineError:
        return False
    return image is not None and image.scan.get("name") == stamps(scan.path)["name"]


def _scan(archive: Archive, root: Location, relative: str, entry: Entry, *, image: Location) -> Scan:
    path, truth = root / relative.rstrip("/"), None
    if archive.truth:
        there = root / _truth_of(relative, archive.truth)
        truth = str(there) if there.exists() else None
    return Scan(str(path), relative.rstrip("/"), str(image), truth, entry.changed_s)


def _state_of(scan: Scan, archive: Archive, model_sha256: str, scaling: Scaling) -> Scan:
    check_on_disk(scan.path)
    location = Location(scan.image)
    image, is_due = read_image(location), False
    if image is not None and scan.path != scan.image and not stamps(scan.path).items() <= image.scan.items():
        detail = f"the scan was changed after its image was made; delete {location} to do it again"
        return replace(scan, state=State.BLOCKED, detail=detail)
    if image is not None and image.statistics:
        made = read_result(location, archive.name)
        now = fingerprint(image, model_sha256, archive.precision, tta=archive.tta, scaling=scaling)
        if made is not None and (other := differing(made.fingerprint, now)):
            kind = made.location.parent.name
            detail = f"{kind} {archive.name} are of another {other}; choose another name or delete {made.location}"
            return replace(scan, state=State.BLOCKED, detail=detail)
        if made is not None and is_published(made):
            scan, is_due = replace(scan, n_voxels=prod(image.spatial_shape)), made.report_due
            if not is_due:
                return replace(scan, state=State.DONE)
    if by := holder(location):
        return replace(scan, state=State.TAKEN, detail=by)
    if is_due:
        return replace(scan, state=State.UNREPORTED, detail="its labels are published, its report is not made yet")
    scan = replace(scan, changed_s=changed_s(Location(scan.path)) or scan.changed_s)
    if (age_s := time() - scan.changed_s) < archive.settle_s:
        return replace(scan, state=State.GROWING, detail=f"changed {max(0, age_s):.0f} s ago")
    return replace(scan, state=State.NEW if image is None else State.UNFINISHED)


def _is_scan(path: Location) -> bool:
    """Whether a file or folder is of a kind that can be read, perhaps damaged, or could if it lay on a disk."""
    if not path.is_local:
        return path.name.endswith(".zarr") or is_remote_file(path.url)
    try:
        format_of(str(path))
    except (ScanError, OSError):
        return False
    return True


def _is_image(path: Location) -> bool:
    """Whether this is an image of ours; one whose metadata are damaged, or not yet copied, is taken for a scan."""
    try:
        return read_image(path) is not None
    except (OSError, PipelineError):
        return False


def _is_made(archive: Archive, path: Location) -> bool:
    """Whether an image lies where this archive's images go, and so was made of one of its scans."""
    return archive.images is not None and path.url.startswith(f"{_images(archive.images)}/")


def _image_of(archive: Archive, root: Location, relative: str) -> Location:
    beside = image_beside(str(root / relative.rstrip("/")))
    if archive.images is None:
        return beside
    folder = PurePosixPath(relative.rstrip("/")).parent
    return _images(archive.images) / str(folder / beside.name)


def _images(folder: str) -> Location:
    return Location(folder.rstrip("/")).absolute()


def _truth_of(relative: str, template: str) -> str:
    path = PurePosixPath(relative.rstrip("/"))
    stem = path.name if relative.endswith("/") else stem_of(path.name)
    try:
        found = normpath(str(path.parent / template.format(stem=stem, name=path.name)))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f'truth must be a path with {{stem}} or {{name}}, got {template}; use such as "{{stem}}-truth.tif"'
        ) from error
    if found == str(path) and template in ("{name}", "{stem}" + path.name.removeprefix(stem)):
        raise ArgumentError(f'truth must not be the scan itself, got {template}; use such as "{{stem}}-truth.tif"')
    return found


def _rank(relative: str, priority: tuple[str, ...]) -> int:
    ranks = (rank for rank, pattern in enumerate(priority) if pattern_of(pattern).fullmatch(relative))
    return next(ranks, len(priority))
