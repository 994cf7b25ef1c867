"""CompressedSource: voxels that lie compressed as one stream in a file, unpacked once for all who read parts of it."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scans.cache import DECODED
from pipeline.scans.lazy import damaged
from pipeline.scans.scratch import Pieces

_PIECE_BYTES = 16 << 20
_OPENERS: dict[str, Callable[..., IO[bytes]]] = {"gzip": gzip.open, "bzip2": bz2.open}  # type: ignore[dict-item]


@dataclass(frozen=True, slots=True)
class CompressedSource:
    """Voxels in C order in a gzip or bzip2 stream; see VoxelSource. Unpacked onto the disk, piece by piece.

    Attributes
    ----------
    begin : byte of the file at which the stream begins
    offset : byte of what is unpacked at which the voxels begin
    stamp : time of change and size of the file, which others of its name differ in
    """

    path: str
    kind: Literal["gzip", "bzip2"]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    offset: int
    stamp: tuple[int, int]

    @property
    def chunks(self) -> tuple[int, ...]:
        """The stream is unpacked as a whole."""
        return self.shape

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return a copy of the voxels under the slices."""
        key, pieces = (self.path, self.begin, self.stamp), Pieces(self._pieces, self.dtype, self.shape)
        voxels = DECODED.get(key, self._whole, again=True, pieces=pieces)
        return np.array(voxels[slices])

    def _whole(self) -> NDArray[Any]:
        voxels, at = np.empty(self.shape, self.dtype), 0
        flat = voxels.reshape(-1).view(np.uint8)
        for piece in self._pieces():
            flat[at : at + len(piece)] = piece
            at += len(piece)
        return voxels

    def _pieces(self) -> Iterable[NDArray[Any]]:
        """Yield the bytes of the voxels; the stream is read to its end, where its checksum is."""
        left = self.dtype.itemsize * prod(self.shape)
        for piece in self._unpacked():
            if left:
                yield np.frombuffer(piece[:left], np.uint8)
            left -= min(left, len(piece))
        if left:
            raise damaged(self.path, cause=f"{left} bytes of its voxels are missing")

    def _unpacked(self) -> Iterator[bytes]:
        with Path(self.path).open("rb") as packed:
            packed.seek(self.begin)
            with _OPENERS[self.kind](packed) as stream:
                stream.read(self.offset)
                while piece := stream.read(_PIECE_BYTES):
                    yield piece


def stamp_of(path: str) -> tuple[int, int]:
    """Return the time of change, in nanoseconds, and the size of a file."""
    about = Path(path).stat()
    return about.st_mtime_ns, about.st_size
