"""DICOM: a folder with one series of slices, or one file of one or many frames; axes as ``anatomy`` has them.

Slices are ordered by where they lie in the patient, whatever the files are called, and intensities are what the
instrument says they mean (rescale slope and intercept: Hounsfield units of a CT). Of a folder with several series one
is named as ``FOLDER::SERIES``, by its number or its UID.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.anatomy import in_body, scaled, scaled_dtype
from pipeline.scans.cache import DECODED
from pipeline.scans.compressed import stamp_of
from pipeline.scans.files import is_dicom_file
from pipeline.scans.lazy import LazyScan, damage_named, damaged

try:
    import pydicom
    from pydicom.pixels.utils import pixel_array
except ImportError as missing:
    raise ScanError(
        'DICOM scans need the package pydicom, which is missing; pip install "haloseg[medical]"'
    ) from missing

_AMONG_OTHERS = {"DICOMDIR"}
_UNEVEN = 0.02  # of the distance between slices: what positions written in decimals differ by


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice: where its pixels are, where it lies, and what its numbers mean.

    Attributes
    ----------
    at : millimetres of its first pixel, to the patient's left, back and head
    steps : the way from one row, and from one column, to the next, shape (2, 3), millimetres
    """

    path: str
    index: int
    at: tuple[float, ...]
    steps: tuple[tuple[float, ...], ...]
    slope: float
    intercept: float


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
    """Return the scan in a DICOM file, or in a series of a folder.

    Raises
    ------
    ScanError : several series and none is named, slices that are missing, are there twice, or differ in shape or
        direction, or no positions where there are several.
    """
    place, _, wanted = path.partition("::")
    headers = _series(place, wanted.strip()) if Path(place).is_dir() else [(place, _header(place))]
    frames = [frame for file, header in headers for frame in _frames(file, header)]
    first = headers[0][1]
    for file, header in headers:
        _check_same(file, header, first)
    frames, step = _in_order(frames, path=path)
    n_colours = int(first.get("SamplesPerPixel", 1))
    shape, axes = ((n_colours,), "***S") if n_colours > 1 else ((), "***")
    source = DicomSource(tuple(frames), _dtype(first, frames), (int(first.Rows), int(first.Columns), *shape))
    return in_body(source, np.array([step, *frames[0].steps]), axes=axes, path=path, format_name="DICOM")


def _header(path: str) -> Any:  # noqa: ANN401 pydicom's data set
    with damage_named(path):
        return pydicom.dcmread(path, stop_before_pixels=True)


def _series(folder: str, wanted: str) -> list[tuple[str, Any]]:
    """Return the files of a folder's only series, or of the one that is named, and their headers."""
    found: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for file in dicom_files(folder):
        header = _header(str(file))
        found[str(header.get("SeriesInstanceUID", ""))].append((str(file), header))
    named = {
        uid: files for uid, files in found.items()
        if not wanted or wanted in (uid, str(files[0][1].get("SeriesNumber", "")))
    }  # fmt: skip
    if len(named) != 1:
        told = "; ".join(f"{uid} ({_about(files)})" for uid, files in sorted(found.items()))
        raise ScanError(
            f"a DICOM scan must be one series, got {folder}{f'::{wanted}' if wanted else ''} where there are {told}; "
            "name one as FOLDER::SERIES, by its number or UID"
        )
    return next(iter(named.values()))


def _about(files: list[tuple[str, Any]]) -> str:
    header = files[0][1]
    told = (f"number {header.get('SeriesNumber', 'unknown')}", str(header.get("SeriesDescription", "")))
    return ", ".join([*filter(None, told), f"{len(files)} files"])


def _frames(path: str, header: Any) -> Iterator[Frame]:  # noqa: ANN401
    """Yield the frames of a file, each with what is told of it, or of all together."""
    if "Rows" not in header:
        raise ScanError(f"a DICOM scan must be of pictures, got {_kind(header)} in {path}; leave that file out")
    if "TotalPixelMatrixColumns" in header:
        raise ScanError(f"DICOM of whole slides cannot be read, got {path}; convert it to a tiled TIFF")
    n_frames = int(header.get("NumberOfFrames", 1) or 1)
    each = header.get("PerFrameFunctionalGroupsSequence", ())
    shared = header.get("SharedFunctionalGroupsSequence", ())
    for index in range(n_frames):
        groups = [*each[index : index + 1], *shared]
        told = [item for group in groups for sequence in group for item in _items(sequence)]
        yield _frame(path, index, [*told, header], is_alone=n_frames == 1)


def _items(element: Any) -> list[Any]:  # noqa: ANN401
    return list(element.value) if element.VR == "SQ" else []


def _frame(path: str, index: int, told: list[Any], *, is_alone: bool) -> Frame:
    def of(name: str, usual: Any = None) -> Any:  # noqa: ANN401
        return next((each[name].value for each in told if name in each and each[name].value is not None), usual)

    at, way, spacing = of("ImagePositionPatient"), of("ImageOrientationPatient"), of("PixelSpacing")
    spacing = of("ImagerPixelSpacing") if spacing is None else spacing
    if (at is None or way is None) and not is_alone:
        raise ScanError(f"each frame must tell where it lies in the patient, got none in {path}; save it as a series")
    spacing = (1.0, 1.0) if spacing is None else tuple(map(float, spacing))
    way = np.array([float(n) for n in way or (1, 0, 0, 0, 1, 0)]).reshape(2, 3)  # along a row, then down a column
    steps = tuple(tuple(map(float, n)) for n in (way[1] * spacing[0], way[0] * spacing[1]))
    slope, intercept = float(of("RescaleSlope", 1)), float(of("RescaleIntercept", 0))
    return Frame(path, index, tuple(float(n) for n in at or (0, 0, 0)), steps, slope, intercept)


def _check_same(path: str, header: Any, first: Any) -> None:  # noqa: ANN401
    names = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation")
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
    if np.abs(gaps - usual).max() > _UNEVEN * usual:
        raise ScanError(
            f"slices must lie at even distances, got {gaps.min():.4g} to {gaps.max():.4g} mm in {path}; add the slices "
            "that are missing, or resample it"
        )
    return frames, (places[-1] - places[0]) / (len(frames) - 1)


def _dtype(header: Any, frames: list[Frame]) -> np.dtype[Any]:  # noqa: ANN401
    """Return the type that holds what the numbers of all frames mean; those without bits are floats."""
    if "BitsStored" not in header:
        return np.dtype(f"f{int(header.BitsAllocated) // 8}")
    is_signed, bits = bool(header.PixelRepresentation), int(header.BitsStored)
    stored = np.dtype(f"{'i' if is_signed else 'u'}{max(1, int(header.BitsAllocated) // 8)}")
    limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    meant = Counter((f.slope, f.intercept) for f in frames)
    if len(meant) > 1:
        return np.dtype(np.float32)
    return scaled_dtype(stored, *next(iter(meant)), limits=limits)


def _kind(header: Any) -> str:  # noqa: ANN401
    uid = header.get("SOPClassUID")
    return str(getattr(uid, "name", uid))


def _decoded(frame: Frame, *, again: bool) -> NDArray[Any]:
    """Return the stored numbers of a frame, (y, x) or (y, x, c)."""
    key = (frame.path, frame.index, stamp_of(frame.path))
    with damage_named(frame.path):
        return DECODED.get(key, lambda: np.asarray(pixel_array(frame.path, index=frame.index)), again=again)


def dicom_files(folder: str) -> list[Path]:
    """Return the DICOM files right in a folder, by name."""
    files = (each for each in Path(folder).iterdir() if each.is_file() and not each.name.startswith("."))
    return sorted(each for each in files if each.name not in _AMONG_OTHERS and is_dicom_file(each))

