"""SegmentCache: decoded parts of files, kept while they fit a budget, so that neighbouring blocks decode them once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUDGET_BYTES = 256 << 20


class SegmentCache:
    """Least recently used arrays under keys, at most ``budget_bytes`` of them; two threads never decode one twice."""

    def __init__(self, *, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._coming: dict[Hashable, Future[NDArray[Any]]] = {}
        self.n_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether an array is here, or about to be."""
        with self._lock:
            return key in self._kept or key in self._coming

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the read-only array under ``key``, made if need be; all threads that wait get what ``make`` raises."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            coming = self._coming.get(key)
            if coming is None:
                mine: Future[NDArray[Any]] = Future()
                self._coming[key] = mine
        if coming is not None:
            return coming.result()
        return self._make(key, make, mine=mine)

    def _make(self, key: Hashable, make: Callable[[], NDArray[Any]], *, mine: Future[NDArray[Any]]) -> NDArray[Any]:
        try:
            # A view into the bytes that were read would keep those alive, too, and they are not counted.
            array = np.array(make(), order="C")
            array.flags.writeable = False
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._keep(key, array)
        mine.set_result(array)
        return array

    def _keep(self, key: Hashable, array: NDArray[Any]) -> None:
        if array.nbytes > self._budget_bytes:
            return
        self._kept[key] = array
        self.n_bytes += array.nbytes
        while self.n_bytes > self._budget_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.n_bytes -= dropped.nbytes


DECODED = SegmentCache(budget_bytes=BUDGET_BYTES)
