"""Versions: what the workers of a cluster have installed, compared with what is here before they do any work.

A worker of another version takes work that it cannot unpickle, or writes other bytes. What this module sends goes by
value, so that it runs on workers that do not have this module, or no haloseg at all.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable

import cloudpickle  # type: ignore[import-untyped]
from distributed import Client, Worker, WorkerPlugin, get_worker

from pipeline.errors import ClusterError

cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


class Gate(WorkerPlugin):
    """Lets another plugin in on workers that have installed what is installed here, also on those that join later.

    Attributes
    ----------
    let_in : the other plugin, on a worker of the same versions that has set it up
    """

    def __init__(self, plugin: WorkerPlugin) -> None:
        self._pickled: bytes = cloudpickle.dumps(plugin)
        self._versions = installed()
        self.let_in: WorkerPlugin | None = None

    def setup(self, worker: Worker) -> None:
        """Set the plugin up, if the versions are alike."""
        if installed() == self._versions:
            plugin: WorkerPlugin = pickle.loads(self._pickled)
            plugin.setup(worker)
            self.let_in = plugin

    def teardown(self, worker: Worker) -> None:
        """End the plugin, if it was let in."""
        if self.let_in is not None:
            self.let_in.teardown(worker)


def _run_blocks(name: str, indices: tuple[int, ...], task_s: float) -> object:
    """Have the work behind the gate of this name run blocks; where it was not let in, return the worker's address."""
    worker = get_worker()
    work = getattr(worker.plugins.get(name), "let_in", None)
    return worker.address if work is None else work.run_blocks(indices, task_s=task_s)


class ThroughGate:
    """The task that Dask sees; it goes by value, at the cost of a task that goes by name."""

    _pickled = cloudpickle.dumps(_run_blocks)

    __call__ = staticmethod(_run_blocks)

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        return pickle.loads, (self._pickled,)


def check_versions(client: Client) -> None:
    """Compare what the workers of a cluster have installed with what is here.

    Raises
    ------
    ClusterError : one differs; the message names what, on how many workers, and the remedy.
    """
    _, others = compared(client)
    if others:
        raise ClusterError(f"workers must have the versions of the flow or command, got {others}")


def compared(client: Client, workers: frozenset[str] | None = None) -> tuple[frozenset[str], str]:
    """Return which workers told what they have installed, and what of it is not what is here, with the remedy.

    Parameters
    ----------
    workers : addresses of those to ask; all by default. One that dies or leaves meanwhile tells nothing.
    """
    asked = None if workers is None else sorted(workers)
    told = client.run(installed, workers=asked, on_error="return")
    here, there = installed(), {worker: each for worker, each in told.items() if isinstance(each, dict)}
    for name, ours in here.items():
        if others := [each[name] for each in there.values() if each[name] != ours]:
            return frozenset(there), (
                f"{name} {' and '.join(sorted(set(others)))} on {len(others)} of {len(there)} workers, {ours} here; "
                "install the same on both and restart the workers"
            )
    return frozenset(there), ""
