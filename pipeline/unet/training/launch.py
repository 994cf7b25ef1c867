"""Launch: processes that do one work together on this machine; this one starts them, listens and ends them.

Each does its part. What the first one says is heard here, and its result is the result.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic
from traceback import format_exc
from typing import Any, Protocol, TypeVar

import torch

from pipeline.errors import PipelineError, RunError
from pipeline.unet.device import VISIBLE, gpus_for
from pipeline.unet.training.team import Team, joined

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
_GRACE_S = 3.0
_END_S = 10.0


class Work(Protocol[T_co]):
    """What each process does; it must be picklable, and so must what it returns and says."""

    def __call__(self, *, team: Team, say: Callable[[object], None]) -> T_co:
        """Do the part of one process; what the first one says is heard, and what it returns is the result."""
        ...


@dataclass(frozen=True, slots=True)
class _Done:
    """The result of the first process."""

    result: Any


@dataclass(frozen=True, slots=True)
class _Broken:
    """What a process says that ends by an error which no caller can act on; another that died may have caused it."""

    traceback: str


@dataclass(slots=True)
class _Process:
    """A process and what it has said."""

    rank: int
    process: SpawnProcess
    pipe: Connection
    error: PipelineError | None = None
    broken: _Broken | None = None
    done: _Done | None = None
    words: list[object] = field(default_factory=list)

    def listen(self) -> None:
        """Take what it has said by now."""
        try:
            while not self.pipe.closed and self.pipe.poll():
                self._take(pickle.loads(self.pipe.recv_bytes()))
        except (EOFError, OSError):
            self.pipe.close()

    def _take(self, word: object) -> None:
        match word:
            case PipelineError():
                self.error = word
            case _Broken():
                self.broken = word
            case _Done():
                self.done = word
            case _:
                self.words.append(word)

    @property
    def failed(self) -> bool:
        """Whether it has said so, or is no more."""
        return self.error is not None or self.broken is not None or bool(self.process.exitcode)

    @property
    def died(self) -> bool:
        """Whether it ended without a word."""
        return bool(self.process.exitcode) and self.error is None and self.broken is None


def launch(work: Work[T], n: int, *, device: str, on_word: Callable[[Any], None]) -> T:
    """Return what ``n`` processes make together; none of them is left then, nor where this raises.

    Raises
    ------
    PipelineError : a process raised it.
    RunError : a process died, or raised something else.
    """
    with TemporaryDirectory(prefix="haloseg-") as folder, _started(work, n, folder=folder, device=device) as started:
        leader, ends = started[0], [each.process.sentinel for each in started]
        while True:
            connection.wait([*ends, *(each.pipe for each in started if not each.pipe.closed)])
            for each in started:
                each.listen()
            while leader.words:
                on_word(leader.words.pop(0))
            if leader.done:
                result: T = leader.done.result
                return result
            if any(each.failed for each in started):
                raise _cause(started)


def _cause(started: list[_Process]) -> PipelineError:
    """Return why processes failed: what one says first, then that one died, then what the others made of it."""
    until = monotonic() + _GRACE_S
    while monotonic() < until and not any(each.error or each.died for each in started):
        connection.wait([each.process.sentinel for each in started], timeout=0.1)
        for each in started:
            each.listen()
    errors = [each.error for each in started if each.error]
    if errors:
        return errors[0]
    culprit = next((each for each in started if each.died), None) or next(each for each in started if each.failed)
    code = culprit.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    if culprit.broken:
        how = " ".join(culprit.broken.traceback.strip().splitlines()[-1].split())
    error = RunError(
        f"all {len(started)} processes must live until the end, got process {culprit.rank} ended by {how}; the same "
        "command goes on from the last validation"
    )
    error.__cause__ = RuntimeError(culprit.broken.traceback) if culprit.broken else None
    return error


@contextmanager
def _started(work: Work[Any], n: int, *, folder: str, device: str) -> Iterator[list[_Process]]:
    """Start the processes; none is left when the block ends."""
    context, started = get_context("spawn"), list[_Process]()
    gpus = gpus_for(n) if device == "cuda" else ("",) * n
    n_threads = max(1, torch.get_num_threads() // n)
    try:
        for rank, gpu in enumerate(gpus):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (work, rank, n, Path(folder), gpu, n_threads, theirs)
            process = context.Process(target=_take_part, args=arguments, daemon=True)
            process.start()
            theirs.close()  # the end of a process is then the end of its pipe
            started.append(_Process(rank, process, ours))
        yield started
        for each in started:
            each.process.join(_END_S)
    finally:
        for each in started:
            each.process.terminate()
        for each in started:
            each.process.join(_END_S)
            each.process.kill()
            each.process.join()
            each.pipe.close()


def _take_part(
    work: Work[Any], rank: int, n: int, folder: Path, gpu: str, n_threads: int, pipe: Connection
) -> None:
    """Be one of the processes, which sees its own GPU alone, if there is one for it: that is "cuda" then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it reaches all; the one that started us ends us
    Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the result, and libraries write there
    torch.set_num_threads(n_threads)

    def say(word: object) -> None:
        if rank == 0 or isinstance(word, PipelineError | _Broken):
            pipe.send_bytes(pickle.dumps(word))

    if gpu:
        os.environ[VISIBLE] = gpu
    # told before it leaves the others, too: to leave, it may have to wait for those that wait for it
    with _told(say), joined(rank, n, folder=folder, device="cuda" if gpu else "cpu") as team, _told(say):
        result = work(team=team, say=say)
        team.first(lambda: None)  # none leaves before all are done
    say(_Done(result))


@contextmanager
def _told(say: Callable[[object], None]) -> Iterator[None]:
    """Say what goes wrong while the block runs, and end this process."""
    try:
        yield
    except PipelineError as error:
        say(error)
        sys.exit(1)
    except Exception:  # noqa: BLE001 whatever it is, the one that started us tells it
        say(_Broken(format_exc()))
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it is no more: nobody would take its result."""
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
