"""MRC volumes of electron microscopy: ``.mrc``, ``.rec``, ``.st``, ``.map``; the voxel size is in the header, Angstrom.

Bytes are signed, as the format says, but for files of IMOD that do not say so themselves: its older ones are not.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import ScanError
from pipeline.scans.anatomy import length_of
from pipeline.scans.axes import arrange
from pipeline.scans.lazy import LazyScan, damaged
from pipeline.scans.mapped import MappedSource

try:
    import mrcfile
except ImportError as missing:
    raise ScanError('MRC scans need the package mrcfile, which is missing; pip install "haloseg[mrc]"') from missing

_ANGSTROM_PER_UM = 1e4
_HEADER_BYTES = 1024
_STACKS_OF_VOLUMES = range(401, 631)
_IMOD, _IMOD_AT, _SIGNED = 1146047817, slice(40, 48), 1  # its stamp and flags, in the part of the header that is free


def open_mrc(path: str, /) -> LazyScan:
    """Return the scan in an MRC file; one section is a picture.

    Raises
    ------
    ScanError : it holds transforms (complex numbers), or a stack of volumes.
    """
    with mrcfile.open(path, header_only=True) as file:
        header, size = file.header, file.voxel_size
    dtype = np.dtype(mrcfile.utils.dtype_from_mode(header.mode)).newbyteorder(header.mode.dtype.byteorder)
    if dtype.kind == "c":
        raise ScanError(f"voxels must be integers or floats, got a transform, {dtype}, in {path}; transform it back")
    if int(header.ispg) in _STACKS_OF_VOLUMES:
        raise ScanError(f"an MRC scan must be one volume, got a stack of volumes in {path}; save each by itself")
    stamp, flags = np.frombuffer(header.extra2.tobytes()[_IMOD_AT], header.mode.dtype)
    if dtype.kind == "i" and dtype.itemsize == 1 and stamp == _IMOD and not flags & _SIGNED:
        dtype = np.dtype(np.uint8)
    shape = tuple(int(header[name]) for name in ("nz", "ny", "nx"))
    if min(shape) < 1:
        raise damaged(path, cause=f"its sizes must be above 0, got {shape}")
    order = [int(header[name]) for name in ("maps", "mapr", "mapc")]
    axes = "".join(" XYZ"[axis] for axis in order) if sorted(order) == [1, 2, 3] else "ZYX"
    source = MappedSource(path, dtype, shape, _HEADER_BYTES + int(header.nsymbt))
    known = {axis: length_of(size[axis]) / _ANGSTROM_PER_UM for axis in "xyz"}
    return arrange(source, axes=axes, path=path, format_name="MRC", voxel_size_um=known)
