"""RunBlocks: the contract between a stage and whatever runs its blocks, and the runner that needs no cluster."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from pipeline.compute.retry_log import RetryLog
from pipeline.errors import PipelineError, RunError

RETRIES = 2
LARGEST_QUARANTINE = 100


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What one finished block, or column of blocks, did.

    Attributes
    ----------
    n_voxels : written
    read_s, compute_s, write_s, wait_s : seconds of each stage; reading and writing may go on while the device
        computes, and ``wait_s`` is how long it did not, for want of voxels or of room for results
    n_blocks : written
    n_voxels_read : from the store
    peak_rss_bytes, device_bytes : most memory, and most of the device's, that the process has had
    retries : why each attempt before this one came to nothing; the runner's to fill in
    """

    index: int
    n_voxels: int
    read_s: float
    compute_s: float
    write_s: float
    peak_rss_bytes: int = 0
    wait_s: float = 0.0
    n_blocks: int = 1
    n_voxels_read: int = 0
    device_bytes: int = 0
    retries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A block that failed again and again, and its last cause in one line."""

    index: int
    cause: str


class BlockWork(Protocol):
    """A stage's work on any of its blocks; travels to workers by pickle, so it holds paths and settings only.

    ``run`` reads one tile, writes one core and returns a record; running it twice changes nothing. A PipelineError
    raised in it ends the whole run at once (a full disk, say); any other exception counts against the block alone.

    Attributes
    ----------
    uses_device : whether blocks compute on a GPU where there is one; the others are kept off the workers that have one
        where there are some without
    """

    uses_device: ClassVar[bool]

    def setup(self) -> Any:  # noqa: ANN401 the state is the work's own affair
        """Return what is needed once per worker, such as the network on its device."""
        ...

    def run(self, state: Any, index: int) -> BlockRecord:  # noqa: ANN401
        """Do one block."""
        ...


class RunBlocks(Protocol):
    """Runs a stage's work on the given blocks; returns those that failed again and again."""

    def __call__(
        self, work: BlockWork, indices: Iterable[int], *, on_record: Callable[[BlockRecord], None]
    ) -> tuple[Quarantined, ...]:
        """Run every block, calling ``on_record`` here, in the caller's thread, as each one finishes."""
        ...


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cause_of(error: BaseException) -> str:
    """Return the error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:500]


def check_quarantine(quarantined: list[Quarantined]) -> None:
    """Stop a run in which so many blocks fail that it is the run that is broken, not the blocks."""
    if len(quarantined) >= LARGEST_QUARANTINE:
        raise RunError(
            f"at most {LARGEST_QUARANTINE - 1} blocks of a run may fail, got {len(quarantined)}; "
            f"the last cause: {quarantined[-1].cause}; mend it and run the same command again"
        )


def run_serial(
    work: BlockWork, indices: Iterable[int], *, on_record: Callable[[BlockRecord], None]
) -> tuple[Quarantined, ...]:
    """Run the blocks one after another in this process; see RunBlocks."""
    state = work.setup()
    quarantined: list[Quarantined] = []
    with closing(RetryLog()) as retry_log:
        for index in indices:
            record = _tried(work, state, index, retry_log=retry_log)
            if isinstance(record, BlockRecord):
                on_record(record)
            else:
                quarantined.append(record)
                check_quarantine(quarantined)
    return tuple(quarantined)


def _tried(
    work: BlockWork, state: Any, index: int, *, retry_log: RetryLog  # noqa: ANN401
) -> BlockRecord | Quarantined:
    """Run one block, as often as it takes up to the number of retries."""
    causes: list[str] = []
    for attempt in range(1 + RETRIES):
        try:
            record = work.run(state, index)
            return replace(record, retries=tuple(causes)) if causes else record
        except PipelineError:
            raise
        except Exception as error:  # noqa: BLE001 whatever a block dies of is recorded and reported, never lost
            causes.append(cause_of(error))
            retry_log.warn(f"block {index} failed, attempt {attempt + 1} of {1 + RETRIES}: {causes[-1]}")
    return Quarantined(index, causes[-1])
