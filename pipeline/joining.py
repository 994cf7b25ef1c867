"""Joining: the components of all blocks become instances, numbered by their first voxels, whatever the blocks.

What is held at once: of components that lie at a face two numbers and the set that they are of; of the others those of
one row of blocks, all that have the same place along the first axis. No voxel of a later row comes before this one's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import Watcher
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.labels.merges import sets_of, touching
from pipeline.works.components import BlockComponents, Records

Longs = NDArray[np.int64]
A = TypeVar("A")
B = TypeVar("B")

_N_AT_ONCE = 8  # blocks whose files are read or written at once: storage may be slow to answer


@dataclass(frozen=True, slots=True, eq=False)
class _Borders:
    """The components that lie at faces, in the order of their blocks.

    Attributes
    ----------
    begins : (blocks + 1,): where those of each block begin in the other arrays
    sets : which of them each one is joined to, the first of its set
    n_voxels, firsts : of the whole instance, at the place of the first of its set
    """

    begins: Longs
    sets: Longs
    n_voxels: Longs
    firsts: Longs


@dataclass(frozen=True, slots=True, eq=False)
class _Across:
    """The components that touch across the face between a block and an earlier one: int64, (pairs, 2), ids in each."""

    before: int
    axis: int
    ids: Longs


def join(records: Records, grid: BlockGrid, *, min_voxels: int, watch: Watcher) -> int:
    """Write the table of every block, which holds the instance of each of its components; returns how many there are.

    Instances are numbered from 1, without a gap, in the order of their first voxels; smaller ones than ``min_voxels``
    are left out.
    """
    watch.begin("join", n_blocks=2 * len(grid), n_done=0)
    with ThreadPoolExecutor(_N_AT_ONCE, thread_name_prefix="haloseg-join") as pool:
        borders = _joined(records, grid, pool=pool, watch=watch)
        return _numbered(records, grid, borders, min_voxels=min_voxels, pool=pool, watch=watch)


def _joined(records: Records, grid: BlockGrid, *, pool: ThreadPoolExecutor, watch: Watcher) -> _Borders:
    """Return the components that lie at faces, joined across them.

    ``places`` tell where each component of a block stands among all that lie at faces; they are dropped once the block
    behind along the first axis, which is the last one to touch it, has been compared.
    """

    def seen(block: Block) -> tuple[BlockComponents, list[_Across]]:
        return records.of(block.index), list(_across(records, grid, block))

    begins, n_voxels, firsts = [0], list[Longs](), list[Longs]()
    places, pairs = dict[int, Longs](), [np.zeros((0, 2), np.int64)]
    for index, (found, across) in enumerate(_each(pool, seen, grid)):
        n_voxels.append(found.n_voxels[found.borders])
        firsts.append(found.firsts[found.borders])
        places[index] = begins[-1] - 1 + np.cumsum(found.borders)
        begins.append(begins[-1] + int(found.borders.sum()))
        for face in across:
            before, behind = (face.ids - 1).T
            pairs.append(np.stack([places[face.before][before], places[index][behind]], axis=1))
            if face.axis == 0:
                del places[face.before]
        watch.advance(BlockRecord(index, 0, 0.0, 0.0, 0.0))
    sizes, first = np.concatenate(n_voxels), np.concatenate(firsts)
    sets = sets_of(np.concatenate(pairs), len(sizes))
    total, earliest = np.zeros_like(sizes), first.copy()
    np.add.at(total, sets, sizes)
    np.minimum.at(earliest, sets, first)
    return _Borders(np.array(begins), sets, total, earliest)


def _across(records: Records, grid: BlockGrid, block: Block) -> Iterator[_Across]:
    """Yield what touches across each face between a block and an earlier one."""
    for axis, at in enumerate(block.position):
        if at:
            before = grid.index_of((*block.position[:axis], at - 1, *block.position[axis + 1 :]))
            upper = records.face(before, axis=axis, side="stop")
            lower = records.face(block.index, axis=axis, side="start")
            ids = touching(upper.ids, lower.ids, classes_before=upper.classes, classes_behind=lower.classes)
            yield _Across(before, axis, ids)


def _numbered(
    records: Records, grid: BlockGrid, borders: _Borders, *, min_voxels: int, pool: ThreadPoolExecutor, watch: Watcher
) -> int:
    """Write all tables, row by row of blocks; returns how many instances there are."""
    is_first = borders.sets == np.arange(len(borders.sets))
    of_first = np.flatnonzero(is_first & (borders.n_voxels >= min_voxels))  # row by row, as blocks are
    rows = borders.firsts[of_first] // (grid.core_shape[0] * prod(grid.shape[1:]))
    of_border, n_instances = np.zeros(len(borders.sets), np.uint64), 0
    n_blocks = len(grid) // grid.grid_shape[0]
    for row in range(grid.grid_shape[0]):
        indices = range(row * n_blocks, (row + 1) * n_blocks)
        known = dict(zip(indices, _each(pool, records.of, indices), strict=True))
        begun = of_first[np.searchsorted(rows, row) : np.searchsorted(rows, row + 1)]
        inner = [each.firsts[_alone(each, min_voxels)] for each in known.values()]
        firsts = np.sort(np.concatenate([borders.firsts[begun], *inner]))
        of_border[begun] = n_instances + 1 + np.searchsorted(firsts, borders.firsts[begun])

        tables = _Row(records, known, firsts, n_instances, borders, of_border, min_voxels)
        for index in _each(pool, tables.write, indices):
            watch.advance(BlockRecord(index, 0, 0.0, 0.0, 0.0))
        n_instances += len(firsts)
    return n_instances


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """What the tables of a row of blocks are made of.

    Attributes
    ----------
    known : what was found in each of the blocks; let go of block by block
    firsts : ascending: where the instances begin that begin in this row
    n_before : instances that begin in earlier rows
    of_border : the instance of each of the components that lie at faces, at the place of the first of its set
    """

    records: Records
    known: dict[int, BlockComponents]
    firsts: Longs
    n_before: int
    borders: _Borders
    of_border: NDArray[np.uint64]
    min_voxels: int

    def write(self, index: int) -> int:
        """Write the table of a block; returns the block."""
        found, border = self.known.pop(index), slice(*self.borders.begins[index : index + 2])
        ids, alone = np.zeros(1 + len(found.firsts), np.uint64), _alone(found, self.min_voxels)
        ids[1:][alone] = self.n_before + 1 + np.searchsorted(self.firsts, found.firsts[alone])
        ids[1:][found.borders] = self.of_border[self.borders.sets[border]]
        self.records.put_table(index, ids)
        return index


def _alone(found: BlockComponents, min_voxels: int) -> NDArray[np.bool_]:
    """Return which components of a block are instances by themselves, and are large enough."""
    return ~found.borders & (found.n_voxels >= min_voxels)


def _each(pool: ThreadPoolExecutor, do: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Yield what each item comes to, in their order; some are at work at once."""
    at_work = deque[Future[B]]()
    for item in items:
        at_work.append(pool.submit(do, item))
        if len(at_work) == _N_AT_ONCE:
            beat()
            yield at_work.popleft().result()
    while at_work:
        yield at_work.popleft().result()
