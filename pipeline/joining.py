"""Joining: the components of all blocks become instances, numbered by their first voxels, whatever the blocks.

What is held at once: of components that lie at a face two numbers and the set that they are of; of the others those of
one row of blocks, all that have the same place along the first axis. No voxel of a later row comes before this one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord
from pipeline.compute.watch import Watcher
from pipeline.geometry.grid import Block, BlockGrid
from pipeline.labels.merges import sets_of, touching
from pipeline.works.components import BlockComponents, Records

Longs = NDArray[np.int64]


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


def join(records: Records, grid: BlockGrid, *, min_voxels: int, watch: Watcher) -> int:
    """Write the table of every block, which holds the instance of each of its components; returns how many there are.

    Instances are numbered from 1, without a gap, in the order of their first voxels; smaller ones than ``min_voxels``
    are left out.
    """
    watch.begin("join", n_blocks=2 * len(grid), n_done=0)
    borders = _joined(records, grid, watch=watch)
    is_first = borders.sets == np.arange(len(borders.sets))
    numbered = np.flatnonzero(is_first & (borders.n_voxels >= min_voxels))  # row by row, as blocks are
    rows = borders.firsts[numbered] // (grid.core_shape[0] * prod(grid.shape[1:]))
    of_border, n_instances = np.zeros(len(borders.sets), np.uint64), 0
    for row, blocks in enumerate(_rows(grid)):
        known = {block.index: records.of(block.index) for block in blocks}
        begun = numbered[np.searchsorted(rows, row) : np.searchsorted(rows, row + 1)]
        inner = [each.firsts[_alone(each, min_voxels)] for each in known.values()]
        firsts = np.sort(np.concatenate([borders.firsts[begun], *inner]))
        of_border[begun] = n_instances + 1 + np.searchsorted(firsts, borders.firsts[begun])
        for block in blocks:
            beat()
            each, table = known.pop(block.index), slice(*borders.begins[block.index : block.index + 2])
            ids = np.zeros(1 + len(each.firsts), np.uint64)
            alone = _alone(each, min_voxels)
            ids[1:][alone] = n_instances + 1 + np.searchsorted(firsts, each.firsts[alone])
            ids[1:][each.borders] = of_border[borders.sets[table]]
            records.put_table(block.index, ids)
            watch.advance(BlockRecord(block.index, 0, 0.0, 0.0, 0.0))
        n_instances += len(firsts)
    return n_instances


def _rows(grid: BlockGrid) -> Iterator[list[Block]]:
    """Yield the blocks that have the same place along the first axis, row by row."""
    n_blocks = len(grid) // grid.grid_shape[0]
    for begin in range(0, len(grid), n_blocks):
        yield [grid.block(index) for index in range(begin, begin + n_blocks)]


def _alone(found: BlockComponents, min_voxels: int) -> NDArray[np.bool_]:
    """Return which components of a block are instances by themselves, and are large enough."""
    return ~found.borders & (found.n_voxels >= min_voxels)


def _joined(records: Records, grid: BlockGrid, *, watch: Watcher) -> _Borders:
    """Return the components that lie at faces, joined across them."""
    begins, n_voxels, firsts = [0], list[Longs](), list[Longs]()
    places, pairs = dict[int, Longs](), [np.zeros((0, 2), np.int64)]
    for block in grid:
        beat()
        found = records.of(block.index)
        n_voxels.append(found.n_voxels[found.borders])
        firsts.append(found.firsts[found.borders])
        places[block.index] = begins[-1] - 1 + np.cumsum(found.borders)
        begins.append(begins[-1] + int(found.borders.sum()))
        pairs += _across(records, grid, block, places=places)
        watch.advance(BlockRecord(block.index, 0, 0.0, 0.0, 0.0))
    sizes, first = np.concatenate(n_voxels), np.concatenate(firsts)
    sets = sets_of(np.concatenate(pairs), len(sizes))
    total, earliest = np.zeros_like(sizes), first.copy()
    np.add.at(total, sets, sizes)
    np.minimum.at(earliest, sets, first)
    return _Borders(np.array(begins), sets, total, earliest)


def _across(records: Records, grid: BlockGrid, block: Block, *, places: dict[int, Longs]) -> Iterator[Longs]:
    """Yield the pairs of border components that touch across each face between a block and an earlier one.

    ``places`` tell where each component of a block stands among all that lie at faces; they are dropped once the block
    behind along the first axis, which is the last one to touch it, has been compared.
    """
    for axis, at in enumerate(block.position):
        if at:
            position = (*block.position[:axis], at - 1, *block.position[axis + 1 :])
            before, behind = grid.index_of(position), block.index
            upper = records.face(before, axis=axis, side="stop")
            lower = records.face(behind, axis=axis, side="start")
            ids = touching(upper.ids, lower.ids, classes_before=upper.classes, classes_behind=lower.classes)
            yield np.stack([places[before][ids[:, 0] - 1], places[behind][ids[:, 1] - 1]], axis=1)
            if axis == 0:
                del places[before]
