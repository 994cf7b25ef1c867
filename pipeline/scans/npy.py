"""NumPy files, mapped: the axes are told by ``axes.unlabelled``."""

from __future__ import annotations

import numpy as np

from pipeline.errors import ScanError
from pipeline.scans.axes import arrange, unlabelled
from pipeline.scans.lazy import LazyScan
from pipeline.scans.mapped import MappedSource


def open_npy(path: str, /) -> LazyScan:
    """Return the scan in a .npy file; the format tells no voxel size.

    Raises
    ------
    ScanError : the file is cut off, or holds Python objects.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        told = " ".join(str(error).split())
        raise ScanError(f"a .npy scan must be whole and hold numbers, got {path}: {told}; save it again") from error
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    source = MappedSource(path, array.dtype, array.shape, array.offset, "F" if fortran else "C")
    return arrange(source, axes=unlabelled(array.shape, path=path), path=path, format_name="npy")
