"""StageClock: where the time of a block of work goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(slots=True)
class StageClock:
    """Seconds that a worker spent reading, waiting for its reader or writer, computing and writing.

    Reading and writing go on while the device computes; ``wait_s + compute_s`` is what the clock on the wall shows.
    """

    read_s: float = 0.0
    wait_s: float = 0.0
    write_s: float = 0.0
    begin_s: float = field(default_factory=perf_counter)

    @property
    def compute_s(self) -> float:
        """Since the clock was made, but for what was waited; asked by the thread that computes, between its waits."""
        return perf_counter() - self.begin_s - self.wait_s

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``read``, ``wait`` or ``write``."""
        begin = perf_counter()
        try:
            yield
        finally:
            setattr(self, f"{stage}_s", getattr(self, f"{stage}_s") + perf_counter() - begin)
