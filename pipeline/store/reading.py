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


ChunkCache = tensorstore.Context


def chunk_cache(n_bytes: int) -> ChunkCache:
    """Return what holds the decoded chunks that were read last, ``n_bytes`` of them, of all arrays opened with it.

    Arrays that are pickled together have one of their own where they go, as large and empty.
    """
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": n_bytes}})


def open_voxels(location: Location, *, cache: ChunkCache | None = None) -> Any:  # noqa: ANN401 zarr.Array or LocalVoxels
    """Return the array here for reading only, an object with shape, dtype, chunks and [].

    Parameters
    ----------
    cache : of chunks on a local disk, for what is read in no order; what others write meanwhile may go unseen

    Raises
    ------
    StoreError : there is none.
    """
    array = open_array(location)
    if not location.is_local:
        return array
    kvstore = {"driver": "file", "path": f"{location.absolute()}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": cache is None or "open"}
    store = tensorstore.open(spec, read=True, open=True, context=cache).result()
    return LocalVoxels(store, tuple(array.chunks))
