"""Reading ahead and writing behind, on threads of their own, so that the device waits for neither.

reader   |r1|r2|r3|.....|r4|          at most a few ahead: what they hold is bounded
device      |--c1--|--c2--|--c3--|
writer             |w1|   |w2|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

from pipeline.compute.clock import StageClock
from pipeline.compute.pulse import beat

T = TypeVar("T")
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Error:
    error: BaseException


_END = object()


@contextmanager
def read_ahead(items: Iterable[T], *, n_ahead: int, clock: StageClock) -> Iterator[Iterator[T]]:
    """Yield an iterator over ``items`` that a thread keeps up to ``n_ahead`` items ahead of.

    An error of the thread is raised where its item would have come. Leaving the block ends the thread.
    """
    queue: Queue[object] = Queue(n_ahead)
    over = Event()

    def work() -> None:
        try:
            source = iter(items)
            while not over.is_set():
                with clock.timing("read"):
                    item = next(source, _END)
                _put(queue, item, over)
                if item is _END:
                    return
        except BaseException as error:  # noqa: BLE001 raised again by the one who waits for the item
            _put(queue, _Error(error), over)

    def arriving() -> Iterator[T]:
        while True:
            with clock.timing("wait"):
                item = queue.get()
            beat()
            if item is _END:
                return
            if isinstance(item, _Error):
                raise item.error
            yield item  # type: ignore[misc]

    thread = Thread(target=work, name="haloseg-reader", daemon=True)
    thread.start()
    try:
        yield arriving()
    finally:
        over.set()
        thread.join()


def _put(queue: Queue[object], item: object, over: Event) -> None:
    """Put an item as soon as there is room, unless nobody waits for it any more."""
    while not over.is_set():
        try:
            queue.put(item, timeout=_POLL_S)
        except Full:
            continue
        return


class WriteBehind(Generic[T]):
    """Hands items to a function on a thread, in order; at most one waits while another is being written.

    Leaving the block waits until everything is written; an error of the function is raised there, or by the next
    ``put``. When the block is left by an error, what still waits is not written.
    """

    def __init__(self, write: Callable[[T], None], *, clock: StageClock) -> None:
        self._write, self._clock = write, clock
        self._queue: Queue[object] = Queue(1)
        self._over = Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="haloseg-writer", daemon=True)

    def __enter__(self) -> WriteBehind[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Have the item written; waits while another one waits already."""
        with self._clock.timing("wait"):
            _put(self._queue, item, self._over)
        self._check()

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._clock.timing("wait"):
            if kind is not None:
                self._over.set()
            else:
                _put(self._queue, _END, self._over)
            self._thread.join()
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except Empty:
                continue
            if item is _END:
                return
            try:
                with self._clock.timing("write"):
                    self._write(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 raised again in the thread that puts
                self._error = error
                self._over.set()
