"""Location: a folder on disk or a prefix on an object store, by path or URL, through fsspec."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ArgumentError, StorageError, StoreError
from pipeline.scans.bucket import is_bucket, knock, told

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder in a folder.

    Attributes
    ----------
    changed_s : when it was last changed, in seconds since 1970; 0 where that is not known
    tag : what an object store tells apart contents by (ETag); empty elsewhere
    """

    name: str
    is_folder: bool
    n_bytes: int
    changed_s: float
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Location:
    """A folder or object-store prefix; ``location / "labels"`` is the one below it. A file:// URL is its path."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.removeprefix("file://"))

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        """The folder that holds this one."""
        head, _, _ = self.url.rstrip("/").rpartition("/")
        return Location(head or ("/" if self.url.startswith("/") else "."))

    @property
    def is_local(self) -> bool:
        """Whether this is a path on a file system of this machine."""
        return "://" not in self.url

    def absolute(self) -> Location:
        """Return the same place for a process that runs in another folder."""
        return Location(str(Path(self.url).absolute()) if self.is_local else self.url.rstrip("/"))

    def exists(self) -> bool:
        """Whether anything lies here."""
        with self._answering() as (fs, path):
            return bool(fs.exists(path))

    def files(self) -> Iterator[str]:
        """Yield the names of all files below, relative to here."""
        with self._answering() as (fs, path):
            names = fs.find(path) if fs.exists(path) else []
        yield from (found[len(path) :].lstrip("/") for found in names)

    def read_bytes(self) -> bytes:
        """Return the content of the file here."""
        with self._answering() as (fs, path):
            content: bytes = fs.cat_file(path)
        return content

    def write_bytes(self, content: bytes) -> None:
        """Write a file here, so that readers and a killed run see the old or the new one, whole; folders are made.

        Raises
        ------
        StorageError : the disk is full, the folder may not be written, or storage does not answer.
        """
        with storage_errors(self.parent), self._answering() as (fs, path):
            if not is_bucket(self.url):  # whose file system would make a bucket of a mistyped name
                fs.makedirs(fs._parent(path), exist_ok=True)
            if self.is_local:
                _replace(Path(path), content)
            else:
                fs.pipe_file(path, content)  # an object store puts it at once

    def read_json(self) -> dict[str, Any]:
        """Return the JSON object here; an empty one where there is no file."""
        try:
            content = self.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        try:
            document = json.loads(content)
        except ValueError as error:
            raise StoreError(f"metadata must be JSON, got a damaged {self}; delete the folder") from error
        return document if isinstance(document, dict) else {}

    def delete(self) -> None:
        """Remove the file or everything below this folder; nothing happens where nothing lies."""
        with self._answering() as (fs, path):
            if fs.exists(path):
                fs.rm(path, recursive=True)

    def delete_file(self) -> None:
        """Remove the file here, if there is one; an object store is asked once."""
        with self._answering() as (fs, path), suppress(FileNotFoundError):
            fs.rm_file(path)

    def delete_leftovers(self) -> None:
        """Remove what killed runs left beside this file of writing it."""
        if self.is_local:
            for left in Path(self.parent.url).glob(f".{escape(self.name)}.*.partial"):
                left.unlink(missing_ok=True)

    def delete_empty(self) -> None:
        """Remove this folder if nothing is in it; object stores have none."""
        if self.is_local:
            with suppress(OSError):
                Path(self.url).rmdir()

    def entries(self) -> list[Entry]:
        """Return what lies right in this folder, by name."""
        with self._answering() as (fs, path):
            found = fs.ls(path, detail=True)
        here = path.rstrip("/")
        listed = [_entry(each) for each in found if each["name"].rstrip("/") != here]
        return sorted(listed, key=lambda each: each.name)

    def entry(self) -> Entry:
        """Return what lies here, a file or folder."""
        with self._answering() as (fs, path):
            return _entry(fs.info(path))

    def below(self) -> Iterator[Entry]:
        """Yield the files below this folder, however deep; of an object store a thousand in one answer."""
        with self._answering() as (fs, path):
            found = fs.find(path, detail=True)
        yield from map(_entry, found.values())

    def _opened(self) -> tuple[Any, str]:
        """Return fsspec's file system and path; on a disk "::" is but a part of a name (FILE.h5::DATASET)."""
        if self.is_local:
            fs = LocalFileSystem()
            return fs, fs._strip_protocol(self.url)
        opened: tuple[Any, str] = url_to_fs(self.url, use_listings_cache=False)
        return opened

    @contextmanager
    def _answering(self) -> Iterator[tuple[Any, str]]:
        """Yield fsspec's file system and path; what a remote store dies of becomes one line.

        A file that is not there stays a FileNotFoundError, and what a local disk dies of an OSError.
        """
        try:
            fs, path = self._opened()
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"a URL must be of a kind that can be opened, got {self.url}: {error}; s3:// needs haloseg[s3]"
            ) from error
        knock(self.url)
        try:
            yield fs, path
        except FileNotFoundError:
            raise
        except Exception as error:
            if self.is_local and isinstance(error, OSError):
                raise
            raise StorageError(
                f"storage must answer at {self.url}, got {told(error)}; mend address or credentials "
                "and run the same command again"
            ) from error


def _entry(about: dict[str, Any]) -> Entry:
    """Return what fsspec tells of a file; stores of different kinds name the time of change differently."""
    changed = about.get("mtime", about.get("LastModified", about.get("last_modified", about.get("updated", 0.0))))
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed)
    name = about["name"].rstrip("/").rsplit("/", 1)[-1]
    folder = about["type"] == "directory" or (bool(about.get("islink")) and Path(about["name"]).is_dir())
    return Entry(name, folder, int(about.get("size") or 0), seconds, str(about.get("ETag") or about.get("etag") or ""))


def _replace(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_ours(path: Path, *, rule: str, mark: bytes, at: int) -> None:
    """Refuse to write over a file that is there and has not our mark from a byte on: one of a mistyped path, say."""
    try:
        with path.open("rb") as file:
            begin = file.read(at + len(mark))
    except OSError:  # nothing there, or what cannot be written either
        return
    if begin and begin[at:] != mark:
        raise ArgumentError(f"{rule}, got {path}; name a new file")


@contextmanager
def storage_errors(location: Location) -> Iterator[None]:
    """Turn a full disk and a refused write below ``location`` into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"writing needs free space, got a full disk at {location}; free some and run the same command again: "
                "what is done is kept"
            ) from error
        if error.errno in _DENIED:
            raise StorageError(
                f"the folder must be writable, got {error.strerror} at {location}; "
                "mend its rights and run the same command again"
            ) from error
        raise
