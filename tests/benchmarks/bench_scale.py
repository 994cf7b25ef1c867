"""How a run scales: with workers, with the scan, and with the number of columns.

- workers: two Dask workers of one thread against one, same scan, same network, interleaved rounds.
- voxels: seconds per voxel of a tiny network on slides of 2^24 to 2^32 voxels, whose shards are one shard many times.
- columns: a work that does nothing, on two workers, in tasks of many columns or, one by one, each a task as long
  columns are: overhead per column, and the memory of scheduler, workers and client, tenth by tenth.

    python tests/benchmarks/bench_scale.py [--only workers|voxels|columns] [--columns 100000] [--one-by-one]
                                           [--largest 32]
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from clusters import processes
from volumes import model_file, scan_file

from pipeline.compute import window
from pipeline.compute.cluster import open_runner
from pipeline.compute.local import LOG_LENGTH
from pipeline.compute.runner import BlockRecord, run_serial
from pipeline.config import Scheme
from pipeline.geometry.box import Box
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.arrays import open_array, plan_layout, write_shard
from pipeline.store.image import commit_image, create_image
from pipeline.store.location import Location
from pipeline.store.statistics import Histogram, merge
from pipeline.unet.settings import Padding, UNetSettings
from pipeline.works.columns import SegmentColumns

FOLDER = Path("build/bench/scale")


def segmented(image, model, *, run, **scheme):
    """Segment anew and return what the run says of itself."""
    shutil.rmtree(Path(image) / "labels", ignore_errors=True)
    return segment(plan_segment(str(image), model=model, name="bench", scheme=Scheme(**scheme)), run=run)


def bench_workers(rounds):
    settings = UNetSettings(dims=2, width=16, depth=4, padding=Padding.SAME, batch_norm=True)
    scan_file(FOLDER / "scan.tif", (4096, 4096))
    image = str(FOLDER / "workers.zarr")
    ingest(str(FOLDER / "scan.tif"), image, overwrite=True, shard=(1024, 1024))
    model, seconds = str(model_file(FOLDER / "workers.safetensors", settings)), {1: [], 2: []}
    os.environ["OMP_NUM_THREADS"] = "1"
    for _ in range(rounds):
        for n_workers in seconds:
            with open_runner(n_workers=n_workers) as run:
                segmented(image, model, run=run, n_workers=n_workers)  # every worker has its network from here on
                seconds[n_workers].append(segmented(image, model, run=run, n_workers=n_workers).wall_s)
    one, two = (statistics.median(each) for each in seconds.values())
    return [{"case": "workers", "one_s": round(one, 2), "two_s": round(two, 2), "speedup": round(one / two, 2)}]


def slide(n_voxels):
    """Return a slide of so many voxels on disk: one shard of noise, linked to the place of every shard."""
    side = isqrt(n_voxels)
    location = Location(str(FOLDER / f"slide-{side}.zarr"))
    if (location / "zarr.json").exists():
        return location.url
    layout = plan_layout((side, side), chunk=(512, 512), shard=(2048, 2048))
    image = create_image(
        location, shape=(1, side, side), dtype=np.dtype(np.uint8), axes="cyx", layout=layout, voxel_size_um=None,
        scan={"made_by": "bench_scale"},
    )  # fmt: skip
    box = Box((0, 0), (2048, 2048))
    voxels = np.random.default_rng(0).integers(90, 110, (1, 2048, 2048), dtype=np.uint8)
    write_shard(open_array(location / "0"), box, voxels, location=location / "0")
    first = Path(location.url) / "0" / "c" / "0" / "0" / "0"
    for y in range(side // 2048):
        for x in range(side // 2048):
            place = first.parents[1] / str(y) / str(x)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place != first:
                os.link(first, place)
    commit_image(image, merge([(Histogram.of(voxels[0]),)]))
    return location.url


def bench_voxels(rounds, largest):
    """Of interleaved rounds the least: what the columns take, by the processor's time and the clock, and the rest."""
    settings = UNetSettings(dims=2, width=2, depth=1, n_convs=1, padding=Padding.SAME)
    model, rows = str(model_file(FOLDER / "voxels.safetensors", settings)), {}
    powers = range(24, largest + 1, 2)
    small, large = [power for power in powers if power < 30], [power for power in powers if power >= 30]
    for power in (24, *small * rounds, *large):
        cpu_s = {"columns": 0.0, "rest": 0.0}

        def run(work, indices, *, on_record, cpu_s=cpu_s):
            begin = time.process_time()
            failed = run_serial(work, indices, on_record=on_record)
            cpu_s["columns" if isinstance(work, SegmentColumns) else "rest"] += time.process_time() - begin
            return failed

        done = segmented(slide(2**power), model, run=run)
        row = {
            "cpu_ns_per_voxel": 1e9 * cpu_s["columns"] / done.n_voxels,
            "ns_per_voxel": 1e9 * (done.compute_s + done.wait_s) / done.n_voxels,
            "rest_cpu_ns_per_voxel": 1e9 * cpu_s["rest"] / done.n_voxels,
            "wall_ns_per_voxel": 1e9 * done.wall_s / done.n_voxels,
            "blocks": done.n_blocks, "peak_mib": done.peak_rss_bytes >> 20,
        }  # fmt: skip
        print(power, row, file=sys.stderr, flush=True)
        best = rows.setdefault(power, row)
        rows[power] = {name: min(of, row[name]) for name, of in best.items()}
    return [{"case": f"2^{power} voxels"} | {k: round(v, 2) for k, v in row.items()} for power, row in rows.items()]


@dataclass(frozen=True)
class Nothing:
    """A column's work without the column."""

    def setup(self):
        return None

    def run(self, _state, index):
        return BlockRecord(index, 1, 0.0, 0.0, 0.0)


def bench_columns(n_columns, *, one_by_one):
    window.TASK_S = 0.0 if one_by_one else window.TASK_S
    os.environ["DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH"] = str(LOG_LENGTH)
    resident, n_done = {"scheduler": [], "workers": [], "client": []}, 0

    def on_record(_record):
        nonlocal n_done
        n_done += 1
        if n_done % (n_columns // 10) == 0:
            for name, of in members.items():
                resident[name].append(sum(each.memory_info().rss for each in of) >> 20)
            print(n_done, f"{time.perf_counter() - begin:.0f} s", resident, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
        workers = [started.worker("--nthreads", "1", "--no-nanny") for _ in range(2)]
        with open_runner(cluster=started.address, n_workers=2) as run:
            run.client.wait_for_workers(2)
            members = {
                "scheduler": [psutil.Process(started.scheduler.pid)], "client": [psutil.Process()],
                "workers": [psutil.Process(each.pid) for each in workers],
            }  # fmt: skip
            begin = time.perf_counter()
            run(Nothing(), range(n_columns), on_record=on_record)
            took = time.perf_counter() - begin
    return [{
        "case": f"{n_columns} empty columns{', one by one' if one_by_one else ''}",
        "ms_per_column": round(1e3 * took / n_columns, 3), "mib": resident,
    }]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("workers", "voxels", "columns"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--columns", type=int, default=100_000)
    parser.add_argument("--one-by-one", action="store_true", help="each column is a task, however short")
    parser.add_argument("--largest", type=int, default=30, help="power of two of the largest slide's voxels")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    benches = {
        "workers": lambda: bench_workers(args.rounds), "voxels": lambda: bench_voxels(args.rounds, args.largest),
        "columns": lambda: bench_columns(args.columns, one_by_one=args.one_by_one),
    }  # fmt: skip
    rows = [row for name, bench in benches.items() if args.only in (None, name) for row in bench()]
    (FOLDER.parent / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
