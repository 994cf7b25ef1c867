"""Interrupts: Ctrl-C ends a command in one line, with exit code 130, whatever it is at.

    it is at    its first imports   work                       later imports            its end
    Ctrl-C      ends it at once     raises KeyboardInterrupt   does so once they are    ends it at once
                                                               through, or it comes
                                                               a second time

An import that is broken off leaves whatever error its extension modules make of that, or none.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from types import FrameType
from typing import Any

CODE = 130
LINE = "interrupted; what is done is kept: the same command goes on"


class Interrupts:
    """What Ctrl-C does.

    Attributes
    ----------
    came : whether it was pressed since the command is at work
    """

    def __init__(self) -> None:
        self.came, self._at_work, self._importing = False, False, False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise KeyboardInterrupt where Ctrl-C comes in the block, or after an import."""
        before = _handle(self._raise)
        self.came, self._at_work = False, before is not _end
        try:
            yield
        finally:
            _handle(before)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Let an import come to its end first, unless it is the first one: nothing is to be put away yet then."""
        self._importing = True
        try:
            yield
        finally:
            self._importing, self._at_work = False, True
        if self.came:
            raise KeyboardInterrupt

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._at_work:
            _end(number, frame)
        again, self.came = self.came, True
        if again or not self._importing:
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()


def late(name: str) -> Any:  # noqa: ANN401 whatever the module has
    """Return what is called "module:name", whose module is imported now."""
    with INTERRUPTS.importing():
        return resolve_name(name)


def end_at_once() -> None:
    """From now on let Ctrl-C end this process where it is: nothing that is to be put away has begun, or it is done."""
    _handle(_end)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, f"haloseg: {LINE}\n".encode())
    os._exit(CODE)


def _handle(handler: Any) -> Any:  # noqa: ANN401 what signal takes and gives
    """Set what Ctrl-C does, and return what it did; where it is ignored, as by a job in the background, it stays so."""
    now = signal.getsignal(signal.SIGINT)
    if now is not signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
    return now
