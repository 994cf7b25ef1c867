"""The one place that knows what "mirror" means: the edge voxel is not repeated (numpy's and torch's "reflect").

    scan       a b c d
    mirrored   c b | a b c d | c b a b ...

SciPy calls this "mirror"; Dask's and SciPy's "reflect" repeat the edge voxel and are not meant.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry.box import Box


class Sliceable(Protocol):
    """Anything with a shape that a tuple of slices reads from: numpy, zarr, h5py, xarray variables."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Any:  # noqa: ANN401 each library returns its own array type
        """Return the voxels under the slices."""
        ...


def mirror_index(start: int, stop: int, size: int) -> NDArray[np.intp]:
    """Return for positions ``start..stop`` the voxels 0..size-1 that they show, mirrored as often as needed.

    An axis of length one shows its single voxel everywhere.
    """
    at = np.arange(start, stop, dtype=np.intp)
    if size == 1:
        return np.zeros_like(at)
    period = 2 * (size - 1)
    at %= period
    return np.minimum(at, period - at)


def read_mirrored(array: Sliceable, box: Box) -> NDArray[Any]:
    """Return the voxels of ``box``, mirrored outside the volume; only what is needed is read, in one read.

    Parameters
    ----------
    array : shape (..., *spatial); the box is over the last axes, those in front are read whole
    box : may reach outside the volume, by more than its size

    Returns
    -------
    array of shape (..., *box.shape) and the dtype of ``array``
    """
    n_front = len(array.shape) - box.ndim
    spatial = array.shape[n_front:]
    if all(a >= 0 and b <= n for a, b, n in zip(box.start, box.stop, spatial, strict=True)):
        return np.asarray(array[(slice(None),) * n_front + box.slices])
    needed = [mirror_index(a, b, n) for a, b, n in zip(box.start, box.stop, spatial, strict=True)]
    inner = tuple(slice(int(i.min()), int(i.max()) + 1) for i in needed)
    voxels = np.asarray(array[(slice(None),) * n_front + inner])
    for axis, (index, read) in enumerate(zip(needed, inner, strict=True), start=n_front):
        voxels = voxels.take(index - read.start, axis=axis)
    return voxels
