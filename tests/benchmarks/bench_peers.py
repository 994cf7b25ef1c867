"""Ours beside what others would run: seconds, memory and exactness, from an image on disk to classes on disk.

Every row runs in a process of its own, in interleaved rounds. Seconds are medians; imports and loading the network do
not count. CPU seconds, of all threads, tell how far other work on the machine has slowed a row down. Memory is the
highest resident memory during the run above that right before it. The truth is one forward pass over the whole
mirrored scan (of the largest case our own columns); classes count where its two most probable ones differ by more than
rounding does. ``matrix_share`` is the scan's own arithmetic, without any halo, per second, of what a large product of
matrices in this precision reaches on the device. A GPU gets larger scans, and each scheme runs once before it is
timed: cuDNN is loaded then. Scans, models and truths stay in build/bench/peers for the next run. Writes
build/bench/peers.json. Needs the extra ``bench``.

    python tests/benchmarks/bench_peers.py [--quick] [--cases "3-D 256;2-D 4096"] [--schemes "MONAI;dask"] [--rounds 3]
        [--device cpu|cuda]
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import zarr

sys.path.insert(0, str(Path(__file__).parents[1]))
from ours import OURS
from peers import PEERS, Job
from volumes import model_file, scan_file, whole_scan

from pipeline.compute.runner import run_serial
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.unet.cost import bare_multiply_adds
from pipeline.unet.device import peak_device_bytes
from pipeline.unet.model import load_model
from pipeline.unet.numbers import exactly
from pipeline.unet.settings import Padding, UNetSettings

FOLDER = Path("build/bench")
TOLERANCE = 1e-5
SCHEMES = OURS | PEERS


def _case(dims, size, *, width, depth):
    settings = UNetSettings(dims=dims, width=width, depth=depth, padding=Padding.SAME, batch_norm=True, n_classes=2)
    return f"{dims}-D {size}, width {width}, depth {depth}", ((size,) * dims, settings)


CASES = dict([
    _case(2, 4096, width=16, depth=4), _case(2, 2048, width=64, depth=4),
    _case(3, 256, width=8, depth=3), _case(3, 256, width=16, depth=3),
])  # fmt: skip
# to keep a GPU busy, with fewer than 2**31 numbers in every layer of a bare pass: that over 8192 x 8192, width 64, was
# not done within a minute on an H200
LARGE = dict([_case(2, 5120, width=64, depth=4), _case(3, 384, width=32, depth=3)])
# by name alone, a quarter of an hour: what a volume of usual size gains, of which the mirrored halo is less
BY_NAME = dict([_case(3, 512, width=8, depth=3)])
QUICK = dict([_case(2, 1024, width=16, depth=4), _case(3, 96, width=8, depth=3)])
EVERY = CASES | LARGE | BY_NAME | QUICK


def folder_of(case):
    return FOLDER / "peers" / re.sub(r"\W+", "-", case)


def make(case):
    """Write the case's image, model and truth, once: probabilities of shape (classes, *spatial)."""
    shape, settings = EVERY[case]
    job = Job(folder_of(case), settings.dims)
    job.folder.mkdir(parents=True, exist_ok=True)
    voxels = scan_file(job.folder / "scan.tif", shape)
    image = ingest(str(job.folder / "scan.tif"), job.image, overwrite=True)
    model_file(Path(job.model), settings)
    if case in BY_NAME:  # one pass over it would take more memory than there is
        np.save(job.folder / "truth.npy", streamed(job))
        return
    np.save(job.folder / "truth.npy", whole_scan(voxels[None], job.model, image.statistics))


def streamed(job):
    """Return the probabilities of our columns, which other tests hold to be those of one pass."""
    plan = plan_segment(job.image, model=job.model, name="truth", probabilities=True)
    segment(plan, run=run_serial)
    return np.asarray(zarr.open_array(str(plan.probabilities.location / "0"), mode="r")[...])


def run_row(case, scheme, device):
    """Run one scheme in this process and return its seconds, its memory and how far its probabilities are off."""
    shape, settings = EVERY[case]
    job = Job(folder_of(case), settings.dims, device)
    run = prepared(job, scheme)
    if device == "cuda":
        run()
        run = prepared(job, scheme)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts anew, proc_pid_clear_refs(5)
    begin, cpu = time.perf_counter(), time.process_time()
    told = run()
    seconds, cpu, peak = time.perf_counter() - begin, time.process_time() - cpu, _resident("VmHWM")
    matrices = 2 * bare_multiply_adds(settings, shape) / seconds
    row = {
        "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "peak_mib": round((peak - before) / 1024),
        "device_mib": round(peak_device_bytes(device) / 2**20), "idle_share": None,
        "matrix_share": round(matrices / matrix_rate(SCHEMES[scheme].precision, device), 4), "max_difference": None,
    }  # fmt: skip
    if isinstance(told, dict):
        return row | told
    if told is not None:
        likely, truth = told[0].float().softmax(dim=0).cpu().numpy(), np.load(job.folder / "truth.npy", mmap_mode="r")
        row["max_difference"] = max(float(np.abs(a - b).max()) for a, b in zip(likely, truth, strict=True))
    return row


def prepared(job, scheme):
    if Path(job.classes).is_symlink():
        Path(job.classes).unlink()
    shutil.rmtree(job.classes, ignore_errors=True)
    return SCHEMES[scheme].prepare(job)


def matrix_rate(precision, device):
    """Return the floating-point operations per second of the best of some large products of matrices."""
    n = 8192 if device == "cuda" else 2048
    a, times = torch.randn(n, n, dtype=torch.bfloat16 if "bf16" in precision else torch.float32, device=device), []
    with exactly(tf32="tf32" in precision):
        for _ in range(5):
            begin = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def _resident(field):
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def flipped_shares(job):
    """Return how many of the classes on disk differ from the truth's, where rounding alone cannot make them differ.

    Of all, and of those farther than the halo from the scan's border, which do not depend on what lies beyond it.
    """
    truth, halo = np.load(job.folder / "truth.npy", mmap_mode="r"), load_model(job.model).rule.halo
    likely = np.sort(truth, axis=0)
    decided = likely[-1] - likely[-2] > 2 * TOLERANCE
    flipped = (zarr.open_array(job.classes, mode="r")[...] != truth.argmax(axis=0)) & decided
    inside = tuple(slice(h, n - h) for h, n in zip(halo, flipped.shape, strict=True))
    n_inside = decided[inside].sum()
    return {
        "flipped_share": float(flipped.sum() / decided.sum()),
        "flipped_inside": float(flipped[inside].sum() / n_inside) if n_inside else None,
    }


def in_process(task, *, threads):
    """Run this file on a task in a process of its own and return its answer; None where it failed, and why it did."""
    command = [sys.executable, __file__, "--row", json.dumps(task), "--threads", str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{task}: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])  # peers print lines of their own before


def measure(case, schemes, *, device, rounds, threads):
    job = Job(folder_of(case), EVERY[case][1].dims)
    if not (job.folder / "truth.npy").exists() and in_process({"case": case}, threads=threads) is None:
        sys.exit(f"{case}: no truth")
    runs, shares = {name: [] for name in schemes}, {}
    for _ in range(rounds):
        for name in list(runs):
            run = in_process({"case": case, "scheme": name, "device": device}, threads=threads)
            if run is None:
                del runs[name]
                continue
            runs[name].append(run)
            shares[name] = flipped_shares(job)
            print(f"{case}: {name}: {run | shares[name]}", file=sys.stderr, flush=True)
    return [
        {
            "case": case, "scheme": name, "engine": SCHEMES[name].engine, "precision": SCHEMES[name].precision,
            "device": device, "seconds": statistics.median(run["seconds"] for run in done),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in done),
            "peak_mib": max(run["peak_mib"] for run in done),
        } | {name: done[-1][name] for name in ("device_mib", "idle_share", "matrix_share", "max_difference")}
        | shares[name] for name, done in runs.items()
    ]  # fmt: skip


def table(rows, *, base):
    """Return the rows as Markdown, with the ratio of their seconds to the scheme ``base`` of the same case."""
    bases = {row["case"]: row["seconds"] for row in rows if row["scheme"] == base}
    lines = [f"| {' | '.join(rows[0])} | to {base} |", "|---" * (len(rows[0]) + 1) + "|"]
    for row in rows:
        ratio = row["seconds"] / bases[row["case"]] if row["case"] in bases else None
        cells = [f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in (*row.values(), ratio)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen(names, wanted):
    """Return the names that hold one of the wanted parts between semicolons; all where none is wanted."""
    found = [name for name in names if not wanted or any(part.strip() in name for part in wanted.split(";"))]
    if not found:
        sys.exit(f"one of {', '.join(names)} must hold a wanted part, got {wanted}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases, for development")
    parser.add_argument("--cases", help="parts of names, separated by semicolons")
    parser.add_argument("--schemes", help="parts of names, separated by semicolons")
    parser.add_argument("--skip-slow", action="store_true", help="without those that compute voxels several times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", default="MONAI default", help="the scheme that ratios are to")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        answer = run_row(**args.row) if "scheme" in args.row else make(args.row["case"])
        print(json.dumps(answer or {}))
        return
    schemes = [
        name for name in chosen(SCHEMES, args.schemes)
        if args.device in SCHEMES[name].devices and not (args.skip_slow and SCHEMES[name].is_slow)
    ]  # fmt: skip
    usual = CASES if args.device == "cpu" else LARGE
    cases = chosen(QUICK if args.quick else usual | (BY_NAME if args.cases else {}), args.cases)
    about = {"device": args.device, "rounds": args.rounds, "threads": args.threads}
    rows = [row for case in cases for row in measure(case, schemes, **about)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "peers.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows, base=args.base) if rows else "")
    if len(rows) < len(cases) * len(schemes):
        sys.exit("some schemes failed: see above")


if __name__ == "__main__":
    main()
