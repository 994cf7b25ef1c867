"""Make the demo's files again: ``python -m pipeline.demo.make``, with HALOSEG_DATA at the folder that holds ``fib25``.

The volume is cut in two along z, with a gap of four slices: the network learns from the deep part, the demo segments
the shallow one. A voxel is boundary (class 0) when a neighbour within two steps along an axis is of another body, which
gives boundaries of four voxels, 40 nm, about what two membranes and their cleft measure. All others are interior (1).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pipeline import cli
from pipeline.scans.backend import open_scan

SHIPPED = (slice(0, 96), slice(0, 160), slice(0, 160))
LEARNED = (slice(100, 175), slice(None), slice(None))


def interior(bodies: NDArray[Any]) -> NDArray[np.uint8]:
    """Return 1 inside bodies and 0 on their boundaries and outside, shape as ``bodies`` (z, y, x)."""
    inside: NDArray[np.bool_] = bodies != 0
    for step in (1, 2):
        for axis in range(bodies.ndim):
            low = [slice(None)] * bodies.ndim
            high = list(low)
            low[axis], high[axis] = slice(None, -step), slice(step, None)
            differs = bodies[tuple(low)] != bodies[tuple(high)]
            inside[tuple(low)] &= ~differs
            inside[tuple(high)] &= ~differs
    return inside.view(np.uint8)


def make(data: Path, *, folder: Path) -> int:
    """Write scan.tif, truth.tif and model.safetensors into ``folder``; returns the exit code of the training."""
    grey = open_scan(str(data / "grayscale.tif")).to_numpy()
    truth = interior(open_scan(f"{data / 'bodies.h5'}::bodies").to_numpy())
    _write(folder / "scan.tif", grey[SHIPPED])
    _write(folder / "truth.tif", truth[SHIPPED])
    with TemporaryDirectory() as scratch:
        deep = Path(scratch)
        _write(deep / "scan.tif", grey[LEARNED])
        _write(deep / "truth.tif", truth[LEARNED])
        image = str(deep / "deep.zarr")
        commands = [
            ["ingest", str(deep / "scan.tif"), image],
            ["ingest", "--labels-of", image, "--name", "interior", str(deep / "truth.tif")],
            ["train", image, "--labels", "interior", "--model", str(deep / "model.safetensors"),
             "--recipe", str(folder / "recipe.toml")],
        ]  # fmt: skip
        code = next((code for code in map(cli.main, commands) if code), 0)
        if not code:  # in place of the one that ships, which no training would replace
            (folder / "model.safetensors").write_bytes((deep / "model.safetensors").read_bytes())
        return code


def _write(path: Path, voxels: NDArray[Any]) -> None:
    """Write a stack with voxels of 10 nm along every axis."""
    per_um = (100.0, 100.0)
    about = {"axes": "ZYX", "spacing": 0.01, "unit": "um"}
    tifffile.imwrite(
        path, voxels, imagej=True, compression="deflate", predictor=True, resolution=per_um, metadata=about
    )


if __name__ == "__main__":
    sys.exit(make(Path(os.environ["HALOSEG_DATA"]) / "fib25", folder=Path(__file__).parent))
