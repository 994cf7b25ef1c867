"""SegmentCache: decoded parts of files, so that neighbouring blocks decode them once.

They are kept in memory while they fit a budget; then those of which others will want more go on a disk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.scratch import Pieces, Scratch

BUDGET_BYTES = 256 << 20

Spare = list[tuple[Hashable, NDArray[Any]]]


class SegmentCache:
    """Arrays under keys, the last used ones in memory; two threads never decode one twice.

    Parameters
    ----------
    budget_bytes : of those in memory
    scratch : where those go that memory has no room for and that will be wanted again
    """

    def __init__(self, *, budget_bytes: int, scratch: Scratch | None = None) -> None:
        self._budget_bytes, self._scratch = budget_bytes, scratch or Scratch()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[NDArray[Any], bool]] = OrderedDict()
        self._coming: dict[Hashable, Future[NDArray[Any]]] = {}
        self.n_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether an array is here, or about to be."""
        with self._lock:
            return key in self._kept or key in self._coming or key in self._scratch

    def forget(self) -> None:
        """Let go of all arrays; those that are just made stay with who waits for them."""
        with self._lock:
            self._kept.clear()
            self.n_bytes = 0
        self._scratch.forget()

    def get(
        self, key: Hashable, make: Callable[[], NDArray[Any]], *, again: bool = False, pieces: Pieces | None = None
    ) -> NDArray[Any]:
        """Return the read-only array under ``key``, made if need be; all threads that wait get what ``make`` raises.

        Parameters
        ----------
        again : whether others will want it, too, since only a part of it is wanted now
        pieces : how it is made on the disk, where that has room for it, without being in memory whole
        """
        with self._lock:
            if key in self._kept:
                array, before = self._kept.pop(key)
                self._kept[key] = array, before or again
                return array
            coming = self._coming.get(key)
            if coming is None:
                mine: Future[NDArray[Any]] = Future()
                self._coming[key] = mine
        if coming is not None:
            return coming.result()
        return self._make(key, make, again=again, pieces=pieces, mine=mine)

    def _make(
        self, key: Hashable, make: Callable[[], NDArray[Any]], *, again: bool, pieces: Pieces | None,
        mine: Future[NDArray[Any]],
    ) -> NDArray[Any]:  # fmt: skip
        spare = Spare()
        try:
            array = self._scratch.get(key)
            if array is None and pieces is not None:
                self._scratch.fill(key, pieces)
                array = self._scratch.get(key)
            if array is None:
                array = _owned(make())
                array.flags.writeable = False
                with self._lock:
                    spare = self._keep(key, array, again=again)
            for each in spare:
                self._scratch.put(*each)
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
        mine.set_result(array)
        return array

    def _keep(self, key: Hashable, array: NDArray[Any], *, again: bool) -> Spare:
        """Keep an array in memory; returns those that it has no room for and that will be wanted again."""
        if array.nbytes > self._budget_bytes:
            return [(key, array)] if again else []
        self._kept[key] = array, again
        self.n_bytes += array.nbytes
        spare = Spare()
        while self.n_bytes > self._budget_bytes:
            dropped, (old, wanted) = self._kept.popitem(last=False)
            self.n_bytes -= old.nbytes
            if wanted:
                spare.append((dropped, old))
        return spare


def _owned(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, copied if it is a view: into bytes that were read, say, which are not counted."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    n_bytes = whole.nbytes if whole.base is None else len(whole.base) if isinstance(whole.base, bytes) else 0
    return array if n_bytes == array.nbytes and array.flags.c_contiguous else np.array(array, order="C")


DECODED = SegmentCache(budget_bytes=BUDGET_BYTES)
