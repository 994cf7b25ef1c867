"""DICOM: a folder or glob with one series of slices, or one file of one or many frames; axes as ``anatomy`` has them.

A file of many frames is a volume of its own, but for those of a concatenation, which are parts of one.

Slices are ordered by where they lie in the patient, whatever the files are called, and intensities are what the
instrument says they mean (rescale slope and intercept: Hounsfield units of a CT). Of a folder with several series one
is named as ``FOLDER::SERIES``, by its number or its UID.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.anatomy import in_body, scaled
from pipeline.scans.cache import DECODED
from pipeline.scans.compressed import stamp_of
from pipeline.scans.dicom_frames import Frame, dtype_of, frames_of
from pipeline.scans.dicom_pixels import decoded, header_of, volume_of
from pipeline.scans.files import DICOMDIR, dicom_files
from pipeline.scans.lazy import LazyScan, damage_named, damaged

_UNEVEN = 0.02  # of the distance between slices: what positions written in decimals differ by
_UNEVEN_MM = 0.01  # that, at least


@dataclass(frozen=True, slots=True)
class DicomSource:
    """Frames of one shape, one after another along the first axis; see VoxelSource."""

    frames: tuple[Frame, ...]
    dtype: np.dtype[Any]
    frame_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of frames, then the shape of one."""
        return len(self.frames), *self.frame_shape

    @property
    def chunks(self) -> tuple[int, ...]:
        """A frame is decoded as a whole."""
        return 1, *self.frame_shape

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the values under the slices."""
        wanted = [s.stop - s.start for s in slices]
        voxels, in_part = np.empty(wanted, self.dtype), tuple(wanted[1:]) != self.frame_shape
        for frame, target in zip(self.frames[slices[0]], voxels, strict=True):
            stored = _decoded(frame, again=in_part)
            if stored.shape != self.frame_shape:
                raise damaged(frame.path, cause=f"its frame has shape {stored.shape} instead of {self.frame_shape}")
            target[...] = scaled(stored[slices[1:]], frame.slope, frame.intercept, dtype=self.dtype)
        return voxels


def open_dicom(path: str, /) -> LazyScan:
    """Return the scan in a DICOM file, or in a series of a folder or glob.

    Raises
    ------
    ScanError : several series and none is named, slices that are missing, are there twice, or differ in shape or
        direction, or no positions where there are several.
    """
    place, _, wanted = path.partition("::")
    headers = _series(place, wanted.strip())
    frames = [frame for file, header in headers for frame in frames_of(file, header)]
    first = headers[0][1]
    for file, header in headers:
        _check_same(file, header, first)
    frames, step = _in_order(frames, path=path)
    n_colours = int(first.get("SamplesPerPixel", 1))
    shape, axes = ((n_colours,), "***S") if n_colours > 1 else ((), "***")
    source = DicomSource(tuple(frames), dtype_of(first, frames), (int(first.Rows), int(first.Columns), *shape))
    is_measured = all(frame.is_measured for frame in frames)
    return in_body(
        source, np.array([step, *frames[0].steps]), axes=axes, path=path, format_name="DICOM",
        measured=(True, is_measured, is_measured),
    )  # fmt: skip


def _series(place: str, wanted: str) -> list[tuple[str, Any]]:
    """Return the files of a place's only series, or of the one that is named, and their headers."""
    found: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
    files = dicom_files(place)
    if not files or files[0].name == DICOMDIR:
        raise ScanError(f"a DICOM scan must be slices, got {place}, a list of files; give the folder that they lie in")
    for file in files:
        header = header_of(str(file))
        found[str(header.get("SeriesInstanceUID", "")), volume_of(header)].append((str(file), header))
    named = [
        files for (uid, volume), files in found.items()
        if not wanted or wanted in (uid, volume, str(files[0][1].get("SeriesNumber", "")))
    ]  # fmt: skip
    if len(named) != 1:
        told = "; ".join(f"{volume or uid} ({_about(files)})" for (uid, volume), files in sorted(found.items()))
        raise ScanError(
            f"a DICOM scan must be one series, got {place}{f'::{wanted}' if wanted else ''} where there are {told}; "
            "name one as FOLDER::SERIES, by its number or UID, or a file of many frames itself"
        )
    return named[0]


def _about(files: list[tuple[str, Any]]) -> str:
    path, header = files[0]
    told = (f"number {header.get('SeriesNumber', 'unknown')}", str(header.get("SeriesDescription", "")))
    is_one = len(files) == 1 and volume_of(header)
    what = f"{PurePath(path).name} of {header.NumberOfFrames} frames" if is_one else f"{len(files)} files"
    return ", ".join([*filter(None, told), what])


def _check_same(path: str, header: Any, first: Any) -> None:  # noqa: ANN401
    names = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "PhotometricInterpretation")
    this, usual = ([each.get(name) for name in names] for each in (header, first))
    if this != usual:
        raise ScanError(
            f"slices must agree with the first in {', '.join(names)}, {usual}, got {this} in {path}; leave it out"
        )


def _in_order(frames: list[Frame], *, path: str) -> tuple[list[Frame], NDArray[np.float64]]:
    """Return the frames from the first to the last along their normal, and the way from one to the next."""
    rows, columns = np.array(frames[0].steps)
    normal = np.cross(columns, rows)
    normal /= np.linalg.norm(normal) or 1.0
    if len(frames) == 1:
        return frames, normal
    if lost := [f.path for f in frames if not f.is_placed]:
        raise ScanError(
            "each of several slices must tell where it lies in the patient (ImagePositionPatient, "
            f"ImageOrientationPatient), got none in {lost[0]}; export them with it, or save them as TIFF"
        )
    unlike = [f.path for f in frames if not np.allclose(f.steps, frames[0].steps, rtol=1e-3, atol=1e-4)]
    if unlike:
        raise ScanError(
            f"slices must lie in one direction with one pixel size, got others in {len(unlike)} of {len(frames)}, such "
            f"as {unlike[0]}; leave those out"
        )
    frames = sorted(frames, key=lambda f: float(np.dot(f.at, normal)))
    places = np.array([f.at for f in frames])
    gaps = np.diff(places @ normal)
    usual = float(np.median(gaps))
    if (same := int((gaps < 1e-3).sum())) or usual <= 0:
        raise ScanError(
            f"slices must each lie at a place of their own, got {same} that lie where another does in {path}; keep one "
            "time point, echo or reconstruction"
        )
    allowed = max(_UNEVEN * usual, _UNEVEN_MM)
    if np.abs(gaps - usual).max() > allowed:
        raise ScanError(
            f"slices must lie at even distances, got {gaps.min():.4g} to {gaps.max():.4g} mm in {path}; add the slices "
            "that are missing, or resample it"
        )
    step: NDArray[np.float64] = (places[-1] - places[0]) / (len(frames) - 1)
    beside = np.abs(places - places[0] - np.arange(len(frames))[:, np.newaxis] * step).max()
    if beside > allowed:
        raise ScanError(
            f"slices must lie one behind another on a line, got some {beside:.4g} mm beside it in {path}; leave out "
            "those that are displaced, or resample it"
        )
    return frames, step


def _decoded(frame: Frame, *, again: bool) -> NDArray[Any]:
    """Return the stored numbers of a frame, (y, x) or (y, x, c)."""
    key = (frame.path, frame.index, stamp_of(frame.path))
    with damage_named(frame.path):
        return DECODED.get(key, lambda: decoded(frame.path, index=frame.index, syntax=frame.syntax), again=again)
