"""Batches: what is learnt from at each step, read ahead.

All that is random in a step follows from the seed and the step's number alone. A training that goes on after a
restart, or reads further ahead, sees the same patches, whatever had been read before it stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.unet.patches import Patch, Patches

_PATCHES, _NETWORK = 1, 2


def draw_batch(patches: Patches, n: int, *, seed: int, step: int) -> list[Patch]:
    """Return the ``n`` patches of a step."""
    return patches.batch(n, np.random.default_rng((seed, step, _PATCHES)))


def network_seed(seed: int, step: int) -> int:
    """Return the seed of what is random in the network at a step, such as dropout."""
    return int(np.random.SeedSequence((seed, step, _NETWORK)).generate_state(1, np.uint64)[0])


def batches(
    patches: Patches, n: int, *, seed: int, first: int, last: int, ahead: int = 1
) -> Iterator[tuple[int, list[Patch]]]:
    """Yield the steps from ``first`` to ``last`` with their patches; ``ahead`` batches are read meanwhile."""
    with ThreadPoolExecutor(max_workers=ahead) as reader:
        coming, steps = deque[tuple[int, Future[list[Patch]]]](), iter(range(first, last + 1))

        def submit() -> None:
            for step in steps:
                coming.append((step, reader.submit(draw_batch, patches, n, seed=seed, step=step)))
                if len(coming) >= ahead:
                    break

        submit()
        while coming:
            step, batch = coming.popleft()
            drawn = batch.result()
            submit()
            yield step, drawn
