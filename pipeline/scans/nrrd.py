"""NRRD volumes in one file, ``.nrrd``: raw, gzip or bzip2.

Axes are as ``anatomy`` has them where the file names a space of the patient ("left-posterior-superior", "RAS"); else
the three of space count as x, y, z in their order. A fourth axis is the channels, or time. Without units lengths are
millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.anatomy import UM_PER_MM, in_body, length_of
from pipeline.scans.axes import arrange
from pipeline.scans.compressed import CompressedSource, stamp_of
from pipeline.scans.lazy import LazyScan, VoxelSource, damaged
from pipeline.scans.mapped import MappedSource

try:
    import nrrd
except ImportError as missing:
    raise ScanError(
        'NRRD scans need the package pynrrd, which is missing; pip install "haloseg[medical]"'
    ) from missing

_PACKED: dict[str, Literal["gzip", "bzip2"]] = {"gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_TOWARDS = {"right": (-1, 0), "left": (1, 0), "anterior": (-1, 1), "posterior": (1, 1), "superior": (1, 2),
            "inferior": (-1, 2)}  # fmt: skip
_SHORT = {name[0]: name for name in _TOWARDS}
_MM_PER_UNIT = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "cm": 10.0, "m": 1000.0, "meter": 1000.0,
    "um": 1e-3, "\N{MICRO SIGN}m": 1e-3, "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "micrometers": 1e-3,
    "nm": 1e-6, "nanometer": 1e-6, "nanometers": 1e-6, "": 1.0, "???": 1.0, "none": 1.0, "pixel": 1.0,
}  # fmt: skip
_SPATIAL = {"domain", "space", "???", "none"}
_CHANNELS = {"list", "vector", "point", "covariant-vector", "RGB-color", "RGBA-color", "2-vector", "3-vector",
             "3-color", "4-color", "4-vector"}  # fmt: skip


def open_nrrd(path: str, /) -> LazyScan:
    """Return the scan in an NRRD file.

    Raises
    ------
    ScanError : its data are in another file, or written as text, or its lengths in an unknown unit.
    """
    with Path(path).open("rb") as file:
        header = nrrd.read_header(file)
        begin = file.tell()
    shape = tuple(int(n) for n in reversed(header["sizes"]))  # the first axis is the fastest in the file
    source = _source(path, header, begin, shape)
    steps, kinds = _steps(header, len(shape), path=path), _kinds(header, len(shape))[-len(shape) :]
    spatial = [kind in _SPATIAL for kind in kinds] if steps is None else [not np.isnan(step).any() for step in steps]
    axes = "".join("*" if each else _letter(kind) for each, kind in zip(spatial, kinds, strict=True))
    directions = _space(header)
    if steps is not None and directions is not None and axes.count("*") == 3:
        return in_body(source, steps[spatial] @ directions, axes=axes, path=path, format_name="NRRD")
    named = iter(f"{'Q' * len(axes)}ZYX"[-axes.count("*") :])
    letters = "".join(next(named) if letter == "*" else letter for letter in axes)
    size = _sizes(header, spatial, steps, path=path)
    return arrange(source, axes=letters, path=path, format_name="NRRD", voxel_size_um=size)


def _source(path: str, header: Mapping[str, Any], begin: int, shape: tuple[int, ...]) -> VoxelSource:
    """Return the voxels as the file has them, in C order."""
    name, encoding = header.get("data file", header.get("datafile")), str(header["encoding"])
    if name is not None:
        raise ScanError(f"an NRRD scan must be in one file, got its data in {name} for {path}; save it as one .nrrd")
    if header.get("line skip", header.get("lineskip", 0)) or header.get("byte skip", header.get("byteskip", 0)):
        raise ScanError(f"an NRRD scan must begin with its voxels, got lines or bytes to skip in {path}; save it anew")
    kind = str(nrrd.reader._TYPEMAP_NRRD2NUMPY.get(header["type"], ""))  # its only table of types
    dtype = np.dtype(kind or "V1").newbyteorder(">" if header.get("endian") == "big" else "<")
    if not kind:
        raise ScanError(f"voxels must be integers or floats, got {header['type']} in {path}; convert them")
    if encoding == "raw":
        return MappedSource(path, dtype, shape, begin)
    if encoding not in _PACKED:
        raise ScanError(f"an NRRD scan must be raw, gzip or bzip2, got {encoding} in {path}; save it anew")
    return CompressedSource(path, _PACKED[encoding], dtype, shape, begin, 0, stamp_of(path))


def _steps(header: Mapping[str, Any], n_axes: int, *, path: str) -> NDArray[np.float64] | None:
    """Return for each axis in C order the way to the next voxel, mm, NaN where it is not in space; None if untold."""
    told = header.get("space directions")
    if told is None:
        return None
    n_space = max((len(each) for each in told if each is not None), default=0)
    rows = [np.full(n_space, np.nan) if each is None else np.asarray(each, np.float64) for each in reversed(list(told))]
    if len(rows) != n_axes:
        raise damaged(path, cause=f"it tells {len(rows)} directions of {n_axes} axes")
    return _mm(header, "space units", path=path) * np.stack(rows)


def _kinds(header: Mapping[str, Any], n_axes: int) -> list[str]:
    """Return the kind of each axis in C order; three of space, and others in front, where none is told."""
    told = header.get("kinds")
    return [str(kind) for kind in reversed(list(told))] if told is not None else ["?"] * (n_axes - 3) + ["domain"] * 3


def _letter(kind: str) -> str:
    """Return the letter of an axis that is not in space."""
    return "C" if kind in _CHANNELS else "T" if kind == "time" else "Q"


def _space(header: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Return what turns the file's space into the patient's (left, posterior, superior); None where it is another."""
    told = str(header.get("space", ""))
    names = told.lower().split("-") if "-" in told else [_SHORT.get(letter, "") for letter in told.lower()]
    if len(names) != 3 or any(name not in _TOWARDS for name in names):
        return None
    matrix = np.zeros((3, 3))
    for row, name in enumerate(names):
        sign, axis = _TOWARDS[name]
        matrix[row, axis] = sign
    return matrix if np.linalg.det(matrix) else None


def _mm(header: Mapping[str, Any], field: str, *, path: str) -> NDArray[np.float64] | float:
    """Return millimetres per unit of space, or of each axis in C order; without units they count as millimetres."""
    told = header.get(field)
    if told is None:
        return 1.0
    units = [str(unit).strip().lower() for unit in reversed(list(told))]
    if field == "space units" and len(set(units)) > 1:
        raise ScanError(f"an NRRD scan must have one unit of space, got {', '.join(units)} in {path}; save it anew")
    if unknown := [unit for unit in units if unit not in _MM_PER_UNIT]:
        known = ", ".join(filter(None, _MM_PER_UNIT))
        raise ScanError(f"a unit must be one of {known}, got {unknown[0]} in {path}; mend it")
    each = np.array([_MM_PER_UNIT[unit] for unit in units])
    return float(each[0]) if field == "space units" else each


def _sizes(
    header: Mapping[str, Any], spatial: list[bool], steps: NDArray[np.float64] | None, *, path: str
) -> dict[str, float]:
    """Return micrometres along z, y, x, as far as they are told."""
    if steps is not None:
        lengths = [length_of(step) for step, each in zip(steps, spatial, strict=True) if each]
    else:
        told = np.array(list(reversed(list(header.get("spacings", ())))), np.float64)
        told = told * _mm(header, "units", path=path) if len(told) else told
        lengths = [length_of(n) for n, each in zip(told, spatial, strict=False) if each]
    named = "zyx"[-len(lengths) :] if len(lengths) in (2, 3) else ""
    return {axis: UM_PER_MM * n for axis, n in zip(named, lengths, strict=False)}
