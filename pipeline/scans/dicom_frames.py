"""The frames of a DICOM file: where each lies in the patient, and what its numbers mean, by the file's header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ScanError
from pipeline.scans.anatomy import scaled_dtype
from pipeline.scans.dicom_pixels import syntax_of
from pipeline.scans.lazy import damaged


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice: where its pixels are, where it lies, and what its numbers mean.

    Attributes
    ----------
    syntax : UID of the transfer syntax that it is stored in
    at : millimetres of its first pixel, to the patient's left, back and head
    steps : the way from one row, and from one column, to the next, shape (2, 3), millimetres
    is_placed : whether the file tells where it lies, and in what direction
    is_measured : whether the file tells how far its pixels lie apart; else the steps are directions
    """

    path: str
    index: int
    syntax: str
    at: tuple[float, ...]
    steps: tuple[tuple[float, ...], ...]
    slope: float
    intercept: float
    is_placed: bool
    is_measured: bool


def frames_of(path: str, header: Any) -> Iterator[Frame]:  # noqa: ANN401 pydicom's data set
    """Yield the frames of a file, each with what is told of it, or of all together."""
    _check_readable(path, header)
    syntax = syntax_of(path, header)
    n_frames = int(header.get("NumberOfFrames", 1) or 1)
    each = header.get("PerFrameFunctionalGroupsSequence", ())
    shared = header.get("SharedFunctionalGroupsSequence", ())
    for index in range(n_frames):
        groups = [*each[index : index + 1], *shared]
        told = [item for group in groups for sequence in group for item in _items(sequence)]
        yield _frame(path, index, [*told, header], syntax=syntax)


def _check_readable(path: str, header: Any) -> None:  # noqa: ANN401
    if missing := [name for name in ("Rows", "Columns", "BitsAllocated") if name not in header]:
        kind = _kind(header)
        if "Image" in kind or not kind:
            raise damaged(path, cause=f"its header ends without {', '.join(missing)}")
        raise ScanError(f"a DICOM scan must be of pictures, got {kind} in {path}; leave that file out")
    if "TotalPixelMatrixColumns" in header:
        raise ScanError(f"DICOM of whole slides cannot be read, got {path}; convert it to a tiled TIFF")
    if "DoseGridScaling" in header:
        raise ScanError(f"DICOM of doses cannot be read, got {path}; convert it to NIfTI or NRRD")
    if header.get("ModalityLUTSequence"):
        raise ScanError(
            f"numbers must mean something by slope and intercept, got a Modality LUT in {path}; apply it and save them"
        )
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise ScanError(f"a DICOM scan must be of grey values or RGB, got PALETTE COLOR in {path}; convert it to RGB")


def _kind(header: Any) -> str:  # noqa: ANN401
    """Return what a file calls its contents; nothing if it does not tell."""
    uid = header.get("SOPClassUID") or ""
    return str(getattr(uid, "name", uid))


def _items(element: Any) -> list[Any]:  # noqa: ANN401
    return list(element.value) if element.VR == "SQ" else []


def _frame(path: str, index: int, told: list[Any], *, syntax: str) -> Frame:
    def of(name: str, usual: Any = None) -> Any:  # noqa: ANN401
        return next((each[name].value for each in told if name in each and not each[name].is_empty), usual)

    at, way, spacing = of("ImagePositionPatient"), of("ImageOrientationPatient"), of("PixelSpacing")
    is_placed, is_measured = at is not None and way is not None, spacing is not None
    along, down = np.array([float(n) for n in way or (1, 0, 0, 0, 1, 0)]).reshape(2, 3)  # a row, a column
    rows, columns = map(float, spacing or (1, 1))
    steps = tuple(tuple(map(float, n)) for n in (down * rows, along * columns))
    slope, intercept = float(of("RescaleSlope", 1)), float(of("RescaleIntercept", 0))
    at = tuple(float(n) for n in at or (0, 0, 0))
    return Frame(path, index, syntax, at, steps, slope, intercept, is_placed, is_measured)


def dtype_of(header: Any, frames: list[Frame]) -> np.dtype[Any]:  # noqa: ANN401
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
