"""Instances block by block against the whole volume at once: processor's time, and memory beyond the interpreter's.

The other side reads all class labels, numbers their components with cc3d, and writes the same shards and pyramid. Both
end in the same ids. Medians of interleaved rounds, each run in a process of its own.

    python tests/benchmarks/bench_stitch.py [--side 512] [--block 128] [--rounds 3] [--folder build/bench/stitch]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cc3d
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))
from instances import class_labels
from peaks import grown

from pipeline.compute.levels import build_levels
from pipeline.compute.runner import run_serial
from pipeline.compute.watch import UNWATCHED
from pipeline.geometry.grid import BlockGrid
from pipeline.stitch import stitch
from pipeline.store.arrays import open_array, write_shard
from pipeline.store.image import open_image
from pipeline.store.labels import Labels, create_labels, label_location, open_labels, publish
from pipeline.store.location import Location
from pipeline.store.pyramid import Downsampling


def make(folder, *, side, block):
    """Write class labels of lumps, two classes and what is between them, and return the image's path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((side,) * 3, np.float32), 4, mode="wrap")
    limits = np.quantile(smooth.ravel()[::97], (0.75, 0.9))
    voxels = np.digitize(smooth, limits).astype(np.uint8)
    return class_labels(folder, voxels, block=block, chunk=(64,), classes=("background", "a", "b"))


def at_once(image):
    """Number the components of the whole volume in memory, and write them as a label volume."""
    made_of, source = open_image(Location(image)), open_labels(f"{image}/labels/cells")
    at = label_location(made_of.location, "at-once")
    labels = Labels(at, source.axes, "uint64", source.layout, source.levels, {})
    create_labels(made_of, labels)
    ids, array = cc3d.connected_components(source.array[:], connectivity=6), open_array(at / "0")
    for block in BlockGrid(labels.spatial_shape, labels.layout.shard):
        write_shard(array, block.core, ids[block.core.slices].astype(np.uint64), location=at / "0")
    build_levels(at, labels.levels, layout=labels.layout, how=Downsampling.MODE, run=run_serial, watch=UNWATCHED)
    publish(made_of, labels)


def blockwise(image):
    stitch(image, labels="cells", name="blockwise")


SIDES = {"blockwise": blockwise, "at-once": at_once}


def measured(side, image):
    """Run one side in a process of its own, anew; return its seconds of the processor and its bytes."""
    (Location(image) / "labels" / side).delete()
    command = [sys.executable, __file__, "--run", side, "--image", image]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/stitch"))
    parser.add_argument("--run", choices=SIDES)
    parser.add_argument("--image")
    args = parser.parse_args()
    if args.run:
        begin = time.process_time()
        n_bytes = grown(lambda: SIDES[args.run](args.image))
        print(json.dumps({"cpu_s": time.process_time() - begin, "mib": n_bytes >> 20}))
        return
    image = make(args.folder, side=args.side, block=args.block)
    rounds = [{side: measured(side, image) for side in SIDES} for _ in range(args.rounds)]
    found = [open_labels(f"{image}/labels/{side}") for side in SIDES]
    assert np.array_equal(*(each.array[:] for each in found))
    keys = ("cpu_s", "mib")
    ours, theirs = ({key: statistics.median(r[side][key] for r in rounds) for key in keys} for side in SIDES)
    row = {"voxels": args.side**3, "instances": found[0].provenance["instances"], "blockwise": ours, "at-once": theirs}
    print(json.dumps(row | {"cpu": ours["cpu_s"] / theirs["cpu_s"], "memory": ours["mib"] / theirs["mib"]}))


if __name__ == "__main__":
    main()
