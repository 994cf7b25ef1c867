"""LazyScan: what every reader of scans returns: shape, axes and voxel size now, voxels when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError, PipelineError, ScanError


class VoxelSource(Protocol):
    """Voxels as a file holds them, in the file's own axis order.

    A source is picklable (a worker opens the file again by its path) and may be read by several threads at once.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis of the file."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel; either byte order."""
        ...

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone, in voxels along each axis."""
        ...

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under slices of step 1 that lie inside the shape and are not empty."""
        ...


@dataclass(frozen=True, slots=True)
class LazyScan:
    """A scan whose voxels stay in their file until they are read.

    Attributes
    ----------
    path : where the scan lies, for messages
    format : short name of the file format
    dims : the scan's axes, out of c, z, y, x in this order
    voxel_size_um : micrometres along the spatial axes in order; None when the format does not tell it for all of them
    source : the voxels, along exactly these axes
    partial_um : micrometres by axis where the format tells them for some of the spatial axes alone
    """

    path: str
    format: str
    dims: tuple[str, ...]
    voxel_size_um: tuple[float, ...] | None
    source: VoxelSource
    partial_um: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        dtype = self.source.dtype
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise ScanError(
                f"voxels must be booleans, integers or floats of at most 64 bit, got {dtype} in {self.path}; "
                "convert them"
            )
        if len(self.dims) != len(self.source.shape):
            raise ScanError(f"a scan needs one name per axis, got {self.dims} for {self.source.shape} in {self.path}")
        if 0 in self.source.shape:
            raise ScanError(f"a scan must have voxels, got shape {self.source.shape} in {self.path}; export it again")

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel, in the machine's byte order."""
        return self.source.dtype.newbyteorder("=")

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone, in voxels along each axis."""
        return self.source.chunks

    @property
    def spatial_dims(self) -> tuple[str, ...]:
        """The axes without the channels."""
        return tuple(d for d in self.dims if d != "c")

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under slices of step 1, in the machine's byte order; only these are read.

        Raises
        ------
        ArgumentError : the slices do not lie inside the scan
        ScanError : the file is damaged there
        OSError : storage failed; reading again may succeed
        """
        shape = _lengths(slices, self.shape)
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        with damage_named(self.path):
            voxels = self.source.read(slices)
        if voxels.shape != shape:
            raise ScanError(f"a part of this scan must have shape {shape}, got {voxels.shape} from {self.path}")
        return voxels.astype(self.dtype, copy=False)


def _lengths(slices: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape under the slices, which must be written out: 0 <= start <= stop <= size, step 1."""
    if len(slices) != len(shape):
        raise ArgumentError(f"a scan is read with one slice per axis, got {slices} for shape {shape}")
    for s, size in zip(slices, shape, strict=True):
        if s.step not in (None, 1) or not 0 <= s.start <= s.stop <= size:
            raise ArgumentError(f"a scan is read with slices of step 1 inside shape {shape}, got {slices}")
    return tuple(s.stop - s.start for s in slices)


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn whatever a decoder dies of into one line that names the file; failing storage stays an OSError."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise OSError too (inflate of HDF5, for one), but only the operating system gives it a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged(path, cause=str(error) or type(error).__name__) from error


def damaged(path: str, *, cause: str) -> ScanError:
    """Return the error of a file that cannot be decoded."""
    told = " ".join(cause.split())[:300].rstrip(".")
    return ScanError(f"a scan must be whole and decodable, got {path}: {told}; copy or export it again")
