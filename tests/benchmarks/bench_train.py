"""How much of a training's speed its loader costs: patches/s of the real loop beside the same loop fed from memory.

The real loop reads every patch from an OME-Zarr on disk, warped by the field of its augmentation, while the step before
is taken; the other one takes the very same patches from a list. Both carry out the changes on the device, and take the
same steps. Rounds are interleaved; medians are told. On a machine that others use as well, patches per second of CPU
time say more: on a CPU that is what reading takes from the network.

    python tests/benchmarks/bench_train.py [--device cpu|cuda] [--rounds 5] [--steps 20] [--dims 2|3] [--width N]
        [--sleep-ms MS]

With ``--sleep-ms`` a step only sleeps so long: a device that needs nothing of the processor meanwhile.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import tifffile
import torch

import pipeline.lesson
from pipeline.config import Precision
from pipeline.ingest import ingest, ingest_labels
from pipeline.lesson import open_lesson
from pipeline.unet.device import pick_device
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.batches import batches
from pipeline.unet.training.learner import Learner
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.warp import batch_of

AUGMENTATION = Augmentation(rotation_degrees=30, scale=0.2, gamma=0.3, noise=0.05)
ELASTIC_SIGMA_VOXELS = {2: 10.0, 3: 3.0}
SHAPES = {2: (4, 4096, 4096), 3: (192, 256, 256)}


def image_in(folder, dims):
    """Write and ingest a scan of noise with labels; return the image's path."""
    rng, shape = np.random.default_rng(0), SHAPES[dims]
    voxels = rng.integers(0, 256, shape, dtype=np.uint8)
    for name, array in (("scan", voxels), ("truth", (voxels > 128).astype(np.uint8))):
        tifffile.imwrite(folder / f"{name}.tif", array, photometric="minisblack")
    image = str(folder / "scan.zarr")
    ingest(str(folder / "scan.tif"), image, voxel_size_um=(0.01,) * 3)
    ingest_labels(str(folder / "truth.tif"), image=image, name="truth")
    return image


def rate_of(take, drawn, *, n):
    """Return patches/s of steps from batches as they come, and patches per second of CPU time of all threads."""
    ends, before = [], None
    for step, patches in drawn:
        loss = take(patches, step)
        if before is None:
            loss.item()  # the first step waits for the first batch, and is not counted
            ends.append((time.perf_counter(), time.process_time()))
        before = loss
    before.item()  # of a GPU, which is done with all of them then
    ends.append((time.perf_counter(), time.process_time()))
    return tuple((step - 1) * n / max(b - a, 1e-9) for a, b in zip(*ends, strict=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dims", type=int, default=2, choices=(2, 3))
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--sleep-ms", type=float, default=0.0)
    args = parser.parse_args()
    device = pick_device(args.device)
    keep_freed_memory()  # as ``fit`` does
    pipeline.lesson.RESIDENT_BYTES = 0  # read from disk, however small
    changes = replace(AUGMENTATION, elastic_sigma_voxels=ELASTIC_SIGMA_VOXELS[args.dims])
    recipe = Recipe(dims=args.dims, width=args.width, augmentation=changes, precision=Precision(args.precision))
    with tempfile.TemporaryDirectory() as folder:
        lesson = open_lesson([image_in(Path(folder), args.dims)], labels="truth", recipe=recipe)
        n = recipe.batch_size(args.dims)
        learner = Learner.new(lesson.settings, objective=Objective(recipe.loss), recipe=recipe, device=device)

        def take(patches, step):
            if args.sleep_ms:
                time.sleep(args.sleep_ms / 1e3)
                return torch.zeros(())
            return learner.learn(batch_of(patches, device=device), step=step, rate=1e-3)

        steps = {"seed": 0, "first": 1, "last": args.steps + 1}
        in_memory = list(batches(lesson.learn, n, **steps))
        rates = {"from disk": [], "from memory": []}
        for name in [name for _, name in zip(range(2 * args.rounds + 2), cycle(rates), strict=False)]:
            drawn = in_memory if name == "from memory" else batches(lesson.learn, n, **steps)
            rates[name].append(rate_of(take, drawn, n=n))
            print("{}: {:.2f} patches/s, {:.2f} per CPU s".format(name, *rates[name][-1]), file=sys.stderr, flush=True)
    disk, memory = ([median(each) for each in zip(*found[1:], strict=True)] for found in rates.values())  # one warms up
    json.dump({
        "device": device, "dims": args.dims, "width": lesson.settings.width, "precision": args.precision,
        "threads": torch.get_num_threads(), "patches_per_s_from_disk": round(disk[0], 2),
        "patches_per_s_from_memory": round(memory[0], 2), "ratio": round(disk[0] / memory[0], 3),
        "ratio_of_patches_per_cpu_s": round(disk[1] / memory[1], 3),
    }, sys.stdout)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
