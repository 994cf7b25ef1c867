"""What the workers of an archive's cluster do between scans, and what very many blocks cost.

- idle: scans of timed blocks on two workers, each with an ingest before and a report after it, by the lanes of the
  archive's flow: share of the workers' time that is idle with one scan at once, and with two.
- blocks: a work that does nothing on 64 simulated workers, in tasks of many blocks or, one by one, each a task as long
  blocks are: blocks/s, and the memory of the one process that all are in, tenth by tenth.

    python tests/benchmarks/bench_archive.py [--only idle|blocks] [--blocks 100000] [--one-by-one] [--workers 64]
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import dask
import psutil
from distributed import Client, LocalCluster

from pipeline.compute import window
from pipeline.compute.cluster import DaskRunner, open_runner
from pipeline.compute.local import LOG_LENGTH
from pipeline.compute.losses import Losses
from pipeline.compute.runner import BlockRecord
from pipeline.compute.upkeep import PREFIX

INGEST_S, REPORT_S, BLOCK_S = 2.0, 1.0, 0.5
N_SCANS, N_BLOCKS, N_WORKERS = 5, 60, 2


@dataclass(frozen=True)
class Timed:
    """A block's work without the block, of a length of its own."""

    seconds: float

    def setup(self):
        return None

    def run(self, _state, index):
        begin = time.perf_counter()
        if self.seconds:
            time.sleep(self.seconds)
        return BlockRecord(index, 1, 0.0, time.perf_counter() - begin, 0.0)


def bench_idle():
    rows = []
    for at_once in (1, 2):
        busy = 0.0

        def on_record(record):
            nonlocal busy
            busy += record.compute_s

        def scan(number, run, on_record=on_record):
            time.sleep(INGEST_S)
            replace(run, priority=-number)(Timed(BLOCK_S), range(N_BLOCKS), on_record=on_record)
            time.sleep(REPORT_S)

        with open_runner(n_workers=N_WORKERS) as run, ThreadPoolExecutor(at_once) as lanes:
            begin = time.perf_counter()
            for lane in [lanes.submit(scan, number, run) for number in range(N_SCANS)]:
                lane.result()
            took = time.perf_counter() - begin
        ends = INGEST_S + REPORT_S  # before the first block and after the last one there is nothing to overlap with
        rows.append({
            "case": f"{at_once} scans at once", "seconds": round(took, 1),
            "idle_share": round(1 - busy / (N_WORKERS * took), 3),
            "idle_share_between_scans": round(1 - busy / (N_WORKERS * (took - ends)), 3),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def bench_blocks(n_blocks, n_workers, *, one_by_one):
    window.TASK_S = 0.0 if one_by_one else window.TASK_S
    process, resident, n_done = psutil.Process(), [], 0
    settings = {  # what 64 workers look at, each in its process, one process would look at 64 times
        "distributed.admin.low-level-log-length": LOG_LENGTH, "distributed.worker.profile.enabled": False,
        "distributed.admin.system-monitor.interval": "60s", "distributed.admin.tick.interval": "10s",
    }  # fmt: skip

    def on_record(_record):
        nonlocal n_done
        n_done += 1
        if n_done % (n_blocks // 10) == 0:
            resident.append(process.memory_info().rss >> 20)
            print(n_done, f"{time.perf_counter() - begin:.0f} s", resident[-1], "MiB", file=sys.stderr, flush=True)

    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        losses = Losses(prefix=f"{PREFIX}{client.id}-")
        with losses.listening(client):
            begin = time.perf_counter()
            DaskRunner(client, losses)(Timed(0.0), range(n_blocks), on_record=on_record)
            took = time.perf_counter() - begin
    return [{
        "case": f"{n_blocks} empty blocks{', one by one' if one_by_one else ''}, {n_workers} workers in one process",
        "blocks_per_s": round(n_blocks / took), "mib": resident,
    }]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("idle", "blocks"))
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--one-by-one", action="store_true", help="each block is a task, however short")
    parser.add_argument("--workers", type=int, default=64)
    args = parser.parse_args()
    benches = {
        "idle": bench_idle, "blocks": lambda: bench_blocks(args.blocks, args.workers, one_by_one=args.one_by_one)
    }  # fmt: skip
    rows = [row for name, bench in benches.items() if args.only in (None, name) for row in bench()]
    folder = Path("build/bench")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "archive.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
