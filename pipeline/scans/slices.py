"""A folder, or a glob, of pictures as one volume: z first, in natural order (slice9 before slice10).

Hidden files are passed over, as are files that are no pictures (tables, notes); pictures of two kinds are refused.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ScanError
from pipeline.scans.axes import arrange
from pipeline.scans.lazy import LazyScan, damage_named
from pipeline.scans.pictures import header, open_picture
from pipeline.scans.tiff import open_tiff

_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_OPENERS: dict[str, Callable[[str], LazyScan]] = {"PNG": open_picture, "JPEG": open_picture, "TIFF": open_tiff}
_KEPT_OPEN = 1024


@dataclass(frozen=True, slots=True)
class SliceSource:
    """Pictures of one shape, one after another along the first axis; see VoxelSource."""

    paths: tuple[str, ...]
    kind: str
    dtype: np.dtype[Any]
    picture_shape: tuple[int, ...]
    picture_chunks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of pictures, then the shape of one."""
        return len(self.paths), *self.picture_shape

    @property
    def chunks(self) -> tuple[int, ...]:
        """One picture, or a part of one, can be read alone."""
        return 1, *self.picture_chunks

    def read(self, slices: tuple[slice, ...], /) -> NDArray[Any]:
        """Return the voxels under the slices."""
        shape = tuple(s.stop - s.start for s in slices)
        voxels = np.empty(shape, self.dtype)
        for path, target in zip(self.paths[slices[0]], voxels, strict=True):
            picture = _opened(path, self.kind)
            _check_same(path, (picture.shape, str(picture.dtype)), first=(self.picture_shape, str(self.dtype)))
            target[...] = picture.read(slices[1:])
        return voxels


def open_slices(path: str, /) -> LazyScan:
    """Return the volume of a folder's, or a glob's, pictures.

    Raises
    ------
    ScanError : no pictures, pictures of several kinds, or one that differs from the first in shape or dtype.
    """
    paths = slice_paths(path)
    kinds = sorted({_KINDS[p.suffix.lower()] for p in paths})
    if len(kinds) != 1:
        raise ScanError(
            f"slices must be pictures of one kind (PNG, JPEG or TIFF), got {' and '.join(kinds) or 'none'} in {path}; "
            "name one kind by a pattern such as 'FOLDER/*.png'"
        )
    names = tuple(str(p) for p in paths)
    first = _opened(names[0], kinds[0])
    _check_headers(names, kinds[0])
    if "z" in first.dims:
        raise ScanError(f"slices must be 2-D pictures, got shape {first.shape} in {names[0]}; open that file by itself")
    size = dict(zip(first.spatial_dims, first.voxel_size_um or (), strict=False))
    source = SliceSource(names, kinds[0], first.dtype, first.shape, first.chunks)
    axes = "Z" + "".join(first.dims).upper()
    return arrange(source, axes=axes, path=path, format_name=f"{kinds[0]} slices", voxel_size_um=size)


def slice_paths(path: str) -> list[Path]:
    """Return the pictures in a folder or under a glob in natural order."""
    found = Path(path).iterdir() if Path(path).is_dir() else map(Path, glob.iglob(path))  # noqa: PTH207 absolute patterns
    pictures = [p for p in found if p.suffix.lower() in _KINDS and not p.name.startswith(".") and p.is_file()]
    return sorted(pictures, key=lambda p: natural_key(str(p)))


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a key that orders the numbers in names by value; names that are equal so go by their characters."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((1, int(p), "") if i % 2 else (0, 0, p) for i, p in enumerate(parts)), name


def _opened(path: str, kind: str) -> LazyScan:
    stat = Path(path).stat()
    return _remembered(path, kind, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=_KEPT_OPEN)
def _remembered(path: str, kind: str, stamp: tuple[int, int]) -> LazyScan:
    """Return an open slice; a file that was written anew has another stamp and is opened anew."""
    with damage_named(path):
        return _OPENERS[kind](path)


def _check_headers(paths: Sequence[str], kind: str) -> None:
    """Compare the headers of all slices with the first one's."""
    first: object = None
    for path in paths:
        scan = _opened(path, kind) if kind == "TIFF" else None
        this = _pictured(path) if scan is None else (scan.dims, scan.shape, str(scan.dtype))
        first = this if first is None else first
        _check_same(path, this, first=first)


def _pictured(path: str) -> str:
    """Return what a picture's header says of its shape and dtype."""
    height, width, bits, colour = header(path)
    return f"{height} x {width} pixels of {bits} bit and kind of colour {colour}"


def _check_same(path: str, this: object, *, first: object) -> None:
    if this != first:
        raise ScanError(
            f"slices must agree in shape and dtype with the first, {first}, got {this} in {path}; "
            "remove or convert it"
        )
