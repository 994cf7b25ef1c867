"""Scratch: decoded parts of files on a disk, for as long as this process lives, where memory has no room for them."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("haloseg")

_MOST_BYTES = 16 << 30
_MOST_ARRAYS = 1 << 16  # whose places are remembered: 20 MiB
_ON_DISK = "/var/tmp"  # by custom: /tmp may lie in memory


@dataclass(frozen=True, slots=True)
class Pieces:
    """An array that comes piece by piece, in C order."""

    make: Callable[[], Iterable[NDArray[Any]]]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of all of it."""
        return self.dtype.itemsize * prod(self.shape)


class _NoRoomError(Exception):
    """The disk takes no more."""


class _File:
    """Arrays one after another in a file without a name, whose room is free again once nobody reads it any more."""

    def __init__(self, *, most_bytes: int, most_arrays: int) -> None:
        with _no_room():
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder(), buffering=0)  # noqa: SIM115 open until it is closed
        self.close = finalize(self, self._file.close)
        about = os.fstatvfs(self._file.fileno())
        self._n_left = min(most_bytes, about.f_bavail * about.f_frsize // (4 * (os.cpu_count() or 1)))
        self._most_arrays = most_arrays
        self._places: dict[Hashable, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def has_room(self, n_bytes: int) -> bool:
        return n_bytes <= self._n_left and len(self._places) < self._most_arrays

    def put(self, key: Hashable, pieces: Pieces) -> None:
        offset = self._file.seek(0, os.SEEK_END)
        try:
            for piece in pieces.make():
                with _no_room():
                    self._write(piece.data.cast("B"))
        except BaseException:
            self._file.truncate(offset)  # what others need more
            raise
        self._n_left -= pieces.n_bytes
        self._places[key] = offset, pieces.dtype, pieces.shape

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[self._file.write(content) :]

    def get(self, key: Hashable) -> NDArray[Any]:
        offset, dtype, shape = self._places[key]
        return np.memmap(self._file, dtype, "r", offset, shape)


class Scratch:
    """Arrays under keys, in two files of at most ``most_bytes`` each, and a process's share of a quarter of the room.

        | old: read only | young: written |    when the young one is full, it becomes the old one, whose room is freed

    Nothing has to be swept up: the files have no names.
    """

    def __init__(self, *, most_bytes: int = _MOST_BYTES, most_arrays: int = _MOST_ARRAYS) -> None:
        self._most_bytes, self._most_arrays = most_bytes, most_arrays
        self._lock, self._told = threading.Lock(), False
        self._files: list[_File] = []
        self._process = os.getpid()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return any(key in file for file in self._files)

    def get(self, key: Hashable) -> NDArray[Any] | None:
        """Return the array under ``key``, read from the disk as far as it is looked at, or None if it is not here."""
        with self._lock:
            self._leave_to_parent()
            return next((file.get(key) for file in self._files if key in file), None)

    def forget(self) -> None:
        """Give the disk its room back; arrays that somebody still reads stay until then."""
        with self._lock:
            self._leave_to_parent()
            while self._files:
                self._files.pop().close()

    def put(self, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array, unless the disk has no room for it, which is told once."""
        self.fill(key, Pieces(lambda: [array], array.dtype, array.shape))

    def fill(self, key: Hashable, pieces: Pieces) -> None:
        """Keep an array that comes in pieces, which are not made where the disk has no room."""
        with self._lock:
            self._leave_to_parent()
            try:
                if not (self._files and self._files[-1].has_room(pieces.n_bytes)):
                    self._begin(pieces.n_bytes)
                self._files[-1].put(key, pieces)
            except _NoRoomError as error:
                if not self._told:
                    log.warning(
                        "parts of the scan that several blocks need are decoded for each, since %s has no room: %s; "
                        "TMPDIR may name another folder", folder(), error,
                    )  # fmt: skip
                self._told = True

    def _leave_to_parent(self) -> None:
        """Let go of files that this process was forked with: two that write into one would write over each other."""
        if self._process != os.getpid():
            self._files, self._process = [], os.getpid()

    def _begin(self, n_bytes: int) -> None:
        """Begin a file, and let go of the one before the last."""
        if lies_in_memory(folder()):
            raise _NoRoomError("it lies in memory")
        file = _File(most_bytes=self._most_bytes, most_arrays=self._most_arrays)
        if not file.has_room(n_bytes):
            file.close()
            raise _NoRoomError(f"{n_bytes:,} bytes are wanted")
        self._files.append(file)
        while len(self._files) > 2:
            self._files.pop(0).close()


@contextmanager
def _no_room() -> Iterator[None]:
    """Tell a disk that takes no more apart from storage that fails where an array comes from."""
    try:
        yield
    except OSError as error:
        raise _NoRoomError(str(error)) from error


def folder() -> str:
    """Return where temporary files lie: as TMPDIR says, or else on a disk."""
    if "TMPDIR" not in os.environ and os.access(_ON_DISK, os.W_OK):
        return _ON_DISK
    return tempfile.gettempdir()


def lies_in_memory(path: str) -> bool:
    """Whether a folder lies on a file system in memory, as far as the kernel tells."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = Path(path).resolve()
    kinds = {Path(each[1]): each[2] for each in mounts}  # the last one that is mounted on a folder is the one seen
    nearest = max((at for at in kinds if place.is_relative_to(at)), key=lambda at: len(at.parts), default=None)
    return nearest is not None and kinds[nearest] in ("tmpfs", "ramfs")
