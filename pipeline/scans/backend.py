"""Scans as xarray: ``xr.open_dataarray(path, engine="haloseg")``, or ``open_scan(path)``; nothing is read until sliced.

Spatial coordinates are in micrometres, index * voxel size; where the format tells no voxel size they count voxels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from pipeline.errors import InputError
from pipeline.scans.lazy import LazyScan
from pipeline.scans.registry import format_of, is_hdf5, is_zarr, open_lazy

NAME = "scan"
PARTIAL = "voxel_size_um_of"
_LARGEST_HULL_BYTES = 64 << 20


class ScanArray(BackendArray):
    """A LazyScan under xarray's indices; slices with a step are read piecewise, in bounded memory."""

    def __init__(self, scan: LazyScan) -> None:
        self.scan = scan
        self.shape = scan.shape
        self.dtype = scan.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 xarray's own contract
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | np.integer[Any] | slice, ...]) -> NDArray[Any]:
        """Return the voxels under integers and slices."""
        picked = tuple(
            range(*k.indices(n)) if isinstance(k, slice) else range(int(k) % n, int(k) % n + 1)
            for k, n in zip(key, self.shape, strict=True)
        )
        voxels = self._strided(picked)
        return voxels[tuple(slice(None) if isinstance(k, slice) else 0 for k in key)]

    def _strided(self, picked: tuple[range, ...]) -> NDArray[Any]:
        """Return the voxels at every combination of positions; halved until what lies between them is small."""
        hull = tuple(slice(r[0], r[-1] + 1) if len(r) else slice(0, 0) for r in picked)
        n_bytes = self.dtype.itemsize * int(np.prod([s.stop - s.start for s in hull], dtype=np.float64))
        stepped = [axis for axis, r in enumerate(picked) if len(r) > 1 and r.step > 1]
        if stepped and n_bytes > _LARGEST_HULL_BYTES:
            axis = max(stepped, key=lambda a: hull[a].stop - hull[a].start)
            half = len(picked[axis]) // 2
            parts = [picked[axis][:half], picked[axis][half:]]
            halves = [self._strided((*picked[:axis], part, *picked[axis + 1 :])) for part in parts]
            return np.concatenate(halves, axis=axis)
        voxels = self.scan.read(hull)
        return voxels[tuple(slice(None, None, max(r.step, 1)) for r in picked)]


class HalosegBackend(BackendEntrypoint):
    """Any scan that haloseg reads, as a dataset of one variable, "scan"."""

    description = "Scans of microscopes and volume instruments, lazily (TIFF, OME-Zarr, HDF5, NumPy, slices)"
    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(  # type: ignore[override]
        self, filename_or_obj: str | os.PathLike[str], *, drop_variables: str | Iterable[str] | None = None
    ) -> xr.Dataset:
        """Return the scan as a dataset; see ``open_scan``."""
        data = xr.Dataset({NAME: _variable(open_lazy(os.fspath(filename_or_obj)))})
        data = data.assign_coords(_coordinates(data[NAME]))
        return data.drop_vars(drop_variables or [])

    def guess_can_open(self, filename_or_obj: Any) -> bool:  # noqa: ANN401 xarray asks about anything
        """Whether this is surely a scan; HDF5 and Zarr without a named dataset are left to their own engines."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        path = os.fspath(filename_or_obj)
        try:
            return "::" in path or (format_of(path) is not None and not is_hdf5(path) and not is_zarr(path))
        except (InputError, OSError):
            return False


def open_scan(path: str | os.PathLike[str]) -> xr.DataArray:
    """Return a scan of any format, lazily indexed.

    Parameters
    ----------
    path : file, folder or glob of slices, ``FILE.h5::DATASET``, or path or URL of an OME-Zarr

    Returns
    -------
    xr.DataArray : the dtype of the file; axes out of c, z, y, x in this order; attributes ``format`` and, if the format
        tells it, ``voxel_size_um``, one float per spatial axis, or, for some of them alone, ``voxel_size_um_of`` by
        axis; no voxel is kept after it was given out

    Raises
    ------
    ScanError : no scan is there, it is damaged, or of a kind that cannot be read; one line.
    """
    scan = HalosegBackend().open_dataset(path)[NAME]
    scan.encoding["source"] = os.fspath(path)
    return scan


def _variable(scan: LazyScan) -> xr.Variable:
    attrs: dict[str, Any] = {"format": scan.format}
    if scan.voxel_size_um is not None:
        attrs["voxel_size_um"] = scan.voxel_size_um
    if scan.partial_um:
        attrs[PARTIAL] = dict(scan.partial_um)
    chunks = dict(zip(scan.dims, scan.chunks, strict=True))
    data = indexing.LazilyIndexedArray(ScanArray(scan))
    return xr.Variable(scan.dims, data, attrs, {"preferred_chunks": chunks})


def _coordinates(scan: xr.DataArray) -> dict[str, xr.Variable]:
    """Return the positions of the voxels along each spatial axis."""
    dims = tuple(str(d) for d in scan.dims if d != "c")
    size = scan.attrs.get("voxel_size_um")
    unit = "voxel" if size is None else "micrometer"
    steps = size or (1.0,) * len(dims)
    return {
        d: xr.Variable((d,), np.arange(scan.sizes[d]) * step, {"units": unit})
        for d, step in zip(dims, steps, strict=True)
    }
