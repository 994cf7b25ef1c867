"""Files of scans, on a disk or behind a URL: read by ranges, so that only what is wanted of a remote one is fetched."""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from pipeline.errors import PipelineError, ScanError, StorageError, StoreError
from pipeline.scans.bucket import knock, told

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
BY_RANGES = {".tif", ".tiff", ".svs", ".h5", ".hdf5"}
MRC = {".mrc", ".mrcs", ".rec"}
FILES = PICTURES | BY_RANGES | MRC | {".npy", ".nii", ".gz", ".nrrd", ".nhdr", ".dcm"}
DICOMDIR = "DICOMDIR"  # the list of the files on a medium, which holds no pictures

Read = Callable[[int, int], bytes]  # from a byte on, so many; fewer where the file ends

_BLOCK_BYTES = 64 << 10  # of what a reader of structure asks for here and there
_BLOCKS_KEPT = 64
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs"}  # whose errors are no damage of the file


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def about(path: str) -> tuple[int, str]:
    """Return a file's size in bytes, and what tells it from its other versions: time of change, or ETag."""
    if not is_remote(path):
        stat = Path(path).stat()
        return stat.st_size, str(stat.st_mtime_ns)
    with _storage(path) as (fs, place):
        info = fs.info(place)
    return int(info["size"]), str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")


def is_dicom_file(path: str | Path) -> bool:
    """Whether a file begins as DICOM does, after 128 bytes of anything, or calls itself one."""
    return Path(path).suffix.lower() == ".dcm" or has_preamble(path)


def has_preamble(path: str | Path) -> bool:
    """Whether a file begins as DICOM does, after 128 bytes of anything."""
    with Path(path).open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_bare_dicom_file(path: str | Path) -> bool:
    """Whether a file begins with an element of DICOM's group 2 or 8, as those do that leave the 128 bytes out."""
    with Path(path).open("rb") as file:
        start = file.read(8)
    is_explicit, is_short = start[4:6].isalpha() and start[4:6].isupper(), start[6:] == b"\0\0"
    little, big = start[:2] in (b"\2\0", b"\x08\0"), start[:2] in (b"\0\2", b"\0\x08")
    return (little and (is_explicit or is_short)) or (big and is_explicit)


def may_be_dicom(name: str) -> bool:
    """Whether a file among others may be DICOM by its name: it is not hidden, and of no other format."""
    return not name.startswith(".") and name != DICOMDIR and Path(name).suffix.lower() not in FILES - {".dcm"}


def dicom_candidates(place: str) -> Iterator[Path]:
    """Yield a file, or those right in a folder or under a glob that may be DICOM: not hidden, of no other format."""
    if Path(place).is_file():
        yield Path(place)
        return
    found = Path(place).iterdir() if Path(place).is_dir() else map(Path, glob.iglob(place))  # noqa: PTH207 absolute patterns
    for each in found:
        if may_be_dicom(each.name) and each.is_file():
            yield each


def dicom_files(place: str) -> list[Path]:
    """Return the DICOM files of a place by name, beside one that is told by its beginning those that are bare, too."""
    files = sorted(dicom_candidates(place))
    if not any(map(is_dicom_file, files)):
        return []
    return [each for each in files if is_dicom_file(each) or is_bare_dicom_file(each)]


@contextmanager
def opened(path: str) -> Iterator[BinaryIO | Any]:
    """Open a file for those who seek and read in it; a remote one fetches blocks of 64 KiB, and keeps the last 4 MiB.

    Raises
    ------
    ScanError : nothing is there.
    StorageError : storage does not answer; raised in the block, too, where reading fails.
    """
    if not is_remote(path):
        with Path(path).open("rb") as file:
            yield file
        return
    settings = {"cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS_KEPT}}
    with _storage(path) as (fs, place), fs.open(place, "rb", block_size=_BLOCK_BYTES, **settings) as file:
        yield file


@contextmanager
def by_ranges(path: str) -> Iterator[Read]:
    """Yield a function that reads a part of a file; a remote one is asked for just these bytes."""
    if is_remote(path):
        yield lambda start, n_bytes: fetched(path, [(start, start + n_bytes)])[0]
        return
    with Path(path).open("rb", buffering=0) as file:

        def read(start: int, n_bytes: int) -> bytes:
            file.seek(start)
            return file.read(n_bytes)

        yield read


def fetched(url: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of a remote file under spans (start, stop), asked for at once; fewer where the file ends.

    Raises
    ------
    ScanError : the file is gone.
    StorageError : storage does not answer.
    """
    with _storage(url) as (fs, place):
        starts, stops = zip(*spans, strict=True)
        found = fs.cat_ranges([place] * len(spans), list(starts), list(stops), on_error="return")
        return [_bytes(each) for each in found]


def _bytes(answer: object) -> bytes:
    """Return what storage sent of a range; nothing of one past the file's end, which is refused as an invalid one."""
    if isinstance(answer, OSError) and answer.errno == errno.EINVAL:
        return b""
    if isinstance(answer, BaseException):
        raise answer
    return bytes(answer)  # type: ignore[call-overload, no-any-return]


@contextmanager
def _storage(url: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system and path; what the network dies of becomes one line, damage stays what it is."""
    try:
        fs, place = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"a URL must be of a kind that can be opened, got {url}: {error}; s3:// needs haloseg[s3]"
        ) from error
    knock(url)
    try:
        yield fs, place
    except PipelineError:
        raise
    except FileNotFoundError as error:
        raise ScanError(f"a scan must exist, got {url}; check the path") from error
    except Exception as error:
        of_network = type(error).__module__.partition(".")[0] in _NETWORK
        if of_network or (isinstance(error, OSError) and error.errno is not None):
            raise StorageError(
                f"storage must answer at {url}, got {told(error)}; mend address or credentials "
                "and run the same command again"
            ) from error
        raise
