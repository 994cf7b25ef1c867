"""What tiling costs: seconds and exactness of tiles of several sizes against one forward pass over the whole scan.

Classes are compared wherever the two most probable ones differ by more than rounding does.

All rows of a case run in one process, in interleaved rounds; the ratio is what counts. Writes build/bench/tiles.json.

    python tests/benchmarks/bench_tiles.py [--rounds 3]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.network import UNet, channels_last
from pipeline.unet.predict import Predictor
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule

TOLERANCE = 1e-5
CASES = {
    "2-D 1024^2, width 16, depth 4, same": (
        (1024, 1024), UNetSettings(dims=2, width=16, depth=4, padding=Padding.SAME, batch_norm=True), (128, 256, 512)),
    "2-D 1024^2, width 16, depth 4, valid": (
        (1024, 1024), UNetSettings(dims=2, width=16, depth=4, padding=Padding.VALID), (128, 256, 512)),
    "3-D 96^3, width 8, depth 2, same": (
        (96, 96, 96), UNetSettings(dims=3, width=8, depth=2, padding=Padding.SAME, batch_norm=True), (24, 48, 96)),
}  # fmt: skip


def timed(function):
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def measure(name, *, rounds):
    shape, settings, cores = CASES[name]
    torch.manual_seed(0)
    network, rule = UNet(settings).eval().requires_grad_(False), closed_form_rule(settings)
    network.to(memory_format=channels_last(settings.dims))
    voxels = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    tile = read_mirrored(voxels, Box.whole(shape).round_up(rule.stride).grow(rule.halo))

    def whole():
        x = torch.from_numpy(tile[None]).contiguous(memory_format=channels_last(len(shape)))
        with torch.inference_mode():
            return network.probabilities(network(x))[0].numpy()

    def tiled(core):
        size = rule.tile_shape((core,) * len(shape))
        predictor = Predictor(network, rule, windows=((0.0, 1.0),), tile_shape=size, device="cpu")
        return predictor.segment_with_probabilities(tile, shape)[1]

    runs = {"whole scan": whole} | {f"tiles of core {core}": (lambda core=core: tiled(core)) for core in cores}
    seconds, results = {scheme: [] for scheme in runs}, {}
    for _ in range(rounds):
        for scheme, run in runs.items():
            took, results[scheme] = timed(run)
            seconds[scheme].append(took)
    keep = tuple(slice(t, t + n) for n, t in zip(shape, rule.trim, strict=True))
    truth = results["whole scan"][(slice(None), *keep)]
    likely = np.sort(truth, axis=0)
    decided = likely[-1] - likely[-2] > 2 * TOLERANCE  # where rounding cannot turn one class into another
    base = statistics.median(seconds["whole scan"])
    rows = []
    for scheme, times in seconds.items():
        got = truth if scheme == "whole scan" else results[scheme]
        rows.append({
            "case": name, "scheme": scheme, "seconds": round(statistics.median(times), 3),
            "ratio_to_whole": round(statistics.median(times) / base, 2),
            "max_difference": float(np.abs(got - truth).max()),
            "flipped_share": float((got.argmax(0) != truth.argmax(0))[decided].mean()),
        })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows = [row for name in CASES for row in measure(name, rounds=rounds)]
    out = Path("build/bench/tiles.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    print("| case | scheme | seconds | to whole | max difference | flipped |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(f"{v:.2g}" if isinstance(v, float) else v for v in row.values()) + " |")
    if any(row["max_difference"] > TOLERANCE or row["flipped_share"] for row in rows):
        sys.exit("tiles must equal the whole scan")


if __name__ == "__main__":
    main()
