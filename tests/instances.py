"""What the tests of instances share: class labels as a run makes them, and the components of a whole volume at once."""

import numpy as np
from scipy import ndimage

from pipeline.compute.levels import build_levels
from pipeline.compute.runner import run_serial
from pipeline.compute.watch import UNWATCHED
from pipeline.geometry.grid import BlockGrid
from pipeline.ingest import ingest
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.labels import Labels, create_labels, label_location, publish
from pipeline.store.pyramid import Downsampling


def whole(voxels, values, *, min_voxels=1):
    """Return the components of each of some values by SciPy, numbered by their first voxels, without small ones."""
    together, n = np.zeros(voxels.shape, np.int64), 0
    for value in values:
        ids, found = ndimage.label(voxels == value)
        together[ids > 0] = ids[ids > 0] + n
        n += found
    every, firsts, at, counts = np.unique(together, return_index=True, return_inverse=True, return_counts=True)
    kept = np.flatnonzero((every > 0) & (counts >= min_voxels))
    table = np.zeros(len(every), np.uint64)
    table[kept[np.argsort(firsts[kept])]] = 1 + np.arange(len(kept))
    return table[at].reshape(voxels.shape)


def class_labels(folder, voxels, *, block, name="cells", classes=(), chunk=None, image=None):
    """Write an image whose labels of this name hold the voxels, with shards of this shape; returns the image's path."""
    image = image or str(folder / "scan.zarr")
    shard = (block,) * voxels.ndim if isinstance(block, int) else tuple(block)
    np.save(folder / "scan.npy", np.zeros(voxels.shape, np.uint8))
    made = ingest(str(folder / "scan.npy"), image, chunk=chunk or shard, shard=shard)
    add_labels(made, voxels, name=name, classes=classes)
    return image


def add_labels(image, voxels, *, name, classes=(), seed=1):
    """Write complete labels of an image, as a model does that has these classes; without names as ingest does."""
    at = label_location(image.location, name)
    labels = Labels(
        at, image.axes[1:], str(voxels.dtype), image.layout, image.levels, {"seed": seed}, classes,
        tuple(range(len(classes))),
    )  # fmt: skip
    create_labels(image, labels)
    array = open_array(at / "0")
    for block in BlockGrid(voxels.shape, image.layout.shard):
        write_shard(array, block.core, voxels[block.core.slices], location=at / "0")
    build_levels(at, labels.levels, layout=labels.layout, how=Downsampling.MODE, run=run_serial, watch=UNWATCHED)
    publish(image, labels)


def snake(shape):
    """Return a path of 1 that is one voxel wide and winds through a whole volume, along its first axis last."""
    voxels, to_end = np.zeros(shape, np.uint8), True
    if len(shape) == 1:
        return voxels + 1
    for at in range(0, shape[0], 2):
        plane = snake(shape[1:])
        voxels[at] = plane
        end = np.argwhere(plane)[-1] if to_end else np.argwhere(plane)[0]
        if at + 2 < shape[0]:
            voxels[(at + 1, *end)] = 1
        to_end = not to_end
    return voxels


def checkerboard(shape):
    """Return a volume of 1 and 0 in turn: no two voxels of 1 share a face."""
    return (np.indices(shape).sum(axis=0) % 2).astype(np.uint8)
