"""Memory does not grow with the scan: a scan of 16 GiB, and one of an eighth, from BigTIFF to labels.

Runs the command line as a user would, watches the resident memory of every process of it, and fails when one passes
2 GiB or when the two sizes differ by more than 15 %.

    python tests/benchmarks/bench_memory.py [--gib 16] [--folder build/bench-memory]
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import tifffile
import torch

from pipeline.store.statistics import Normalisation
from pipeline.unet.model import Model, save_model
from pipeline.unet.network import UNet
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule

LIMIT_BYTES = 2 * 2**30
TOLERANCE = 0.15
WIDTH = 65536
TILE = 512


def write_scan(path, *, gib):
    """Write a tiled BigTIFF of uint16 whose content repeats but is not constant, one tile in memory at a time."""
    rows = int(gib * 2**30 / 2 / WIDTH) // TILE * TILE
    rng = np.random.default_rng(0)
    tiles = [
        (1000 + 200 * np.sin(np.arange(TILE * TILE) / (30 + i)) + rng.integers(0, 8, TILE * TILE)).astype(np.uint16)
        for i in range(8)
    ]
    n_tiles = rows // TILE * (WIDTH // TILE)
    tifffile.imwrite(
        path, (tiles[i % 8].reshape(TILE, TILE) for i in range(n_tiles)), shape=(rows, WIDTH), dtype=np.uint16,
        tile=(TILE, TILE), compression="zstd", bigtiff=True,
    )  # fmt: skip
    return rows * WIDTH


def watched(command):
    """Run a command; return its document, its seconds and the largest resident bytes of any of its processes."""
    begin, peak, over = time.perf_counter(), {}, threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def watch():
            while not over.wait(0.1):
                try:
                    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    for each in family:
                        peak[each.pid] = max(peak.get(each.pid, 0), each.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

        thread = threading.Thread(target=watch)
        thread.start()
        out, _ = process.communicate()
        over.set()
        thread.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(out), time.perf_counter() - begin, max(peak.values())


def measure(folder, *, gib):
    folder.mkdir(parents=True, exist_ok=True)
    scan, image, model = folder / "scan.tif", folder / "scan.zarr", folder / "tiny.safetensors"
    n_voxels = write_scan(scan, gib=gib)
    torch.manual_seed(0)
    settings = UNetSettings(dims=2, width=1, depth=1, padding=Padding.SAME, n_convs=1)
    weights = UNet(settings).state_dict()
    rule = closed_form_rule(settings)
    save_model(Model(settings, ("a", "b"), (0, 1), Normalisation.ZSCORE, ("0",), None, rule, {}, weights), model)
    haloseg = [sys.executable, "-m", "pipeline.cli"]
    _, ingest_s, ingest_peak = watched([*haloseg, "ingest", str(scan), str(image), "--json"])
    command = [*haloseg, "segment", str(image), "--model", str(model), "--name", "tiny", "--workers", "2", "--json"]
    _, segment_s, segment_peak = watched([*command, "--budget", "512M"])
    shutil.rmtree(folder)
    row = {
        "gib": gib, "voxels": n_voxels, "ingest_s": round(ingest_s, 1), "ingest_peak_mib": ingest_peak >> 20,
        "segment_s": round(segment_s, 1), "segment_peak_mib": segment_peak >> 20,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=16.0)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-memory"))
    args = parser.parse_args()
    small, large = (measure(args.folder / f"{gib:g}", gib=gib) for gib in (args.gib / 8, args.gib))
    for stage in ("ingest_peak_mib", "segment_peak_mib"):
        growth = large[stage] / small[stage] - 1
        sizes = (f"{row[stage]} at {row['gib']:g} GiB" for row in (small, large))
        print(f"{stage}: {', '.join(sizes)} ({growth:+.1%})")
        if large[stage] << 20 > LIMIT_BYTES or growth > TOLERANCE:
            sys.exit(f"{stage} must stay under 2 GiB and within {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
