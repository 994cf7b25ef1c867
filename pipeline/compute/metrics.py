"""Metrics: what a worker has done, as Prometheus counters under /metrics of its Dask dashboard.

Dask serves the registry of the process that it runs in, so that counters made here appear beside its own. A worker
that imports this module when it starts (``worker.preload`` of Dask's configuration) serves all of them from nought on:
Prometheus sees what a counter gained from its second sample on. A column of blocks may take many minutes: its work
tells the meter of each shard and of its seconds as it goes, and the record at the end counts for what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

from prometheus_client import Counter, Gauge

from pipeline.compute.clock import StageClock
from pipeline.compute.runner import BlockRecord

WORKS = (
    "IngestBlocks", "LevelBlocks", "MeasureBlocks", "SegmentColumns", "SegmentBlocks", "CertifyBoxes", "ValueBlocks",
    "ComponentBlocks", "InstanceBlocks",
)  # fmt: skip
_STAGES = ("read", "wait", "compute", "write")
_BLOCKS = Counter("haloseg_blocks", "Blocks written", ["work"])
_FAILED = Counter("haloseg_blocks_failed", "Attempts at blocks that failed", ["work"])
_VOXELS = Counter("haloseg_voxels", "Voxels written", ["work"])
_SECONDS = Counter("haloseg_seconds", "Seconds of each stage; some overlap", ["work", "stage"])
_BEATS = Counter("haloseg_beats", "Signs of life: slabs and tiles begun")
_WRONG = Counter("haloseg_boxes_wrong", "Sampled boxes in float32 that are not the reference's beyond rounding")
_PEAK_RSS = Gauge("haloseg_peak_rss_bytes", "Most memory that the process has had")
_DEVICE = Gauge("haloseg_device_bytes", "Most memory of its device that the process has had")
_mine = local()
for _work in WORKS:
    for _counter in (_BLOCKS, _FAILED, _VOXELS):
        _counter.labels(_work)
    for _stage in _STAGES:
        _SECONDS.labels(_work, _stage)


class Meter:
    """Counts what a block of a kind of work, or a column of blocks, does: each part once, when it is told of.

    Where work fails in the middle, what it has told stays counted: those shards are written, and whoever does the rest
    tells of the rest alone.
    """

    def __init__(self, *, work: str) -> None:
        self._work = work
        self._n_blocks = self._n_voxels = 0
        self._seconds = dict.fromkeys(_STAGES, 0.0)

    def wrote(self, *, n_voxels: int, n_blocks: int = 1) -> None:
        """Count shards that were written just now; another thread may tell of seconds meanwhile."""
        self._n_blocks, self._n_voxels = self._n_blocks + n_blocks, self._n_voxels + n_voxels
        _BLOCKS.labels(self._work).inc(n_blocks)
        _VOXELS.labels(self._work).inc(n_voxels)

    def spent(self, clock: StageClock | BlockRecord) -> None:
        """Count the seconds that passed since this was told last."""
        for stage in _STAGES:
            before_s = self._seconds[stage]
            now_s = max(before_s, getattr(clock, f"{stage}_s"))  # a difference of two clocks may go back by rounding
            self._seconds[stage] = now_s
            _SECONDS.labels(self._work, stage).inc(now_s - before_s)

    def end(self, record: BlockRecord) -> None:
        """Count what the record tells of and nobody told before."""
        self.wrote(n_voxels=record.n_voxels - self._n_voxels, n_blocks=record.n_blocks - self._n_blocks)
        self.spent(record)
        if record.peak_rss_bytes:
            _PEAK_RSS.set(record.peak_rss_bytes)
            _DEVICE.set(record.device_bytes)


@contextmanager
def metered(*, work: str) -> Iterator[Meter]:
    """Let what this thread runs find a meter of this kind of work while the block of code runs."""
    _mine.meter = made = Meter(work=work)
    try:
        yield made
    finally:
        _mine.meter = None


def meter() -> Meter | None:
    """Return the meter of what this thread runs; None where nobody counts, as in a run without workers."""
    found: Meter | None = getattr(_mine, "meter", None)
    return found


def count_beat() -> None:
    """Add a sign of life of a block that is at work."""
    _BEATS.inc()


def count_failure(*, work: str) -> None:
    """Add an attempt at a block that failed."""
    _FAILED.labels(work).inc()


def count_wrong_box() -> None:
    """Add a sampled box of a result in float32 that has other classes or values than rounding explains."""
    _WRONG.inc()
