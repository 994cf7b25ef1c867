"""Forecast: how long a plan will take, from a few slabs that are timed."""

from __future__ import annotations

from pipeline.plan import Plan, streaming_of
from pipeline.unet.calibrate import rows_per_s
from pipeline.unet.model import unets_of
from pipeline.unet.turns import engines_of


def forecast_s(plan: Plan, *, seconds: float = 3.0) -> float | None:
    """Return how long the whole run would take on this machine, by timing a few slabs of noise; None for tiles."""
    if plan.columns is None:
        return None
    columns, slices = plan.columns, len(plan.grid.shape) - plan.model.settings.dims
    engines = engines_of(
        unets_of(plan.model, "cpu"), plan.tta, device=plan.device, precision=plan.precision,
        first=columns.axis - slices,
    )  # fmt: skip
    cross = tuple(n for at, n in enumerate(columns.part_shape) if at >= slices and at != columns.axis)
    rate = rows_per_s(*engines, cross=cross, slab=columns.slab, seconds=seconds)
    streaming = streaming_of(plan.image, plan.model, plan.grid, 1, precision=plan.precision,
                             tta=plan.tta, device=plan.device)
    at_once = plan.n_workers if plan.device == "cuda" else 1  # here one process has all cores, and one GPU
    return plan.multiply_adds / (at_once * rate * streaming.multiply_adds_per_row(columns))
