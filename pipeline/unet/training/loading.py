"""Loading: who reads the batches of a training ahead, threads of its own, or a process apart.

What either reads, and in which order, is the same; only who waits for whom is not:

    training   |- step 1 -|- step 2 -|- step 3 -|     takes patches where they lie
    reader     |r2|r3|    |r4|       |r5|             puts them there, a few steps ahead at most
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any

from pipeline.errors import RunError
from pipeline.unet.training.batches import AHEAD
from pipeline.unet.training.reader import Failed, Read, Steps, Task, Unreachable
from pipeline.unet.training.shared import Shared

_LOG = logging.getLogger(__name__)
_MAIN = "from pipeline.unet.training.reader import main; main()"
_STDERR = 2
_END_S = 10.0


class Loading(StrEnum):
    """Who reads."""

    THREADS = "threads"
    PROCESS = "process"


def loading_for(device: str) -> Loading:
    """Return who reads for a training on a device: a process where that is a GPU.

    A GPU waits for the calls of the training's thread, and that thread for the interpreter, which threads that read
    take from it; the process makes 1.04 (2-D) and 0.94 times (3-D) the steps of one that has its batches in memory,
    threads 0.70 and 0.64, on two quiet cores (tests/benchmarks/README.md). Its first batch comes half a second later
    than a thread's, while the network is set up. A CPU has no core to spare, and computes within its calls: four steps
    of a tiny network took 0.7 s with a process, and 0.2 s without.
    """
    apart = device == "cuda" and hasattr(os, "memfd_create")
    return Loading.PROCESS if apart else Loading.THREADS


@contextmanager
def loaded(task: Task, *, loading: Loading) -> Iterator[Steps]:
    """Yield the steps of a task with their patches, the same whoever reads; a process begins here, and ends here.

    What a process has read lies in memory that it uses again once the next step is asked for. Images that this one has
    in memory are copied once, for both to see; patches that another process cannot have, such as of a store in the
    memory of this one, are read by threads.

    Raises
    ------
    PipelineError, OSError : of the iterator, as of ``batches``.
    RunError : of the iterator, where the process died.
    """
    if loading is Loading.THREADS or task.first > task.last:
        with closing(task.batches()) as steps:
            yield steps
    else:
        with _started(task) as reader, closing(reader.batches(task) if reader else task.batches()) as steps:
            yield steps


@dataclass(frozen=True, slots=True)
class _Reader:
    """The process, the pipe to it, and the memories that it puts patches into."""

    process: Popen[bytes]
    pipe: Connection
    memories: list[Shared]

    def batches(self, task: Task) -> Steps:
        while True:
            match self._heard():
                case Read(step, memory, parcel):
                    yield step, self.memories[memory].get(parcel)
                    with suppress(OSError):  # it has read all, or died: that is heard next
                        self.pipe.send_bytes(bytes((memory,)))
                case Failed(error, traceback):
                    error = error or _lost(" ".join(traceback.strip().splitlines()[-1].split()))
                    raise error from RuntimeError(traceback)
                case Unreachable(cause):
                    _tell(cause)
                    yield from task.batches()
                    return
                case _:
                    return

    def _heard(self) -> object:
        """Return what it says next."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait(_END_S)
            raise _lost(f"signal {-code}" if code < 0 else f"exit code {code}") from error


def _lost(how: str) -> RunError:
    return RunError(
        f"the process that reads patches must live until the end, got its end by {how}; see that memory suffices: the "
        "same command goes on from the last validation"
    )


@contextmanager
def _started(task: Task) -> Iterator[_Reader | None]:
    """Start a process that reads, of which nothing is left after the block; None where it cannot have the patches."""
    with ExitStack() as held:
        memory, *memories = (held.enter_context(closing(Shared.new())) for _ in range(2 + AHEAD))
        try:
            parcel = memory.put(task, dumped=_dumped)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            _tell(str(error))
            yield None
            return
        ours, theirs = Pipe()
        held.enter_context(ours)
        with theirs:  # the end of the process is then the end of the pipe
            process = _process(theirs.fileno(), *(each.descriptor for each in (memory, *memories)))
        held.callback(_end, process)
        with suppress(OSError):
            ours.send(parcel)
        yield _Reader(process, ours, memories)


def _process(*descriptors: int) -> Popen[bytes]:
    """Start Python anew: a fork would inherit locks, and a daemon process may start none of ``multiprocessing``'s.

    A terminal's Ctrl-C does not reach it, which is a process group of its own: it ends the one that ends it.
    """
    paths = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    return Popen(
        [sys.executable, "-P", "-c", _MAIN, *map(str, descriptors)], pass_fds=descriptors, stdin=DEVNULL,
        stdout=_STDERR,  # stdout is for the result, and libraries write there
        env={**os.environ, "PYTHONPATH": paths}, process_group=0,
    )  # fmt: skip


def _end(process: Popen[bytes]) -> None:
    process.kill()
    with suppress(TimeoutExpired):  # storage that hangs holds it until it answers
        process.wait(_END_S)


def _tell(cause: str) -> None:
    _LOG.warning("patches are read by threads, since a process apart cannot have them: %s", " ".join(cause.split()))


class _Pickler(pickle.Pickler):
    """Refuses what would be empty elsewhere."""

    def reducer_override(self, value: object) -> Any:  # noqa: ANN401 as of pickle
        if str(getattr(value, "protocol", "")) == "memory":  # of fsspec
            raise pickle.PicklingError("a file system in this process's memory")
        return NotImplemented


def _dumped(value: object, *, protocol: int, buffer_callback: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    file = BytesIO()
    _Pickler(file, protocol=protocol, buffer_callback=buffer_callback).dump(value)
    return file.getvalue()
