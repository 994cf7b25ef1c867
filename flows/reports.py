"""The pages that flows leave in the Prefect UI, in Markdown: plan, report, why a scan failed, the archive's table.

Cells of the UI's tables do not wrap, and what is too wide is out of sight: paths and sentences stand outside of them.
"""

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
    columns, networks, turns = plan.columns, plan.passes.n_networks, plan.passes.n_turns
    how = "overlapping tiles of " + "x".join(map(str, plan.tile_shape)) if columns is None else (
        f"columns along {plan.result.axes[columns.axis]}, slabs of {columns.slab} rows"
    )  # fmt: skip
    paths = _lines([
        ("image", f"`{plan.image.location}`"), ("model", f"`{plan.model_path}`"),
        (kind_of(plan.result), f"`{plan.result.location}`"),
    ])  # fmt: skip
    workers = f"{n_workers}, each with a GPU" if plan.device == "cuda" else str(n_workers)
    return f"# Plan\n\n{paths}\n" + _table([
        ("voxels", f"{shape}, {plan.image.dtype}"),
        ("blocks", f"{len(plan.grid):,}, of which {n_missing:,} are to be done"),
        ("work", f"{plan.n_units:,} {how}"),
        ("workers", workers if n_workers else "those of the cluster"),
        *([("networks", f"{networks}, the mean of which is taken")] if networks > 1 else []),
        ("engine", f"{plan.engine}, {plan.precision}, on {plan.device}"),
        ("test-time augmentation", plan.tta.value + (f", {turns} passes" if turns > 1 else "")),
        ("multiply-adds", quantity(plan.multiply_adds)),
        ("of these for the halo", f"{1 - 1 / plan.halo_tax:.0%}"),
        ("memory of a worker", f"{n_bytes(plan.peak_bytes)} of {n_bytes(plan.budget_bytes)}"),
        ("read, written", f"{n_bytes(plan.bytes_read)}, {n_bytes(plan.bytes_written)}"),
    ])  # fmt: skip


def kind_of(result: Result) -> str:
    """Return what a volume is called on the pages."""
    return "labels" if isinstance(result, Labels) else "prediction"


def report_markdown(result: Segmented, *, figures: Evaluated | Compared | None, cause: str, png: bytes) -> str:
    """Return what a run has done, with a picture of the result; ``cause`` says why a truth was not compared."""
    lines = [(kind_of(result.result), f"`{result.result.location}`")]
    if result.certificate:
        lines.append(("certificate", certificate_of(result.certificate).line))
    if cause:
        lines.append(("not evaluated", plain(cause)))
    lines += _retried(result.retries.told)
    rows = [
        ("voxels", f"{result.n_voxels:,}"),
        ("blocks", f"{result.n_blocks:,}, of which {result.n_run:,} were run now"),
        ("blocks retried", f"{result.retries.n_blocks:,}"),
        ("voxels/s", quantity(result.voxels_per_s)), ("seconds", f"{result.wall_s:.1f}"),
        *((f"seconds of all workers, {stage}", f"{seconds:.1f}") for stage, seconds in result.stages),
        ("device idle", f"{result.idle_share:.1%}"),
        ("read amplification", f"{result.read_amplification:.2f}"),
        ("peak memory of a worker", n_bytes(result.peak_rss_bytes)),
    ]  # fmt: skip
    rows[1:1] = _figures(figures)
    data, title = base64.b64encode(png).decode(), "Segmentation" if kind_of(result.result) == "labels" else "Prediction"
    picture = f"![image and result](data:image/png;base64,{data})"
    return f"# {title}\n\n{_lines(lines)}\n{picture}\n\n{_table(rows)}"


def _figures(figures: Evaluated | Compared | None) -> list[tuple[str, str]]:
    """Return how good a result is, where there was a truth."""
    if figures is None:
        return []
    ignored = [] if figures.n_ignored is None else [("voxels of the truth that do not count", f"{figures.n_ignored:,}")]
    if isinstance(figures, Compared):
        psnr = figures.figures.psnr_db
        return [
            *ignored,
            ("MAE", f"{figures.figures.mae:.4g}"), ("RMSE", f"{figures.figures.rmse:.4g}"),
            ("PSNR", "-" if psnr is None else f"{psnr:.2f} dB"),
        ]  # fmt: skip
    named = zip(figures.classes, figures.figures.classes, strict=True)
    rows = [*ignored, ("accuracy", f"{figures.figures.accuracy:.4f}")]
    return rows + [(f"Dice of {name}", f"{each.dice:.4f}") for name, each in named]


def failure_markdown(cause: str, *, causes: dict[int, str], retries: str) -> str:
    """Return why a scan failed, and which blocks of it; of the others, which had to be run again."""
    lines = [(f"block {index}", plain(why)) for index, why in sorted(causes.items())] + _retried(retries)
    return f"# Failed\n\n{plain(cause)}\n" + (f"\n{_lines(lines)}" if lines else "")


def _retried(told: str) -> list[tuple[str, str]]:
    return [("blocks retried", plain(told))] if told else []


def archive_markdown(rows: Sequence[Sequence[str]], *, causes: Sequence[tuple[str, str]], summary: str) -> str:
    """Return the table of an archive: scan, state, voxels, time, voxels/s, labels; and why others have none."""
    head = ("scan", "state", "voxels", "time", "voxels/s", "labels")
    why = f"\n## Causes\n\n{_lines((plain(scan), plain(cause)) for scan, cause in causes)}" if causes else ""
    return f"# Archive\n\n{summary}\n\n{_table([head, *rows])}{why}"


def _lines(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names, each with what is said about it; long lines of it wrap."""
    return "".join(f"- **{name}**: {text}\n" for name, text in pairs)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, whose first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cell or ' ' for cell in line)} |\n" for line in lines)


def plain(text: str) -> str:
    """Return a text that neither breaks a table nor is taken for markup."""
    return re.sub(r"([|*_`\[\]\\])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
