"""The pages that flows leave in the Prefect UI, in Markdown: plan, report, why a scan failed, the archive's table."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence

from pipeline.certificate import certificate_of
from pipeline.compare import Compared
from pipeline.console import n_bytes, quantity
from pipeline.evaluate import Evaluated
from pipeline.plan import Plan
from pipeline.segment import Segmented
from pipeline.store.labels import Labels
from pipeline.store.results import Result


def plan_markdown(plan: Plan, *, n_missing: int, n_workers: int) -> str:
    """Return what a run is going to do, before it does it."""
    shape = " x ".join(f"{n:,}" for n in plan.grid.shape)
    columns = plan.columns
    how = "overlapping tiles of " + "x".join(map(str, plan.tile_shape)) if columns is None else (
        f"columns along {plan.result.axes[columns.axis]}, slabs of {columns.slab} rows"
    )  # fmt: skip
    return "# Plan\n\n" + _table(("", ""), [
        ("image", f"`{plan.image.location}`, {shape} voxels, {plan.image.dtype}"),
        ("model", f"`{plan.model_path}`"),
        (kind_of(plan.result), f"`{plan.result.location}`"),
        ("blocks", f"{len(plan.grid):,}, of which {n_missing:,} are to be done"),
        ("work", f"{plan.n_units:,} {how}"),
        ("workers", str(n_workers) if n_workers else "those of the cluster"),
        ("engine", f"{plan.engine}, {plan.precision}, on {plan.device}"),
        ("multiply-adds", f"{quantity(plan.multiply_adds)}, {plan.halo_tax:.2f} of a pass without halo"),
        ("memory of a worker", f"{n_bytes(plan.peak_bytes)} of {n_bytes(plan.budget_bytes)}"),
        ("read, written", f"{n_bytes(plan.bytes_read)}, {n_bytes(plan.bytes_written)}"),
    ])  # fmt: skip


def kind_of(result: Result) -> str:
    """Return what a volume is called on the pages."""
    return "labels" if isinstance(result, Labels) else "prediction"


def report_markdown(result: Segmented, *, figures: Evaluated | Compared | None, cause: str, png: bytes) -> str:
    """Return what a run has done, with a picture of the result; ``cause`` says why a truth was not compared."""
    rows = [
        (kind_of(result.result), f"`{result.result.location}`"), ("voxels", f"{result.n_voxels:,}"),
        ("blocks", f"{result.n_blocks:,}, of which {result.n_run:,} were run now"),
        ("voxels/s", quantity(result.voxels_per_s)), ("seconds", f"{result.wall_s:.1f}"),
        ("seconds of all workers", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.stages)),
        ("device idle", f"{result.idle_share:.1%}"),
        ("read amplification", f"{result.read_amplification:.2f}"),
        ("peak memory of a worker", n_bytes(result.peak_rss_bytes)),
    ]  # fmt: skip
    if result.certificate:
        rows.append(("certificate", certificate_of(result.certificate).line))
    if cause:
        rows.append(("not evaluated", plain(cause)))
    rows += _figures(figures)
    data, title = base64.b64encode(png).decode(), "Segmentation" if kind_of(result.result) == "labels" else "Prediction"
    return f"# {title}\n\n{_table(('', ''), rows)}\n![image and result](data:image/png;base64,{data})\n"


def _figures(figures: Evaluated | Compared | None) -> list[tuple[str, str]]:
    """Return how good a result is, where there was a truth."""
    if figures is None:
        return []
    if isinstance(figures, Compared):
        psnr = figures.figures.psnr_db
        return [
            ("MAE", f"{figures.figures.mae:.4g}"), ("RMSE", f"{figures.figures.rmse:.4g}"),
            ("PSNR", "-" if psnr is None else f"{psnr:.2f} dB"),
        ]  # fmt: skip
    named = zip(figures.classes, figures.figures.classes, strict=True)
    rows = [("accuracy", f"{figures.figures.accuracy:.4f}")]
    return rows + [(f"Dice of {name}", f"{each.dice:.4f}") for name, each in named]


def failure_markdown(cause: str, *, causes: dict[int, str]) -> str:
    """Return why a scan failed, and which blocks of it."""
    text = f"# Failed\n\n{plain(cause)}\n"
    if causes:
        text += "\n" + _table(("block", "cause"), [(str(index), plain(why)) for index, why in sorted(causes.items())])
    return text


def archive_markdown(rows: Iterable[Sequence[str]], *, summary: str) -> str:
    """Return the table of an archive: scan, state, labels or why there are none, voxels, time, voxels/s."""
    head = ("scan", "state", "labels or cause", "voxels", "time", "voxels/s")
    return f"# Archive\n\n{summary}\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell or ' ' for cell in line)} |\n" for line in lines)


def plain(text: str) -> str:
    """Return a text that neither breaks a table nor is taken for markup."""
    return re.sub(r"([|*_`\[\]\\])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
