"""Lease: says that a scan is being worked on, so that two runs do not do the same work; it lapses when its run dies.

Every holder writes a file of its own, which any store can do, and then looks around: it has the lease if it sees nobody
else. Two that begin in the same moment see each other, and both withdraw and try again after a while of their own. So
two never hold it at once, as long as clocks differ by less than what a lease has left. Were that to fail, nothing would
be lost: work done twice ends in the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import sleep, time
from typing import Any
from uuid import uuid4

from pipeline.errors import PipelineError, StoreError, TakenError
from pipeline.store.location import Entry, Location, storage_errors

log = logging.getLogger("haloseg")

LEASE_S = 120.0
_TRIES = 4
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 0.5


@contextmanager
def lease(image: Location, *, lasts_s: float = LEASE_S) -> Iterator[bool]:
    """Yield whether this process has the lease of an image while the block runs; it is renewed all the time.

    Parameters
    ----------
    image : where the image is or will be; the lease lies beside it, in ``IMAGE.lease``
    lasts_s : after so long without renewal others may take the work up
    """
    own = _folder(image) / f"{uuid4().hex}.json"
    over = Event()
    renewing = Thread(target=_renew, args=(own, lasts_s, over), name="haloseg-lease", daemon=True)
    with storage_errors(image.parent):
        taken = _take(image, own, lasts_s)
    if taken:
        renewing.start()
    try:
        yield taken
    finally:
        over.set()
        if taken:
            renewing.join()
            _withdraw(image, own)


@contextmanager
def held(image: Location, *, what: str = "a scan") -> Iterator[None]:
    """Hold the lease of an image, or of another thing that is made at a place, while the block runs.

    Raises
    ------
    TakenError : another run has it.
    """
    with lease(image) as taken:
        if not taken:
            by = holder(image) or "a run that has just ended"
            raise TakenError(f"{what} is worked on by one run at a time, got {image}, at which is {by}; wait for it")
        yield


def holder(image: Location) -> str | None:
    """Return who works on an image, "host, process 12"; None where nobody does."""
    return next(iter(_others(image, own=None)), None)


def _take(image: Location, own: Location, lasts_s: float) -> bool:
    """Write the own file, and withdraw it if there is another one that has not lapsed."""
    for _ in range(_TRIES):
        if _others(image, own=own):
            return False
        _write(own, lasts_s)
        if not _others(image, own=own):
            return True
        _withdraw(image, own)
        sleep(random.uniform(_SHORTEST_WAIT_S, _LONGEST_WAIT_S))
    return False


def _others(image: Location, *, own: Location | None) -> list[str]:
    """Return who else holds a lease that has not lapsed; lapsed ones are removed."""
    folder, found = _folder(image), []
    for entry in _entries(folder):
        file = folder / entry.name
        if file == own or (entry.name.startswith(".") and entry.changed_s + LEASE_S > time()):  # being written
            continue
        try:
            about = file.read_json()
        except FileNotFoundError:  # withdrawn just now
            continue
        except StoreError:  # no lease of ours
            about = {"lapses": entry.changed_s + LEASE_S}
        if about.get("lapses", 0.0) > time() and not _is_dead(about):
            found.append(f"{about['holder']}, process {about['process']}" if "holder" in about else "unknown")
        elif about:
            file.delete_file()
    return found


def _entries(folder: Location) -> list[Entry]:
    try:
        return folder.entries() if folder.exists() else []
    except FileNotFoundError:  # the last holder has just removed it
        return []


def _write(own: Location, lasts_s: float) -> None:
    content = json.dumps({"holder": _me(), "process": os.getpid(), "lapses": time() + lasts_s}).encode()
    try:
        own.write_bytes(content)
    except FileNotFoundError:  # the last holder has just removed the empty folder
        own.write_bytes(content)


def _me() -> str:
    """Return this host, and its own count of processes where it is a container of a host."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 a link that is no path
    except OSError:
        return socket.gethostname()


def _is_dead(about: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is gone: nobody need wait for its lease to lapse."""
    if about.get("holder") != _me():
        return False
    try:
        os.kill(about["process"], 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return False


def _renew(own: Location, lasts_s: float, over: Event) -> None:
    while not over.wait(lasts_s / 4):
        try:
            _write(own, lasts_s)
        except (OSError, PipelineError) as error:
            log.warning("the lease %s could not be renewed, tried again soon: %s", own, error)


def _withdraw(image: Location, own: Location) -> None:
    own.delete_file()
    folder = _folder(image)
    if next(folder.files(), None) is None:
        folder.delete_empty()


def _folder(image: Location) -> Location:
    return image.parent / f"{image.name}.lease"
