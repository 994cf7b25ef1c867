"""SegmentSource: voxels of a TIFF that lie in tiles or strips; only those that a slice touches are read and decoded.

Every page is seen along five axes: separate samples, depth, length, width, contiguous samples. A segment (tile or
strip) covers a box of them, and segments are numbered in C order over the first four:

    |-- width --|-----------|----|
    |  segment 0|     1     | 2  |    length; the last ones may reach outside the page
    |     3     |     4     | 5  |
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.cache import DECODED
from pipeline.scans.files import Read, by_ranges, fetched, is_remote
from pipeline.scans.lazy import damaged
from pipeline.scans.scratch import Pieces
from pipeline.scans.tiff_inflate import Inflate

Decode = Callable[..., tuple[NDArray[Any] | None, tuple[int, ...], tuple[int, ...]]]
Wanted = tuple[NDArray[Any], int, int]  # where voxels go, and the numbers of the page and the segment they come from

_AT_ONCE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Page:
    """Where the segments of one page lie in the file, in bytes, and what their decoder needs besides."""

    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    decode: Decode
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SegmentSource:
    """The pages of one image; see VoxelSource.

    Attributes
    ----------
    shape : voxels along each axis of the image
    places : for each axis of the image the page's axis (0 to 4), or None if it counts pages
    page_shape, segment_shape : voxels along the page's five axes
    nodata : what a segment that was never written shows
    stamp : what the file was when it was opened; decoded segments are remembered under it
    reopen : function that makes this source again from its path, in another process
    inflate : what decodes segments, which are long, some rows at a time; None where they are decoded whole
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    places: tuple[int | None, ...]
    page_shape: tuple[int, ...]
    segment_shape: tuple[int, ...]
    pages: tuple[Page, ...]
    nodata: float
    stamp: tuple[int, str]
    reopen: Callable[[str], Any]
    inflate: Inflate | None = None

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return self.reopen, (self.path,)

    @property
    def chunks(self) -> tuple[int, ...]:
        """What can be read alone: a page along the axes that count pages, a segment along the others."""
        return tuple(
            1 if p is None else min(self.segment_shape[p], n) for p, n in zip(self.places, self.shape, strict=True)
        )

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        lengths = tuple(s.stop - s.start for s in slices)
        inside = [slice(0, 1)] * 5
        for place, part in zip(self.places, slices, strict=True):
            if place is not None:
                inside[place] = part
        pages = self._page_numbers(slices)
        voxels = np.empty((len(pages), *(s.stop - s.start for s in inside)), self.dtype)
        wanted = [
            (target, number, segment)
            for number, target in zip(pages, voxels, strict=True) for segment in self._touched(inside)
        ]  # fmt: skip
        for batch in self._parts(wanted):
            with self._reader(batch) as read:
                for target, number, segment in batch:
                    self._paste(target, self._decoded(read, page=number, segment=segment, inside=inside), inside=inside)
        return voxels.reshape(lengths)

    def _parts(self, wanted: list[Wanted]) -> Iterator[list[Wanted]]:
        """Yield what is wanted in parts of bounded size in the file, each of which is fetched at once."""
        part, n_bytes = list[Wanted](), 0
        for each in wanted:
            part.append(each)
            n_bytes += self.pages[each[1]].counts[each[2]]
            if n_bytes >= _AT_ONCE_BYTES:
                yield part
                part, n_bytes = [], 0
        if part:
            yield part

    @contextmanager
    def _reader(self, wanted: list[Wanted]) -> Iterator[Read]:
        """Yield what reads segments; of a remote file, all that are not decoded yet are asked for at once."""
        if self.inflate or not is_remote(self.path):
            with by_ranges(self.path) as read:
                yield read
            return
        places = [
            (self.pages[number].offsets[segment], self.pages[number].counts[segment]) for _, number, segment in wanted
            if self.pages[number].counts[segment] and (self.path, self.stamp, number, segment) not in DECODED
        ]  # fmt: skip
        ahead = _in_one_piece(self.path, places)
        with by_ranges(self.path) as read:
            yield lambda start, n_bytes: ahead.pop((start, n_bytes), None) or read(start, n_bytes)

    def check_first(self) -> None:
        """Decode the first segment that was written, or its first rows: a file of unknown compression fails here."""
        first = self.pages[0]
        segment = next((at for at, count in enumerate(first.counts) if count), None)
        if segment is None:
            return
        with by_ranges(self.path) as read:
            if self.inflate:
                *_, shape = first.decode(None, segment, **first.options)
                next(self.inflate(read, first.offsets[segment], first.counts[segment], shape))
            else:
                self._decoded(read, page=0, segment=segment, inside=[slice(0, 1)] * 5)

    def _page_numbers(self, slices: tuple[slice, ...]) -> list[int]:
        """Return the pages under the slices; pages are in C order over the axes that count them."""
        counting = [(s, n) for s, n, p in zip(slices, self.shape, self.places, strict=True) if p is None]
        numbers = [0]
        for part, size in counting:
            numbers = [number * size + i for number in numbers for i in range(part.start, part.stop)]
        return numbers

    def _touched(self, inside: list[slice]) -> Iterator[int]:
        """Yield the segments of a page that a box touches."""
        grid = [math.ceil(n / s) for n, s in zip(self.page_shape[:4], self.segment_shape[:4], strict=True)]
        spans = [
            range(part.start // s, (part.stop - 1) // s + 1)
            for part, s in zip(inside[:4], self.segment_shape[:4], strict=True)
        ]
        for s, d, y, x in product(*spans):
            yield ((s * grid[1] + d) * grid[2] + y) * grid[3] + x

    def _decoded(
        self, read: Read, *, page: int, segment: int, inside: list[slice]
    ) -> tuple[NDArray[Any], tuple[int, ...]]:
        """Return a segment (depth, length, width, contiguous samples) that a box touches, and its start in the page."""
        what = self.pages[page]
        if not what.counts[segment]:
            _, start, shape = what.decode(None, segment, **what.options)
            return np.full(shape, self.nodata, self.dtype), start

        def make() -> NDArray[Any]:
            data = read(what.offsets[segment], what.counts[segment])
            if len(data) < what.counts[segment]:
                raise damaged(self.path, cause=f"page {page} ends in the middle of segment {segment}")
            voxels = what.decode(data, segment, **what.options)[0]
            if voxels is None:
                raise damaged(self.path, cause=f"segment {segment} of page {page} holds no voxels")
            return voxels

        _, start, shape = what.decode(None, segment, **what.options)
        ends = zip(inside, start, (1, *shape), self.page_shape, strict=True)
        in_part = any(first < s.start or s.stop < min(first + n, most) for s, first, n, most in ends)
        place, inflate = (what.offsets[segment], what.counts[segment]), self.inflate
        pieces = Pieces(lambda: inflate(read, *place, shape), self.dtype, shape) if inflate else None
        return DECODED.get((self.path, self.stamp, page, segment), make, again=in_part, pieces=pieces), start

    def _paste(
        self, target: NDArray[Any], decoded: tuple[NDArray[Any], tuple[int, ...]], *, inside: list[slice]
    ) -> None:
        """Copy what a segment and a box have in common into the box."""
        voxels, start = decoded
        into, part = [], []
        for axis, wanted in enumerate(inside):
            first = start[axis]
            stop = min(first + (1, *voxels.shape)[axis], self.page_shape[axis], wanted.stop)
            begin = max(first, wanted.start)
            into.append(slice(begin - wanted.start, stop - wanted.start))
            part.append(slice(begin - first, stop - first))
        target[tuple(into)] = voxels[np.newaxis][tuple(part)]


def _in_one_piece(url: str, places: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """Return the bytes at places (start, so many) of a remote file; those that lie end to end are asked for as one."""
    spans = list[tuple[int, int]]()
    for start, n_bytes in sorted(set(places)):
        begin = spans.pop()[0] if spans and spans[-1][1] == start else start
        spans.append((begin, start + n_bytes))
    pieces = dict(zip(spans, fetched(url, spans), strict=True)) if spans else {}
    begins, found = [begin for begin, _ in spans], dict[tuple[int, int], bytes]()
    for start, n_bytes in places:
        span = spans[bisect_right(begins, start) - 1]
        found[start, n_bytes] = pieces[span][start - span[0] : start - span[0] + n_bytes]
    return found
