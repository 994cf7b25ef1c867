"""Our own rows: the same image and model through ``plan`` and ``segment``, in one process, from Zarr to labels."""

import shutil
from functools import partial
from pathlib import Path

import torch
from peers import Scheme, in_memory

from pipeline import config
from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Precision
from pipeline.geometry.mirror import mirror_index
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.unet.engines import keep_freed_memory, make_engine
from pipeline.unet.model import load_model
from pipeline.unet.numbers import widened

_TILE_CORE = {2: 512, 3: 64}


def ours(job, *, tiled=False, probabilities=False, **settings):
    """Everything that a user's run does: labels, pyramid, certificate."""
    labels, results = Path(job.image) / "labels" / "bench", Path(job.image) / "probabilities"
    shutil.rmtree(labels, ignore_errors=True)
    (labels.parent / "zarr.json").unlink(missing_ok=True)
    shutil.rmtree(results, ignore_errors=True)
    plan = partial(plan_segment, job.image, model=job.model, name="bench", probabilities=probabilities)
    if tiled:
        core = (_TILE_CORE[job.dims],) * job.dims
        settings["tile"] = plan().model.rule.tile_shape(core)

    def run():
        scheme = config.Scheme(budget_bytes=2**32, device=job.device, **settings)
        done = segment(plan(scheme=scheme), run=run_serial)
        Path(job.classes).symlink_to((labels / "0").absolute(), target_is_directory=True)
        return {"idle_share": round(done.idle_share, 4)}

    return run


def one_pass(job, *, precision, mirrored=False):
    """One pass of our engine over the scan in memory.

    With zeros beyond its border it is a limit, and not the promised result, which the pass over the mirrored scan is.
    """
    keep_freed_memory()
    engines, rule = {}, load_model(job.model).rule

    def infer(network, x):
        shape = x.shape[2:]
        for axis, (halo, stride, n) in enumerate(zip(rule.halo, rule.stride, shape, strict=True), start=2):
            if mirrored:
                seen = mirror_index(-halo, n + -n % stride + halo, n)
                x = x.index_select(axis, torch.from_numpy(seen).to(x.device))
        engine = engines.setdefault("one", make_engine(network, device=job.device, precision=precision))
        logits = widened(engine(x.to(engine.dtype).contiguous(memory_format=engine.memory_format)))
        for axis, (trim, n) in enumerate(zip(rule.trim, shape, strict=True), start=2):
            logits = logits.narrow(axis, trim * mirrored, n)
        return logits

    return in_memory(job, infer)


F32, TF32, BF16 = Precision.FLOAT32, Precision.TF32, Precision.BF16
OURS = {
    "ours, columns": Scheme(partial(ours, precision=F32), "fused"),
    "ours, columns tf32": Scheme(partial(ours, precision=TF32), "fused", "tf32", devices=("cuda",)),
    "ours, columns bf16": Scheme(partial(ours, precision=BF16), "fused", "bf16"),
    "ours, tiles": Scheme(partial(ours, tiled=True, precision=F32), "fused"),
    "ours, reference tiles": Scheme(partial(ours, tiled=True, engine=EngineName.REFERENCE), "reference"),
    "whole scan, bare, our engine": Scheme(partial(one_pass, precision=F32), "fused"),
    "whole scan, bare, our engine bf16": Scheme(partial(one_pass, precision=BF16), "fused", "bf16"),
    "whole scan, mirrored, our engine": Scheme(partial(one_pass, precision=F32, mirrored=True), "fused"),
}
