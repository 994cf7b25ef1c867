"""Metrics: what a worker has done, as Prometheus counters under /metrics of its Dask dashboard.

Dask serves the registry of the process that it runs in, so that counters made here appear beside its own. A worker
that imports this module when it starts (``worker.preload`` of Dask's configuration) serves all of them from nought on:
Prometheus sees what a counter gained from its second sample on.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from pipeline.compute.runner import BlockRecord

WORKS = ("IngestBlocks", "LevelBlocks", "MeasureBlocks", "SegmentColumns", "SegmentBlocks", "CertifyBoxes")
_STAGES = ("read", "wait", "compute", "write")
_BLOCKS = Counter("haloseg_blocks", "Blocks written", ["work"])
_FAILED = Counter("haloseg_blocks_failed", "Attempts at blocks that failed", ["work"])
_VOXELS = Counter("haloseg_voxels", "Voxels written", ["work"])
_SECONDS = Counter("haloseg_seconds", "Seconds of each stage; some overlap", ["work", "stage"])
_BEATS = Counter("haloseg_beats", "Signs of life: slabs and tiles begun")
_PEAK_RSS = Gauge("haloseg_peak_rss_bytes", "Most memory that the process has had")
_DEVICE = Gauge("haloseg_device_bytes", "Most memory of its device that the process has had")
for _work in WORKS:
    for _counter in (_BLOCKS, _FAILED, _VOXELS):
        _counter.labels(_work)
    for _stage in _STAGES:
        _SECONDS.labels(_work, _stage)


def count(record: BlockRecord, *, work: str) -> None:
    """Add what a finished block of a kind of work did."""
    _BLOCKS.labels(work).inc(record.n_blocks)
    _VOXELS.labels(work).inc(record.n_voxels)
    for stage in _STAGES:
        _SECONDS.labels(work, stage).inc(getattr(record, f"{stage}_s"))
    if record.peak_rss_bytes:
        _PEAK_RSS.set(record.peak_rss_bytes)
        _DEVICE.set(record.device_bytes)


def count_beat() -> None:
    """Add a sign of life of a block that is at work."""
    _BEATS.inc()


def count_failure(*, work: str) -> None:
    """Add an attempt at a block that failed."""
    _FAILED.labels(work).inc()
