"""Versions: what the workers of a cluster have installed, compared with what is here before they do any work.

A worker of another version takes work that it cannot unpickle, or writes other bytes. What this module sends goes by
value, so that it runs on workers that do not have this module, or no haloseg at all.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from time import monotonic

import cloudpickle  # type: ignore[import-untyped]
from distributed import Client, Worker, WorkerPlugin, get_worker

from pipeline.compute.asking import ANSWER_TIMEOUT_S, ask, tell_all, warn_of_mute
from pipeline.compute.runner import cause_of
from pipeline.compute.upkeep import on_scheduler, orphans
from pipeline.errors import ClusterError, RunError

JOIN_TIMEOUT_S = 5.0  # the run does nothing else meanwhile
MUTE_S = 60.0

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


def of_worker(dask_worker: Worker) -> dict[str, str]:
    """Return what a worker had installed when it was first asked: what is installed later, it does not run."""
    kept = vars(dask_worker)
    if "haloseg_installed" not in kept:
        kept["haloseg_installed"] = installed()
    found: dict[str, str] = kept["haloseg_installed"]
    return found


@cache
def of_this_process() -> dict[str, str]:
    """Return what this process had installed when it first asked."""
    return installed()


class Gate(WorkerPlugin):
    """Lets another plugin in on workers that have installed what is installed here, also on those that join later.

    Attributes
    ----------
    let_in : the other plugin, on a worker of the same versions that has set it up
    """

    def __init__(self, plugin: WorkerPlugin, *, versions: dict[str, str]) -> None:
        self._pickled: bytes = cloudpickle.dumps(plugin)
        self._versions = versions  # given, since what a class names travels with it, and caches go by name
        self.let_in: WorkerPlugin | None = None

    def setup(self, worker: Worker) -> None:
        """Set the plugin up, if the versions are alike."""
        if of_worker(worker) == self._versions:
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


@contextmanager
def behind_gate(client: Client, plugin: WorkerPlugin, *, name: str) -> Iterator[None]:
    """Keep a plugin on every worker of the same versions that there is or comes, for as long as the block runs.

    Raises
    ------
    ClusterError : the scheduler or a worker does not take it.
    """
    try:
        for orphan in on_scheduler(client, orphans) or ():
            with suppress(Exception):  # another run may sweep at the same moment
                tell_all(client, client.unregister_worker_plugin, orphan)
        tell_all(client, client.register_plugin, Gate(plugin, versions=of_this_process()), name=name)
    except Exception as error:
        raise ClusterError(
            f"every worker must take the run's work, got {cause_of(error)}; see that scheduler and workers live"
        ) from error
    try:
        yield
    finally:
        if client.status == "running":
            with suppress(Exception):  # a worker that dies now takes its copy with it
                tell_all(client, client.unregister_worker_plugin, name)


@dataclass(frozen=True, slots=True)
class Compared:
    """Which workers told what they have installed, which were mute, and what of it is not what is here."""

    told: frozenset[str]
    mute: frozenset[str]
    others: str


def check_versions(client: Client) -> None:
    """Compare what the workers of a cluster have installed with what is here; those that are mute are told of.

    Raises
    ------
    ClusterError : one differs; the message names what, on how many workers, and the remedy. Or all are mute.
    """
    found = compared(client)
    if found.others:
        raise ClusterError(f"workers must have the versions of the flow or command, got {found.others}")
    if found.mute and not found.told:
        raise ClusterError(
            f"a worker must answer within {ANSWER_TIMEOUT_S:g} s, got none that does of {len(found.mute)}; restart them"
        )
    warn_of_mute(found.mute, what="the others go on")


def compared(client: Client, *, workers: frozenset[str] | None = None, timeout_s: float | None = None) -> Compared:
    """Return what the workers with these addresses, all by default, have installed that is not what is here."""
    answers = ask(client, of_worker, workers=workers, timeout_s=timeout_s)
    here, there = of_this_process(), {worker: each for worker, each in answers.told.items() if isinstance(each, dict)}
    others = ""
    for name, ours in here.items():
        if differing := [each[name] for each in there.values() if each[name] != ours]:
            others = (
                f"{name} {' and '.join(sorted(set(differing)))} on {len(differing)} of {len(there)} workers, {ours} "
                "here; install the same on both and restart the workers"
            )
            break
    return Compared(frozenset(there), answers.mute, others)


class Newcomers:
    """Compares the workers of a run as they join; one that is mute is left out, and asked again after a while."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._compared = frozenset[str]()
        self._mute_until_s: dict[str, float] = {}

    def compare(self, workers: frozenset[str]) -> None:
        """End the run if a worker that was not there before has other versions than are here: it must do no block."""
        now_s = monotonic()
        unknown = {each for each in workers - self._compared if self._mute_until_s.get(each, now_s) <= now_s}
        if not unknown:
            return
        found = compared(self._client, workers=frozenset(unknown), timeout_s=JOIN_TIMEOUT_S)
        if found.others:
            raise RunError(
                f"workers must have the versions of the flow or command, got {found.others}; what is done is kept, run "
                "the same command again"
            )
        self._compared |= found.told
        self._mute_until_s |= dict.fromkeys(found.mute, monotonic() + MUTE_S)
        warn_of_mute(found.mute, what="the others go on", timeout_s=JOIN_TIMEOUT_S)

    def woke(self, worker: str) -> bool:
        """Hear that a worker had work back; returns whether it is still to be compared, which it then is at once."""
        self._mute_until_s.pop(worker, None)
        return worker not in self._compared
