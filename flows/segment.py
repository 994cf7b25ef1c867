"""The flow of one scan: ingest, segment, evaluate, report. Stages are tasks, blocks are not; paths are all it holds."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import BlockRecord, run_serial
from pipeline.compute.watch import Watcher
from pipeline.config import DEFAULT_BUDGET_BYTES, UNCOUNTED_WORKERS, Scheme
from pipeline.console import bars, quantity
from pipeline.evaluate import Evaluated, evaluate
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.report import picture
from pipeline.segment import Segmented, segment
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.unet.device import pick_device
from pipeline.verify import Certificate

_SECONDS_BETWEEN_UPDATES = 2.0


@dataclass(slots=True)
class ArtifactWatcher:
    """Shows a stage's progress in the Prefect UI, at most every two seconds, and to ``also`` at once; see Watcher."""

    also: Watcher
    artifact: Any = None
    n_blocks: int = 0
    n_done: int = 0
    updated: float = 0.0

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Make a progress artifact for the stage."""
        self.also.begin(stage, n_blocks=n_blocks, n_done=n_done)
        self.n_blocks, self.n_done, self.updated = n_blocks, n_done, monotonic()
        self.artifact = create_progress_artifact(
            self._percent(), key=stage.replace(" ", "-"), description=f"{stage}: {n_blocks} blocks, {n_done} were done"
        )

    def advance(self, record: BlockRecord) -> None:
        """Move the artifact, now and then and at the end."""
        self.also.advance(record)
        self.n_done += record.n_blocks
        if self.n_done == self.n_blocks or monotonic() - self.updated > _SECONDS_BETWEEN_UPDATES:
            self.updated = monotonic()
            update_progress_artifact(self.artifact, self._percent())

    def _percent(self) -> float:
        return 100.0 * self.n_done / max(1, self.n_blocks)


@contextmanager
def watched() -> Iterator[Watcher]:
    """Show progress in the Prefect UI and, where somebody sits at a terminal, there too."""
    with bars(shown=sys.stderr.isatty()) as terminal:
        yield ArtifactWatcher(terminal)


@task(name="ingest")
def ingest_stage(scan: str, image: str, *, shard: tuple[int, ...] | None) -> str:
    """Make the image; returns its path."""
    with watched() as watch:
        made = ingest(scan, image, shard=shard, watch=watch)
    get_run_logger().info("image %s: %s voxels", made.location, "x".join(map(str, made.spatial_shape)))
    return str(made.location)


@task(name="segment")
def segment_stage(image: str, *, model: str, name: str, cluster: str, workers: int, budget_bytes: int) -> Segmented:
    """Make the label volume on the cluster's workers."""
    log = get_run_logger()
    n_workers = workers if cluster == "local" else UNCOUNTED_WORKERS
    scheme = Scheme(device=pick_device("auto"), budget_bytes=budget_bytes, n_workers=n_workers)
    plan = plan_segment(image, model=model, name=name, scheme=scheme)
    n_missing = len(plan.grid) - len(plan.done())
    log.info("%d blocks, %d to do, in %d columns", len(plan.grid), n_missing, plan.n_units)
    runner = open_runner(cluster=cluster, n_workers=workers) if n_missing else nullcontext(run_serial)
    with runner as run, watched() as watch:
        result = segment(plan, run=run, watch=watch)
    log.info("labels %s: %d blocks run in %.1f s", result.labels.location, result.n_run, result.wall_s)
    return result


@task(name="evaluate")
def evaluate_stage(predicted: str, truth: str) -> Evaluated:
    """Compare the labels with the truth."""
    with watched() as watch:
        return evaluate(predicted, truth, watch=watch)


@task(name="report")
def report_stage(image: str, result: Segmented, *, figures: Evaluated | None) -> None:
    """Put figures and a picture of the labels into the Prefect UI."""
    shown = picture(open_image(image), open_labels(result.labels.location))
    create_markdown_artifact(
        report_markdown(result, figures=figures, png=shown), key="report", description=f"labels of {image}"
    )


def report_markdown(result: Segmented, *, figures: Evaluated | None, png: bytes) -> str:
    """Return the report of a run in Markdown, its picture embedded."""
    rows = [
        ("labels", str(result.labels.location)), ("voxels", f"{result.n_voxels:,}"),
        ("blocks", f"{result.n_blocks:,}, of which {result.n_run:,} were run now"),
        ("voxels/s", quantity(result.voxels_per_s)),
        ("seconds", f"{result.wall_s:.1f}"),
        ("worker seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.stages)),
        ("peak memory of a worker", f"{result.peak_rss_bytes / 2**20:.0f} MiB"),
    ]  # fmt: skip
    if result.certificate:
        rows.append(("certificate", Certificate(**result.certificate).line))
    if figures is not None:
        named = zip(figures.classes, figures.figures.classes, strict=True)
        rows.append(("accuracy", f"{figures.figures.accuracy:.4f}"))
        rows += [(f"Dice of {name}", f"{each.dice:.4f}") for name, each in named]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    data = base64.b64encode(png).decode()
    return f"# Segmentation\n\n| | |\n|---|---|\n{table}\n\n![labels over image](data:image/png;base64,{data})\n"


@flow(name="segment", flow_run_name="segment {scan} as {name}")
def segment_scan(
    scan: str, image: str, model: str, name: str = "classes", truth: str | None = None, cluster: str = "local",
    workers: int = 2, budget_bytes: int = DEFAULT_BUDGET_BYTES, shard: tuple[int, ...] | None = None,
) -> tuple[Segmented, Evaluated | None]:
    """Ingest a scan, segment it, evaluate it where there is a truth, and report. Done work is not done again.

    Parameters
    ----------
    scan : path or URL of the scan
    image : path or URL of the OME-Zarr image to make
    model : path of the model file
    name : the label volume, ``image/labels/name``
    truth : labels or a scan of integers to compare with
    cluster : "local", or the address of a Dask scheduler
    workers : local worker processes
    budget_bytes : memory of one worker
    shard : voxels of the image that are written whole, and so of a block; by default by the scan's size
    """
    path = ingest_stage(scan, image, shard=shard)
    result = segment_stage(path, model=model, name=name, cluster=cluster, workers=workers, budget_bytes=budget_bytes)
    figures = evaluate_stage(str(result.labels.location), truth) if truth else None
    report_stage(path, result, figures=figures)
    return result, figures
