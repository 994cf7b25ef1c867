"""Batches: what is learnt from at each step, read ahead.

All that is random in a step follows from the seed and the step's number alone. A training that goes on after a
restart, reads further ahead or with more threads, or shares a batch among processes, sees the same patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from pipeline.errors import BudgetError, PipelineError, RunError
from pipeline.unet.training.patches import Patch, Patches

AHEAD = 2
N_READERS = 8
_PATCHES, _NETWORK = 1, 2
_WHOLE = slice(None)


def draw_batch(patches: Patches, n: int, *, seed: int, step: int) -> list[Patch]:
    """Return the ``n`` patches of a step."""
    return [read() for read in _drawn(patches, n, seed=seed, step=step)]


def network_seed(seed: int, step: int) -> int:
    """Return the seed of what is random in the network at a step, such as dropout."""
    return int(np.random.SeedSequence((seed, step, _NETWORK)).generate_state(1, np.uint64)[0])


def batches(
    patches: Patches, n: int, *, seed: int, first: int, last: int, ahead: int = AHEAD, share: slice = _WHOLE
) -> Generator[tuple[int, list[Patch]], None, None]:
    """Yield the steps from ``first`` to ``last`` with their patches; ``ahead`` batches are read meanwhile.

    One thread draws, since what is drawn depends on what was drawn before; others read.

    Raises
    ------
    PipelineError, OSError : a patch cannot be read, or the memory does not hold those of a batch.
    """
    with ThreadPoolExecutor(N_READERS) as readers, ThreadPoolExecutor(1) as drawer:

        def read(step: int) -> list[Future[Patch]]:
            return [readers.submit(each) for each in _drawn(patches, n, seed=seed, step=step)[share]]

        coming, steps = deque[tuple[int, Future[list[Future[Patch]]]]](), iter(range(first, last + 1))

        def submit() -> None:
            for step in steps:
                coming.append((step, drawer.submit(read, step)))
                if len(coming) >= ahead:
                    break

        submit()
        while coming:
            step, drawn = coming.popleft()
            with _one_line(step):
                batch = [each.result() for each in drawn.result()]
            submit()
            yield step, batch


@contextmanager
def _one_line(step: int) -> Iterator[None]:
    """Turn whatever a decoder dies of into one line; failing storage stays an OSError."""
    try:
        yield
    except (PipelineError, OSError):
        raise
    except MemoryError as error:
        raise BudgetError(
            f"the patches of a batch must fit the memory, got out of memory at step {step} ({_told(error)}); set a "
            "smaller batch or patch in the recipe"
        ) from error
    except Exception as error:
        raise RunError(
            f"every patch must be readable, got {_told(error)} (step {step}); mend the image, and the same command "
            "goes on"
        ) from error


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _drawn(patches: Patches, n: int, *, seed: int, step: int) -> list[Callable[[], Patch]]:
    """Return what reads the patches of a step."""
    rng = np.random.default_rng((seed, step, _PATCHES))
    return [patches.drawn(rng) for _ in range(n)]
