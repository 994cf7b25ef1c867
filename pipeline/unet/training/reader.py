"""Reader: the process that draws, reads and decodes batches for a training, and nothing else; see ``loading``.

It imports no torch, which takes a second or two, and ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from traceback import format_exc

from pipeline.errors import PipelineError
from pipeline.unet.training.batches import batches
from pipeline.unet.training.packed import Packed, pack
from pipeline.unet.training.patches import Patches
from pipeline.unet.training.shared import Parcel, Shared

Steps = Generator[tuple[int, Packed], None, None]

_SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True, slots=True)
class Task:
    """What to read: the arguments of ``batches``."""

    patches: Patches
    n: int
    seed: int
    first: int
    last: int
    share: slice

    def batches(self) -> Steps:
        """Yield the steps with their patches, packed."""
        steps = batches(self.patches, self.n, seed=self.seed, first=self.first, last=self.last, share=self.share)
        with closing(steps):
            for step, drawn in steps:
                yield step, pack(drawn)


@dataclass(frozen=True, slots=True)
class Read:
    """The patches of a step lie in one of the memories."""

    step: int
    memory: int
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The patches cannot be had in this process."""

    cause: str


@dataclass(frozen=True, slots=True)
class Failed:
    """What ended the reading; ``error`` is None where it is none that a caller can act on."""

    error: PipelineError | OSError | None
    traceback: str


@dataclass(frozen=True, slots=True)
class Over:
    """All steps were read."""


def read(pipe: Connection, task: Shared, memories: list[Shared]) -> None:
    """Put the patches of each step into a memory that is free, and say so; over the pipe come numbers of such ones."""
    parcel, free = pipe.recv(), SimpleQueue[int]()
    for number in range(len(memories)):
        free.put(number)
    Thread(target=_listen, args=(pipe, free, os.getppid()), daemon=True).start()
    try:
        found: Task = task.get(parcel)
    except (ImportError, AttributeError) as error:  # such as what only the other process's __main__ defines
        pipe.send(Unreachable(str(error)))
        return
    for step, batch in found.batches():
        number = free.get()
        pipe.send(Read(step, number, memories[number].put(batch)))
    pipe.send(Over())


def _listen(pipe: Connection, free: SimpleQueue[int], parent: int) -> None:
    """Take the numbers of memories that are free again; end this process with the one that started it.

    The pipe ends with that one, unless a process that it forked still has it, too.
    """
    try:
        while True:
            while not pipe.poll(_SECONDS_BETWEEN_LOOKS):
                if os.getppid() != parent:
                    os._exit(1)
            free.put(pipe.recv_bytes()[0])
    except (EOFError, OSError):
        os._exit(1)


def main() -> None:
    """Be the process; the arguments are descriptors: of the pipe, of the task's memory, and of those for batches."""
    os.nice(10)  # where there is no core for all, the training's thread goes first: it is that which a GPU waits for
    descriptor, task, *memories = map(int, sys.argv[1:])
    with Connection(descriptor) as pipe:
        try:
            read(pipe, Shared(task), [Shared(each) for each in memories])
        except BrokenPipeError:
            os._exit(1)
        except Exception as error:  # noqa: BLE001 whatever it is, the one that started us tells it
            pipe.send(Failed(_sendable(error), format_exc()))


def _sendable(error: Exception) -> PipelineError | OSError | None:
    """Return an error that a caller can act on as one that another process can have."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno is not None else None
    return error if isinstance(error, PipelineError) else None
