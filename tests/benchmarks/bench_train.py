"""How much of a training's speed its loader costs: steps fed from memory, by threads, and by a process apart.

Threads and process read every patch from an OME-Zarr on disk, warped by the field of its augmentation, while steps are
taken; memory has the very same batches in a list. All carry out the changes on the device, and take the same steps.
What is timed begins after ``--skip`` steps, when most chunks are in the cache that a training has. With ``--cold`` it
has none: so it is in a volume of many times the cache's size, where hardly any chunk is met again. With ``--resident``
the image is held in memory as a whole, as small ones are; its patches are still drawn, cut out and brought to scale.

A fourth one is fed from memory while a process reads for nobody, as fast as it can: on few cores, that two processes
share them costs more than what passes between them. Rounds are interleaved; medians are told, and how they stand to
those from memory: of the steps' time, and of the CPU time of the training's process, all threads of it. The first
batch, for which the process has to start, is told by itself.

    python tests/benchmarks/bench_train.py [--device cpu|cuda|host] [--rounds 5] [--steps 40] [--skip 40] [--dims 2|3]
        [--width N] [--host-ms 25] [--cold | --resident]

``--device host`` stands for the processor of a GPU's machine, where there is none: one thread copies each batch as it
would for a GPU, and calls the operators of training steps, about ``--host-ms`` of them, on patches so small that they
compute next to nothing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import tifffile
import torch
from scipy.ndimage import gaussian_filter

import pipeline.lesson
from pipeline.config import Precision
from pipeline.ingest import ingest, ingest_labels
from pipeline.lesson import open_lesson
from pipeline.unet.device import pick_device
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.batches import draw_batch
from pipeline.unet.training.learner import Learner
from pipeline.unet.training.loading import Loading, loaded
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.packed import pack
from pipeline.unet.training.reader import Task
from pipeline.unet.training.recipe import Recipe
from pipeline.unet.training.warp import unpacked

AUGMENTATION = Augmentation(rotation_degrees=30, scale=0.2, gamma=0.3, noise=0.05)
ELASTIC_SIGMA_VOXELS = {2: 10.0, 3: 3.0}
SHAPES = {2: (16, 1024, 1024), 3: (192, 256, 256)}
MEMORY, BESIDE = "memory", "memory beside reading"
BEGUN_S = 4.0


def image_in(folder, dims):
    """Write and ingest a scan of blobs in noise, and the blobs as its labels; return the image's path."""
    rng, shape = np.random.default_rng(0), SHAPES[dims]
    blobs = gaussian_filter(rng.standard_normal(shape, np.float32), (0, 8, 8) if dims == 2 else 6) > 0
    voxels = 100 + 50 * blobs + 20 * rng.standard_normal(shape, np.float32)
    for name, array in (("scan", voxels.clip(0, 255).astype(np.uint8)), ("truth", blobs.astype(np.uint8))):
        tifffile.imwrite(folder / f"{name}.tif", array, photometric="minisblack")
    image = str(folder / "scan.zarr")
    ingest(str(folder / "scan.tif"), image, voxel_size_um=(0.01,) * 3)
    ingest_labels(str(folder / "truth.tif"), image=image, name="truth")
    return image


def learner_of(lesson, recipe, *, device):
    return Learner.new(lesson.settings, objective=Objective(recipe.loss), recipe=recipe, device=device)


def steps_of(device, image, recipe, lesson, *, host_ms):
    """Return what takes a step, from its batch and its number."""
    if device != "host":
        learner = learner_of(lesson, recipe, device=device)
        return lambda packed, step: learner.learn(unpacked(packed, device=device), step=step, rate=1e-3)
    torch.set_num_threads(1)
    changes = replace(recipe.augmentation, elastic_sigma_voxels=1.0)
    recipe = replace(recipe, patch=16, width=2, augmentation=changes, precision=Precision.FLOAT32)
    small = open_lesson([image], labels="truth", recipe=recipe)
    learner = learner_of(small, recipe, device="cpu")
    stand_in = pack(draw_batch(small.learn, recipe.batch_size(recipe.dims), seed=0, step=1))

    def call(step):
        return learner.learn(unpacked(stand_in, device="cpu"), step=step, rate=1e-3)

    def take(packed, step):
        for row in (packed.moved.images, packed.moved.classes):
            row.flat.copy()  # to where a GPU would take it from
        return [call(step) for _ in range(n_calls)][-1]

    begin = [time.process_time() for step in range(31) if step < 10 or call(step) is not None][10:]
    n_calls = max(1, round(host_ms / (1e3 * median(b - a for a, b in pairwise(begin)))))
    return take


def timed(take, drawn, *, skip):
    """Return ms of a step after the first few, and of CPU time of this process, and of the first batch."""
    begin, ends, first = time.perf_counter(), [], 0.0
    for step, packed in drawn:
        first = first or 1e3 * (time.perf_counter() - begin)
        loss = take(packed, step)
        if step == skip:
            loss.item()
            ends.append((time.perf_counter(), time.process_time()))
    loss.item()  # of a GPU, which is done with all of them then
    ends.append((time.perf_counter(), time.process_time()))
    return *(1e3 * (b - a) / (step - skip) for a, b in zip(*ends, strict=True)), first


def read_for_nobody(task, parent):
    while os.getppid() == parent:
        for _ in task.batches():
            pass


@contextmanager
def fed(kind, task, in_memory):
    if kind == MEMORY:
        yield in_memory
    elif kind == BESIDE:
        reader = get_context("spawn").Process(target=read_for_nobody, args=(task, os.getpid()), daemon=True)
        reader.start()
        time.sleep(BEGUN_S)
        yield in_memory
        reader.kill()
        reader.join()
    else:
        with loaded(task, loading=kind) as steps:
            yield steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "host"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=40)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--dims", type=int, default=2, choices=(2, 3))
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--host-ms", type=float, default=25.0)
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    args = parser.parse_args()
    device = args.device if args.device == "host" else pick_device(args.device)
    keep_freed_memory()  # as ``fit`` does
    pipeline.lesson.RESIDENT_BYTES *= args.resident  # else read from disk, however small
    pipeline.lesson.CACHED_BYTES *= not args.cold
    changes = replace(AUGMENTATION, elastic_sigma_voxels=ELASTIC_SIGMA_VOXELS[args.dims])
    recipe = Recipe(dims=args.dims, width=args.width, augmentation=changes, precision=Precision(args.precision))
    with tempfile.TemporaryDirectory() as folder:
        image = image_in(Path(folder), args.dims)
        lesson = open_lesson([image], labels="truth", recipe=recipe)
        take = steps_of(device, image, recipe, lesson, host_ms=args.host_ms)
        task = Task(lesson.learn, recipe.batch_size(args.dims), 0, 1, args.skip + args.steps, slice(None))
        in_memory, rounds = list(task.batches()), {kind: [] for kind in (MEMORY, BESIDE, *Loading)}
        for number in range(args.rounds + 1):
            for kind, found in rounds.items():
                with fed(kind, task, in_memory) as steps:
                    found.append(timed(take, steps, skip=args.skip))
                told = "{}: {:.2f} ms a step, {:.2f} ms of CPU time; {:.0f} ms for the first batch"
                print("warm-up," * (not number), told.format(kind, *found[-1]), file=sys.stderr, flush=True)
    medians = {kind: [median(each) for each in zip(*found[1:], strict=True)] for kind, found in rounds.items()}
    memory = medians[MEMORY]
    json.dump({
        "device": device, "dims": args.dims, "width": lesson.settings.width, "precision": args.precision,
        "threads": torch.get_num_threads(), "cold": args.cold, "resident": args.resident,
        "ms_per_step": {kind: round(each[0], 2) for kind, each in medians.items()},
        "cpu_ms_per_step": {kind: round(each[1], 2) for kind, each in medians.items()},
        "ms_of_first_batch": {kind: round(each[2]) for kind, each in medians.items()},
        "steps_per_s_of_those_from_memory": {kind: round(memory[0] / each[0], 3) for kind, each in medians.items()},
        "cpu_ms_more_than_from_memory": {kind: round(each[1] - memory[1], 2) for kind, each in medians.items()},
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
