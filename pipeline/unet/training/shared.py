"""Shared: memory that two processes see, through which arrays go from one to the other as they are.

The memory has no name: it is gone with the last process that holds it, however that one ends. Nor is it of /dev/shm,
of which a container has 64 MiB.

    | pickled value, without its arrays | array | array | ...     each at a multiple of 64 bytes
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True)
class Parcel:
    """Where in the memory a value lies: (start, stop) of its pickle, then of each array, in bytes."""

    spans: tuple[tuple[int, int], ...]


class Shared:
    """Memory of two processes, by its file descriptor; it grows with what is put there."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    @classmethod
    def new(cls) -> Shared:
        """Return memory that this process alone has, until it hands on the descriptor."""
        return cls(os.memfd_create("haloseg"))

    def put(self, value: object, *, dumped: Callable[..., bytes] = pickle.dumps) -> Parcel:
        """Put a value in the place of the one before; whoever took that one must be done with it.

        Parameters
        ----------
        dumped : called like ``pickle.dumps``
        """
        arrays = list[pickle.PickleBuffer]()
        head = dumped(value, protocol=5, buffer_callback=arrays.append)
        parts = [memoryview(head), *(array.raw() for array in arrays)]
        starts = [0]
        for part in parts:
            starts.append(-(-(starts[-1] + len(part)) // _ALIGNED_BYTES) * _ALIGNED_BYTES)
        memory = self._of(starts[-1])
        for (start, _), part in zip(pairwise(starts), parts, strict=True):
            memory[start : start + len(part)] = part
        return Parcel(tuple((start, start + len(part)) for start, part in zip(starts, parts, strict=False)))

    def get(self, parcel: Parcel) -> Any:  # noqa: ANN401 whatever was put
        """Return a value; its arrays lie in this memory, and change with what is put there next."""
        memory = memoryview(self._of(parcel.spans[-1][1]))
        head, *arrays = (memory[start:stop] for start, stop in parcel.spans)
        return pickle.loads(head, buffers=arrays)

    def close(self) -> None:
        """Let go of the memory; what was taken from it stays as long as it is held."""
        os.close(self.descriptor)
        self._map = None

    def _of(self, n_bytes: int) -> mmap.mmap:
        """Return the memory, of so many bytes at least."""
        if self._map is None or len(self._map) < n_bytes:
            if os.fstat(self.descriptor).st_size < n_bytes:
                os.ftruncate(self.descriptor, n_bytes)
            self._map = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._map
