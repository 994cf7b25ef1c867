"""HDF5 datasets: ``FILE.h5::DATASET``, or the file alone when it holds one dataset of 2 to 4 axes.

Axes are taken from the dataset's dimension labels or ilastik's ``axistags`` if either is there, else they are told by
``axes.unlabelled``. The attribute ``element_size_um`` (ilastik, PlantSeg; z, y, x) tells the voxel size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.axes import arrange, unlabelled
from pipeline.scans.files import is_remote, opened
from pipeline.scans.lazy import LazyScan
from pipeline.scans.mapped import LINE

try:
    import h5py
except ImportError as missing:
    raise ScanError('HDF5 scans need the package h5py, which is missing; pip install "haloseg[hdf5]"') from missing


@dataclass(frozen=True, slots=True)
class HDF5Source:
    """One dataset of an HDF5 file; see VoxelSource. The file is opened for each read, so that no handle lives on."""

    path: str
    dataset: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        with _opened(self.path) as file:
            return np.asarray(file[self.dataset][slices])


def open_hdf5(path: str, /) -> LazyScan:
    """Return the scan in a dataset of an HDF5 file.

    Raises
    ------
    ScanError : no such dataset, or several and none is named; the message lists them.
    """
    file_path, _, wanted = path.partition("::")
    with _opened(file_path) as file:
        found = _datasets(file)
        name = _chosen(wanted.strip("/"), found, path=path)
        data = file[name]
        shape = tuple(int(n) for n in data.shape)
        chunks = data.chunks or (*(1,) * (len(shape) - 1), min(shape[-1], LINE))
        source = HDF5Source(file_path, name, data.dtype, shape, chunks)
        axes, size = _labels(data) or unlabelled(shape, path=path), _voxel_size_um(data.attrs)
    return arrange(source, axes=axes, path=path, format_name="HDF5", voxel_size_um=size)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    if is_remote(path):
        with opened(path) as raw, h5py.File(raw, "r") as file:
            yield file
        return
    # File systems of clusters often know no locks; we only read.
    with h5py.File(path, "r", locking="best-effort") as file:
        yield file


def _datasets(file: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    """Return name and shape of every dataset of 2 to 4 axes."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, item: Any) -> None:  # noqa: ANN401
        if isinstance(item, h5py.Dataset) and item.shape is not None and 2 <= len(item.shape) <= 4:
            found[name] = tuple(item.shape)

    file.visititems(note)
    return found


def _chosen(wanted: str, found: Mapping[str, tuple[int, ...]], *, path: str) -> str:
    """Return the dataset that is named, or the only one."""
    if wanted in found:
        return wanted
    if not wanted and len(found) == 1:
        return next(iter(found))
    listed = ", ".join(f"{name} {shape}" for name, shape in sorted(found.items())) or "none"
    raise ScanError(
        f"an HDF5 scan must name one dataset of 2 to 4 axes as FILE::DATASET, got {path}; the file holds: {listed}"
    )


def _labels(data: Any) -> str | None:  # noqa: ANN401
    """Return the letters of the axes if the dataset names them all."""
    if "axistags" in data.attrs:
        tags = json.loads(data.attrs["axistags"])
        named = [str(tag.get("key", "")) for tag in tags["axes"]]
    else:
        named = [str(dim.label) for dim in data.dims]
    return "".join(n.upper() for n in named) if all(len(n) == 1 for n in named) else None


def _voxel_size_um(attrs: Mapping[str, Any]) -> dict[str, float]:
    sizes = np.ravel(attrs.get("element_size_um", ()))
    return dict(zip("zyx"[-len(sizes) :], map(float, sizes), strict=True)) if len(sizes) in (2, 3) else {}
