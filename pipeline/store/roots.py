"""Roots: where a service may read and write, when whoever runs it says so.

Flows take paths from anybody who can start one. With HALOSEG_ROOTS set, a comma-separated list of folders and URL
prefixes, every path must lie in one of them, links followed. Paths are kept with the runs for all to see, so that one
with a password in it is refused everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import ArgumentError
from pipeline.store.location import Location

VARIABLE = "HALOSEG_ROOTS"
_CREDENTIALS = re.compile(r"[\w+.-]+://[^/]*@|[?&][^=&]*(signature|token|secret|password|key)[^=&]*=", re.IGNORECASE)
# what fsspec takes for a path though it is none: its names of the local file system, a home folder, chains of stores
_DISGUISED = re.compile(r"(file|local):|~|[\w+.-]+::|.*::[\w+.-]+://", re.IGNORECASE)


def check_paths(*paths: str | None) -> None:
    """Refuse paths outside the roots, and those that hold credentials.

    Raises
    ------
    ArgumentError : in one line that does not repeat the credentials.
    """
    roots = [root.strip() for root in os.environ.get(VARIABLE, "").split(",") if root.strip()]
    for path in paths:
        if not path:
            continue
        if _CREDENTIALS.search(path):
            raise ArgumentError(
                "a path must hold no credentials, got some in a URL; give them to the workers' environment"
            )
        if roots and _DISGUISED.match(path):
            raise ArgumentError(f"a path must be plain where {VARIABLE} is set, got {path}; use /folder/file or a URL")
        if roots and not any(_inside(path, root) for root in roots):
            raise ArgumentError(f"a path must lie in {VARIABLE} ({', '.join(roots)}), got {path}; move it there")


def _inside(path: str, root: str) -> bool:
    ours, theirs = Location(path.partition("::")[0]), Location(root)
    if ours.is_local != theirs.is_local:
        return False
    if ours.is_local:
        return Path(ours.url).resolve().is_relative_to(Path(theirs.url).resolve())
    return ".." not in ours.url.split("/") and f"{ours.url}/".startswith(f"{theirs.url.rstrip('/')}/")
