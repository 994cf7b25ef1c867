"""Verify: sampled boxes of a result are computed again by the reference, and the difference is told."""

from __future__ import annotations

import logging

from pipeline.certificate import Certificate, ValueCertificate
from pipeline.compute.runner import BlockRecord, RunBlocks
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.config import EngineName, Precision, Scheme, Tta
from pipeline.errors import ArgumentError, BudgetError, ModelError, RunError
from pipeline.plan import Plan, plan_segment
from pipeline.store.location import Location
from pipeline.store.results import open_result
from pipeline.unet.cost import tile_multiply_adds
from pipeline.unet.memory import choose_tile, other_networks_bytes
from pipeline.unet.model import load_model
from pipeline.works.certify import TOLERANCE, Certified, CertifiedValues, CertifyBoxes, sample_boxes

log = logging.getLogger("haloseg")

N_BOXES = 4
LARGEST_SHARE = 0.05
_LARGEST = {2: 128, 3: 32}
# How many times as long as the run's engine the reference takes for the same arithmetic (measured on two cores with
# AMX, 2-D and 3-D: 1.0 to 1.4 times in float32, 3.8 to 4.2 in bfloat16).
_SLOWER_THAN_FLOAT32, _SLOWER_THAN_LOW = 1, 4


def verify(
    image: str, *, name: str, run: RunBlocks, model: str | None = None, n_boxes: int = 16, seed: int = 1,
    scheme: Scheme | None = None, watch: Watcher = UNWATCHED,
) -> Certificate | ValueCertificate:
    """Compute boxes of ``image/labels/name`` again; see ``plan_verify`` and ``verified``."""
    plan = plan_verify(image, name=name, model=model, scheme=scheme)
    return verified(plan, run=run, n_boxes=n_boxes, seed=seed, watch=watch)


def plan_verify(image: str, *, name: str, model: str | None = None, scheme: Scheme | None = None) -> Plan:
    """Return the plan that a result was made by, or one like it.

    Parameters
    ----------
    model : path of the model file, where it lies elsewhere now than when it made the labels

    Raises
    ------
    StoreError : there is no complete volume of this name, or it was made of another image.
    ModelError : it was made by another model, or by none.
    """
    result = open_result(Location(image), name)
    made = result.provenance or {}
    path = model or made.get("model_path")
    if not path:
        raise ModelError(f"labels must tell their model to be verified, got none in {result.location}; give --model")
    usual = scheme or Scheme()
    scheme = Scheme(
        engine=EngineName(made.get("engine", usual.taken)), precision=Precision(made.get("precision", usual.precision)),
        tta=Tta(made.get("tta", usual.tta)), device=usual.device, budget_bytes=usual.budget_bytes,
    )  # fmt: skip
    made_by = made.get("model_sha256")
    if model and made_by and (given := load_model(model).digest) != made_by:
        raise ModelError(
            f"a result must be verified with the model that made it, {_short(made_by)}, got {_short(given)} "
            f"in {model}; give that one"
        )
    return plan_segment(image, model=str(path), name=name, scheme=scheme)


def _short(sha256: str) -> str:
    return f"sha256 {sha256[:12]}..."


def verified(
    plan: Plan, *, run: RunBlocks, n_boxes: int, seed: int, watch: Watcher = UNWATCHED
) -> Certificate | ValueCertificate:
    """Compute boxes of a result again, with the engine that made it and the reference.

    Of a prediction, ``image/predictions/name``, the stored values themselves are compared with the reference.

    Parameters
    ----------
    n_boxes, seed : how many boxes, and which
    """
    if seed < 0:
        raise ArgumentError(f"seed must be at least 0, got {seed}; use 0")
    certificate = certify(plan, run=run, n_boxes=n_boxes, seed=seed, watch=watch)
    if certificate is None:
        raise BudgetError("verifying needs memory for the reference's smallest tile; raise --budget")
    return certificate


def certify(
    plan: Plan, *, run: RunBlocks, n_boxes: int | None = None, seed: int = 0, watch: Watcher = UNWATCHED
) -> Certificate | ValueCertificate | None:
    """Return how far the result of a plan is from the reference; None where the budget is too small for it.

    Parameters
    ----------
    n_boxes : by default a few, and smaller and fewer ones where they would take more than a small share of the run
    """
    slices = len(plan.grid.shape) - plan.model.settings.dims
    largest, n_affordable = _affordable(plan)
    try:
        window = tuple(n + 2 * s for n, s in zip(largest, plan.model.rule.stride, strict=True))
        left = plan.budget_bytes - other_networks_bytes(plan.model)
        tile = choose_tile(plan.model, budget_bytes=left, largest_core=window, tta=plan.tta)
    except BudgetError as error:
        log.warning("no certificate: for the reference %s", error)
        return None
    boxes = sample_boxes(
        plan.grid.shape, largest=(1,) * slices + largest, stride=plan.rule.stride, n=n_boxes or n_affordable, seed=seed
    )
    if len(boxes) < (n_boxes or 0):
        log.warning("%s boxes are computed again, all that the volume has, not %s", f"{len(boxes):,}", f"{n_boxes:,}")
    found, values = list[Certified](), list[CertifiedValues]()

    def on_record(record: BlockRecord) -> None:
        if isinstance(record, Certified):
            found.append(record)
        elif isinstance(record, CertifiedValues):
            values.append(record)
        watch.advance(record)

    watch.begin("certify", n_blocks=len(boxes), n_done=0)
    work = CertifyBoxes(plan.work(), boxes, tile, plan.rule)
    if failed := run(work, range(len(boxes)), on_record=on_record):
        raise RunError(
            f"every sampled box must be computed again, got {len(failed)} that failed, the first with: "
            f"{failed[0].cause}; mend the cause and run the same command again"
        )
    certificate = _of_values(plan, values) if values else _of_labels(plan, found)
    if plan.precision is Precision.FLOAT32 and not certificate.is_rounding:
        log.warning("float32 must differ from the reference by at most %.0e: %s", TOLERANCE, certificate.line)
    return certificate


def _of_labels(plan: Plan, found: list[Certified]) -> Certificate:
    """Return what all boxes of labels came to."""
    return Certificate(
        plan.engine.value, plan.precision.value, len(found), sum(each.n_voxels for each in found),
        max(each.max_difference for each in found), sum(each.n_flipped for each in found),
        sum(each.n_flipped_decided for each in found),
    )  # fmt: skip


def _of_values(plan: Plan, found: list[CertifiedValues]) -> ValueCertificate:
    """Return what all boxes of a prediction came to."""
    return ValueCertificate(
        plan.engine.value, plan.precision.value, len(found), sum(each.n_voxels for each in found),
        max(each.max_difference for each in found), max(each.max_difference_std for each in found),
        sum(each.n_beyond for each in found),
    )  # fmt: skip


def _affordable(plan: Plan) -> tuple[tuple[int, ...], int]:
    """Return the largest boxes, along the network's axes, and their number, that take a small share of the run's time.

    Told from arithmetic alone: what was measured would differ from run to run.
    """
    rule, settings = plan.model.rule, plan.model.settings
    slower = _SLOWER_THAN_FLOAT32 if plan.precision is Precision.FLOAT32 else _SLOWER_THAN_LOW
    side, spare = _LARGEST[settings.dims], LARGEST_SHARE * plan.multiply_adds
    while True:
        box = tuple(-(-side // s) * s for s in rule.stride)
        cost = (slower + 1) * _multiply_adds(plan, box)  # the reference, and at most as much by the engine
        if cost <= spare or box == rule.stride:
            return box, max(1, min(N_BOXES, int(spare // cost)))
        side //= 2


def verifying_multiply_adds(plan: Plan, *, n_boxes: int) -> int:
    """Return the multiplications of verifying so many boxes, by the reference and by the run's engine."""
    box, _ = _affordable(plan)
    return 2 * n_boxes * _multiply_adds(plan, box)


def _multiply_adds(plan: Plan, box: tuple[int, ...]) -> int:
    """Return the multiplications of the reference for a box, along the network's axes."""
    rule = plan.model.rule
    window = rule.tile_shape(tuple(n + 2 * s for n, s in zip(box, rule.stride, strict=True)))
    return plan.passes.n * tile_multiply_adds(plan.model.settings, window)
