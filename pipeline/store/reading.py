"""Reading: the fastest way to the voxels of an array on this machine's disks.

tensorstore reads our shards in several threads, past Python's lock; zarr-python reads what it does not, object stores
included. Writing stays zarr-python's: one whole shard, moved to its place at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray

from pipeline.store.arrays import open_array
from pipeline.store.location import Location


@dataclass(frozen=True, slots=True)
class LocalVoxels:
    """An array on a local disk, for reading; see geometry.mirror.Sliceable."""

    store: tensorstore.TensorStore
    chunks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one voxel."""
        return np.dtype(self.store.dtype.numpy_dtype)

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        voxels: NDArray[Any] = self.store[index].read().result()
        return voxels


def open_voxels(location: Location) -> Any:  # noqa: ANN401 zarr.Array or LocalVoxels: what has shape, dtype, chunks, []
    """Return the array here for reading only.

    Raises
    ------
    StoreError : there is none.
    """
    array = open_array(location)
    if not location.is_local:
        return array
    kvstore = {"driver": "file", "path": f"{location.absolute()}/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
    return LocalVoxels(store, tuple(array.chunks))
