"""The demo: the main job, on the scan that ships with the project, as a Prefect flow on Dask workers."""

from __future__ import annotations

import filecmp
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from flows.segment import segment_scan
from pipeline.ingest import ingest_labels
from pipeline.report import picture
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels

_SHIPPED = ("scan.tif", "truth.tif", "model.safetensors")
_SHARD = (64,)  # 18 blocks, so that there is something to see


def demo(folder: str) -> dict[str, Any]:
    """Ingest, segment and evaluate the shipped scan in ``folder``, draw a picture, and return the figures.

    A second call in the same folder finds everything done.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    with as_file(files("pipeline.demo")) as shipped:
        for name in _SHIPPED:
            if not ((home / name).exists() and filecmp.cmp(shipped / name, home / name, shallow=False)):
                shutil.copyfile(shipped / name, home / name)
    scan, truth, model = (str(home / name) for name in _SHIPPED)
    image, drawn = str(home / "scan.zarr"), home / "picture.png"
    result, figures = segment_scan(scan, image, model, name="interior", truth=truth, shard=_SHARD)
    known = ingest_labels(truth, image=image, name="truth")
    drawn.write_bytes(picture(open_image(image), open_labels(result.labels.location), truth=known))
    return {
        "voxels": result.n_voxels, "blocks": result.n_blocks, "blocks_run": result.n_run,
        "voxels_per_s": result.voxels_per_s,
        "peak_rss_bytes": result.peak_rss_bytes, **(figures.to_json() if figures else {}),
        "labels": str(result.labels.location), "picture": f"{drawn} (image, truth, labels)",
        "next": f"haloseg info {image}; haloseg segment YOUR_SCAN --model {model} --name interior",
    }  # fmt: skip
