"""Versions: what the workers of a cluster have installed, compared with what is here before any work is sent.

A worker of another version takes work that it cannot unpickle, or writes other bytes. What tells is sent by value, so
that it runs on workers that do not have this module, or no haloseg at all.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys

import cloudpickle  # type: ignore[import-untyped]
from distributed import Client

from pipeline.errors import ClusterError


def installed() -> dict[str, str]:
    """Return the versions that must be alike; of haloseg the digest of its code, too. Needs the standard library alone.

    What stands behind a "+" is left out: flows may have a CPU's torch, and workers a GPU's.
    """
    # here, since this function travels alone
    import hashlib
    import platform
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec
    from pathlib import Path

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("haloseg", "torch", "zarr"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    package = find_spec("pipeline")
    folders = package.submodule_search_locations if package else None
    digest = hashlib.sha256()
    for folder in map(Path, folders or ()):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    found["haloseg"] += f" of code {digest.hexdigest()[:8]}" if folders else " without code"
    return found


def check_versions(client: Client) -> None:
    """Compare what the workers of a cluster have installed with what is here.

    Raises
    ------
    ClusterError : one differs; the message names what, on how many workers, and the remedy.
    """
    here, there = installed(), _told(client)
    for name, ours in here.items():
        others = sorted({each[name] for each in there if each[name] != ours})
        if others:
            n_others = sum(each[name] != ours for each in there)
            raise ClusterError(
                f"workers must have the versions of the flow or command, got {name} {' and '.join(others)} on "
                f"{n_others} of {len(there)} workers, {ours} here; install the same on both and restart the workers"
            )


def _told(client: Client) -> list[dict[str, str]]:
    """Return what each worker has installed; one that dies or leaves meanwhile tells nothing."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        told = client.run(installed, on_error="return")
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    return [each for each in told.values() if isinstance(each, dict)]
