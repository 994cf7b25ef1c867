"""NIfTI-1 and NIfTI-2 volumes, ``.nii`` and ``.nii.gz``; axes as ``anatomy`` has them, intensities as they are scaled.

Where the file tells no orientation its voxels count as nibabel reads them: along x towards the patient's left.
"""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ScanError
from pipeline.scans.anatomy import ScaledSource, in_body, scaled_dtype
from pipeline.scans.compressed import CompressedSource, stamp_of
from pipeline.scans.lazy import LazyScan, VoxelSource
from pipeline.scans.mapped import MappedSource

try:
    import nibabel
except ImportError as missing:
    raise ScanError(
        'NIfTI scans need the package nibabel, which is missing; pip install "haloseg[medical]"'
    ) from missing

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
_LOG = logging.getLogger("haloseg.scans")  # nibabel tells there what of a header it mends
_GZIP, _NIFTI_2 = b"\x1f\x8b", (540).to_bytes(4, "little")
_COLOURS = {"RGB": 3, "RGBA": 4}


def open_nifti(path: str, /) -> LazyScan:
    """Return the scan in a NIfTI file.

    Raises
    ------
    ScanError : it has several time points, or numbers that are no intensities.
    """
    header, measured, is_packed = _header(path)
    dtype, shape = header.get_data_dtype(), tuple(map(int, header.get_data_shape()))
    axes = "***TCQQ"[: len(shape)]
    if len(shape) < 3:
        shape, axes = (*shape, *(1,) * (3 - len(shape))), "***"
    stored, axes = shape[::-1], axes[::-1]  # x is the fastest in the file
    if dtype.names and (n_colours := _COLOURS.get("".join(dtype.names))):
        dtype, stored, axes = np.dtype(np.uint8), (*stored, n_colours), axes + "S"
    if dtype.kind not in "biuf":
        raise ScanError(f"voxels must be integers or floats, got {dtype} in {path}; save one part of them")
    offset = int(header.get_data_offset())
    source: VoxelSource = MappedSource(path, dtype, stored, offset) if not is_packed else CompressedSource(
        path, "gzip", dtype, stored, 0, offset, stamp_of(path)
    )  # fmt: skip
    steps = (_RAS_TO_LPS @ header.get_best_affine()[:3, :3]).T[::-1] * _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    told = header.get_slope_inter()
    if None not in told and told != (1.0, 0.0):
        slope, intercept = map(float, told)
        source = ScaledSource(source, slope, intercept, scaled_dtype(dtype, slope, intercept))
    return in_body(source, steps, axes=axes, path=path, format_name="NIfTI", measured=measured)


def _header(path: str) -> tuple[Any, tuple[bool, ...], bool]:
    """Return the header of a file, whatever it is called, which lengths in C order it tells, and if it is gzipped."""
    with Path(path).open("rb") as file:
        is_packed = file.read(2) == _GZIP
    with gzip.open(path) if is_packed else Path(path).open("rb") as file:
        size = file.read(4)
        file.seek(0)
        kind: Any = nibabel.Nifti2Header if _NIFTI_2 in (size, size[::-1]) else nibabel.Nifti1Header
        header = kind.from_fileobj(file, check=False)
    lengths = np.abs(header["pixdim"][1:4])
    told = [int(header["sform_code"]) > 0 or bool(length > 0) for length in lengths]
    header["pixdim"][1:4] = np.where(lengths > 0, lengths, 1)  # directions alone, then
    header.check_fix(logger=_LOG)
    return header, tuple(reversed(told)), is_packed
