"""Arrays that fail when they are read, for a process that must not import what a test does."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ArgumentError


@dataclass(frozen=True)
class Odd:
    """Zeros that can be read ``n_good`` times from any one process, and then do what ``why`` says."""

    shape: tuple[int, ...]
    why: str
    n_good: int = 0

    def __getitem__(self, index):
        _READS.append(index)
        if len(_READS) > self.n_good:
            _WAYS[self.why]()
        return np.zeros(self.shape, np.uint8)[index]


def _refuse():
    raise ArgumentError("one line")


def _find_damage():
    raise ValueError("bad checksum\nin a chunk")


def _fail():
    raise PermissionError(13, "Permission denied", "scan.zarr/c/0")


def _fill_memory():
    raise MemoryError("Unable to allocate 9 TiB\nfor an array")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _leave():
    os._exit(7)


def _hang():
    time.sleep(600)


_READS = []
_WAYS = {
    "refused": _refuse, "damaged": _find_damage, "failing": _fail, "killed": _die, "left": _leave, "hanging": _hang,
    "full": _fill_memory,
}  # fmt: skip
