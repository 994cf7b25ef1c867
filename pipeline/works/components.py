"""The works of stitching: which classes there are, the components of each block, and the instances they become.

A provisional id of 8 bytes for each voxel, which is what is stored elsewhere between finding components and joining
them, would be written, read and written again. Here a block keeps but a record: how large its components are, where
they begin, and its outermost planes of ids. They are joined by those, and the block finds its components a second time,
which takes less than reading ids would, and writes its shard once.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord, peak_rss_bytes
from pipeline.errors import RunError
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.labels.components import Components, coded, components
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.location import Location, storage_errors
from pipeline.store.reading import open_voxels


@dataclass(frozen=True, slots=True)
class FoundValues(BlockRecord):
    """A finished block, and the values that it holds: all of them, or one more than are of interest."""

    values: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ValueBlocks:
    """The work of finding the values of a label volume; see BlockWork."""

    uses_device: ClassVar[bool] = False
    source: Location
    grid: BlockGrid
    n_most: int

    def setup(self) -> Any:  # noqa: ANN401
        """Open the labels."""
        return open_voxels(self.source)

    def run(self, state: Any, index: int) -> FoundValues:  # noqa: ANN401
        """Find the values of one block."""
        beat()
        core, begin = self.grid.block(index).core, perf_counter()
        voxels = np.asarray(state[core.slices])
        read = perf_counter()
        found = tuple(map(int, np.unique(voxels)[: self.n_most + 1].tolist()))  # of uint64 too
        return FoundValues(
            index, core.n_voxels, read - begin, perf_counter() - read, 0.0, peak_rss_bytes(),
            n_voxels_read=core.n_voxels, values=found,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class BlockComponents:
    """What is known of a block's components.

    Attributes
    ----------
    n_voxels : int64, (n,)
    firsts : int64, (n,), ascending: the index of each one's first voxel in the whole volume, in C order
    borders : bool, (n,): lies at a face that the block shares with another one
    """

    n_voxels: NDArray[np.int64]
    firsts: NDArray[np.int64]
    borders: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """The outermost plane of a block's ids, and the classes of components 1, 2, ... of the block."""

    ids: NDArray[np.unsignedinteger[Any]]
    classes: NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Records:
    """What was found of each block, and what becomes of its components, until all is published.

    Each in a file of its own, in this folder:

        records/INDEX.npz    its components, and the planes of ids at the faces that it shares
        tables/INDEX.npz     the final id of components 0 (none), 1, 2, ...; 0 of one that is too small
        joined.json          how many instances there are; tables are complete where this is
    """

    folder: Location

    def put(self, block: Block, found: Components, grid: BlockGrid) -> None:
        """Keep what was found in a block."""
        inside = np.unravel_index(found.firsts, block.core.shape)
        at = tuple(a + start for a, start in zip(inside, block.core.start, strict=True))
        parts = {
            "n_voxels": found.n_voxels, "firsts": np.ravel_multi_index(at, grid.shape), "classes": found.classes,
            "borders": np.zeros(len(found), np.bool_),
        }  # fmt: skip
        for axis, (position, n) in enumerate(zip(block.position, grid.grid_shape, strict=True)):
            for side, plane, is_shared in (("start", 0, position > 0), ("stop", -1, position < n - 1)):
                if is_shared:
                    ids = np.take(found.ids, plane, axis=axis)
                    parts[f"{side}{axis}"] = ids
                    parts["borders"][ids[ids != 0].astype(np.intp) - 1] = True
        self._write("records", block.index, **parts)

    def recorded(self) -> set[int]:
        """Return the blocks that there are records of."""
        stems = (key.removesuffix(".npz") for key in (self.folder / "records").files())
        return {int(stem) for stem in stems if stem.isdigit()}

    def of(self, index: int) -> BlockComponents:
        """Return what was found in a block."""
        with self._read("records", index) as parts:
            return BlockComponents(parts["n_voxels"], parts["firsts"], parts["borders"])

    def face(self, index: int, *, axis: int, side: str) -> Face:
        """Return the plane at a block's "start" or "stop" along an axis, where another block lies behind it."""
        with self._read("records", index) as parts:
            return Face(parts[f"{side}{axis}"], parts["classes"])

    def put_table(self, index: int, table: NDArray[np.uint64]) -> None:
        """Keep the final ids of a block's components."""
        self._write("tables", index, table=table)

    def table(self, index: int) -> NDArray[np.uint64]:
        """Return the final ids of a block's components."""
        with self._read("tables", index) as parts:
            table: NDArray[np.uint64] = parts["table"]
        return table

    def _write(self, kind: str, index: int, **parts: Any) -> None:  # noqa: ANN401 arrays
        stream = io.BytesIO()
        np.savez_compressed(stream, **parts)
        (self.folder / kind / f"{index}.npz").write_bytes(stream.getvalue())

    def _read(self, kind: str, index: int) -> Any:  # noqa: ANN401 numpy does not name the type
        content = (self.folder / kind / f"{index}.npz").read_bytes()
        return np.load(io.BytesIO(content), allow_pickle=False)


@dataclass(frozen=True, slots=True)
class ComponentBlocks:
    """The work of finding the components of blocks; see BlockWork.

    Attributes
    ----------
    source : the array of class labels
    values : those whose components are wanted
    """

    uses_device: ClassVar[bool] = False
    source: Location
    grid: BlockGrid
    values: tuple[int, ...]
    records: Records

    def setup(self) -> Any:  # noqa: ANN401
        """Open the class labels."""
        return open_voxels(self.source)

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Find the components of one block, and keep its record."""
        beat()
        block, begin = self.grid.block(index), perf_counter()
        voxels = np.asarray(state[block.core.slices])
        read = perf_counter()
        found = components(coded(voxels, self.values))
        computed = perf_counter()
        with storage_errors(self.records.folder):
            self.records.put(block, found, self.grid)
        return BlockRecord(
            index, block.core.n_voxels, read - begin, computed - read, perf_counter() - computed, peak_rss_bytes(),
            n_voxels_read=block.core.n_voxels,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstanceBlocks:
    """The work of writing blocks of instances, once all components are joined; see BlockWork."""

    uses_device: ClassVar[bool] = False
    found: ComponentBlocks
    target: Location

    @property
    def grid(self) -> BlockGrid:
        """The blocks: shards of the class labels and of the instances."""
        return self.found.grid

    def setup(self) -> Any:  # noqa: ANN401
        """Open both arrays."""
        return open_voxels(self.found.source), open_array(self.target)

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Find the components of one block again, and write their final ids as one shard."""
        beat()
        source, target = state
        core, begin = self.grid.block(index).core, perf_counter()
        table, voxels = self.found.records.table(index), np.asarray(source[core.slices])
        read = perf_counter()
        instances = self._translated(index, coded(voxels, self.found.values), table)
        computed = perf_counter()
        with storage_errors(self.target):
            write_shard(target, core, instances, location=self.target)
        return BlockRecord(
            index, core.n_voxels, read - begin, computed - read, perf_counter() - computed, peak_rss_bytes(),
            n_voxels_read=core.n_voxels,
        )  # fmt: skip

    def _translated(
        self, index: int, codes: NDArray[np.unsignedinteger[Any]], table: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """Return the final ids of a block's components, of the block's shape."""
        found = components(codes)
        if len(table) != len(found) + 1:
            raise RunError(
                f"labels must stay the same while they are stitched, got {len(found)} components in block {index}, was "
                f"{len(table) - 1}; delete {self.target.parent} and run the same command again"
            )
        instances = np.empty(codes.shape, np.uint64)
        for plane, ids in zip(instances, found.ids, strict=True):  # at once, it would take 8 bytes more of each voxel
            plane[...] = table[ids]
        return instances
