"""Zarr as a scan: OME-Zarr 0.4 and 0.5 at full resolution, and plain arrays of Zarr v2 and v3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.axes import arrange, unlabelled
from pipeline.scans.bucket import knock
from pipeline.scans.lazy import LazyScan, damaged
from pipeline.store.location import Location
from pipeline.store.ngff import find_multiscales, spatial_scale_um

_NAMED = 10


@dataclass(slots=True)
class ZarrSource:
    """The voxels of one Zarr array; opened again by its path where it is unpickled. See VoxelSource."""

    location: Location
    _array: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> Location:
        return self.location

    def __setstate__(self, state: Location) -> None:
        self.location, self._array = state, None

    @property
    def array(self) -> zarr.Array[Any]:
        """The open array."""
        if self._array is None:
            self._array = zarr.open_array(str(self.location), mode="r")
        array: zarr.Array[Any] = self._array
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel."""
        return np.dtype(self.array.dtype)

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone."""
        return tuple(self.array.chunks)

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        return np.asarray(self.array[slices])


def open_zarr(path: str) -> LazyScan:
    """Return the scan at a path or URL of a Zarr array, an OME-Zarr, or a group with one array.

    Raises
    ------
    ScanError : there is no Zarr, or it holds no single image.
    """
    location = Location(path.rstrip("/"))
    knock(path)
    try:
        node = zarr.open(str(location), mode="r")
        if isinstance(node, zarr.Array):
            return _plain(ZarrSource(location), path=path)
        document = find_multiscales(dict(node.attrs))
        if document is None:
            return _plain(ZarrSource(location / _only_array(node, path)), path=path)
        return _ome(location, document, path=path)
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        if not location.exists():
            raise ScanError(f"a scan must exist, got {path}; check the path") from error
        raise damaged(path, cause=f"no readable Zarr ({type(error).__name__}: {error})") from error


def _only_array(group: zarr.Group, path: str) -> str:
    names = sorted(name for name, _ in group.arrays())
    if len(names) != 1:
        there = names or sorted(name for name, _ in group.groups())
        named = ", ".join(f"{path.rstrip('/')}/{name}" for name in there[:_NAMED]) or "an array or an OME-Zarr"
        got = f"{len(names)}" if names else "none but groups" if there else "none"
        raise ScanError(f"a Zarr group must hold one array, got {got} in {path}; give {named}")
    return names[0]


def _plain(source: ZarrSource, *, path: str) -> LazyScan:
    """Return an array without OME-Zarr metadata; its dimension names count where all of them are axes."""
    names = [str(name).upper() for name in getattr(source.array.metadata, "dimension_names", None) or ()]
    named = bool(names) and set(names) <= set("TCZYX")
    axes = "".join(names) if named else unlabelled(source.shape, path=path)
    return arrange(source, axes=axes, path=path, format_name="zarr")


def _ome(location: Location, document: dict[str, Any], *, path: str) -> LazyScan:
    axes = [each["name"] if isinstance(each, dict) else each for each in document.get("axes", "tczyx")]
    source = ZarrSource(location / document["datasets"][0]["path"])
    size = spatial_scale_um(document, axes)
    letters = "".join(str(axis).upper() for axis in axes)
    return arrange(source, axes=letters, path=path, format_name="ome-zarr", voxel_size_um=size)
