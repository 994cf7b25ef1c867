"""What each command calls, and the document that it prints.

Verbs are named, and imported when their command runs, so that ``haloseg info`` does not wait for torch (2 s) and the
demo's flow can lie in ``flows``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

from pipeline.compute.runner import RunBlocks, run_serial
from pipeline.config import UNCOUNTED_WORKERS, WORTH_A_WORKER, EngineName, Precision, Scheme, Tta
from pipeline.console import STDERR, Bars, bars
from pipeline.errors import ArgumentError
from pipeline.interrupts import late

Document = dict[str, Any]


def demo(args: Namespace) -> Document:
    """Run the demo's flow."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")  # the UI keeps all of it
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # 20 are too few of a busy machine
    document: Document = late("flows.demo:demo")(args.folder)
    return document


def ingest(args: Namespace) -> Document:
    """Make an image, or labels of one."""
    if args.labels_of:
        if args.image or not args.name or args.voxel_size_um or args.chunk or args.shard or args.overwrite:
            raise ArgumentError("labels take: haloseg ingest --labels-of IMAGE --name NAME SCAN, got other arguments")
        ingest_labels = late("pipeline.ingest:ingest_labels")
        with bars(shown=True) as watch, _copying(args) as run, _held(args.labels_of):
            labels = ingest_labels(args.scan, image=args.labels_of, name=args.name, run=run, watch=watch)
        return _described(str(labels.location))
    if not args.image or args.name:
        raise ArgumentError("an image takes: haloseg ingest SCAN IMAGE, got another number of paths or --name")
    ingest_image = late("pipeline.ingest:ingest")
    with bars(shown=True) as watch, _copying(args) as run, _held(args.image):
        image = ingest_image(
            args.scan, args.image, voxel_size_um=args.voxel_size_um, chunk=args.chunk, shard=args.shard,
            overwrite=args.overwrite, run=run, watch=watch,
        )  # fmt: skip
    return _described(str(image.location))


def info(args: Namespace) -> Document:
    """Tell what lies at a path."""
    return _described(args.path)


def train(args: Namespace) -> Document:
    """Train a model."""
    document: Document = late("pipeline.train:command")(args, console=STDERR)
    return document


def ensemble(args: Namespace) -> Document:
    """Make one model of several."""
    document: Document = late("pipeline.ensemble:command")(args)
    return document


def import_(args: Namespace) -> Document:
    """Make a model of a network from elsewhere."""
    document: Document = late("pipeline.importing:command")(args)
    return document


def export(args: Namespace) -> Document:
    """Write a model for other programs."""
    document: Document = late("pipeline.export:command")(args)
    return document


def inspect(args: Namespace) -> Document:
    """Tell what a model is."""
    document: Document = late("pipeline.inspect:inspect")(_model(args.model))
    return document


def plan(args: Namespace) -> Document:
    """Tell what segment would do."""
    what = _plan(args, args.image, name="plan", scheme=_scheme_of(args))
    seconds = late("pipeline.forecast:forecast_s")(what) if args.calibrate else None
    if args.calibrate and seconds is None:
        STDERR.print("no time is told: slabs of columns are timed, and this run goes by tiles", soft_wrap=True)
    speed = {"seconds": seconds, "voxels_per_s": prod(what.grid.shape) / seconds} if seconds else {}
    gpus = {"gpus": list(_gpus(what.n_workers))} if what.device == "cuda" else {}
    return _planned(what) | gpus | speed


def segment(args: Namespace) -> Document:
    """Segment an image or a scan."""
    scheme = _scheme_of(args)
    with bars(shown=True) as watch, _held(late("pipeline.segment:image_of")(args.image)):
        with _here(args.workers) as run:
            image = late("pipeline.segment:as_image")(
                args.image, model=_model(args.model), name=args.name, scheme=scheme, run=run, watch=watch
            )
        what = _plan(args, image, name=args.name, scheme=scheme)
        if args.instances:
            late("pipeline.stitch:check_ahead")(what.result, name=args.instances)
        with _runner(args, what, scheme) as run:
            result = late("pipeline.segment:segment")(what, run=run, watch=watch)
        stitched = _stitched(args, image, watch) if args.instances else {}
    return {**_made(result.result), **result.to_json(), **stitched}


def _stitched(args: Namespace, image: str, watch: Bars) -> Document:
    """Make instances of the labels that were segmented just now."""
    with _copying(args) as run:
        made = late("pipeline.stitch:stitch")(
            image, labels=args.name, name=args.instances, run=run, watch=watch
        )
    return {"instances": made.n_instances, "instance_labels": str(made.labels.location)}


def _made(result: Any) -> Document:  # noqa: ANN401 named in a module that is imported late
    """Return where the volume of a run lies, and what it is."""
    about = {"shape": list(result.spatial_shape)}
    if _has_classes(result):
        return {"labels": str(result.location), **about, "classes": list(result.classes)}
    return {"prediction": str(result.location), **about, "channels": result.n_channels}


def _kind(result: Any) -> str:  # noqa: ANN401
    if _has_classes(result):
        return f"labels of {len(result.classes)} classes, {result.dtype}"
    return f"a prediction of {result.n_channels} channels, {result.dtype}"


def _has_classes(result: Any) -> bool:  # noqa: ANN401
    return hasattr(result, "classes")


def stitch(args: Namespace) -> Document:
    """Make instances of class labels."""
    with bars(shown=True) as watch, _copying(args) as run, _held(args.image):
        made = late("pipeline.stitch:stitch")(
            args.image, labels=args.labels, name=args.name, classes=args.classes, min_voxels=args.min_voxels, run=run,
            watch=watch,
        )
    document: Document = made.to_json()
    return document


def verify(args: Namespace) -> Document:
    """Compute sampled boxes of a result again, by the reference."""
    scheme = Scheme(budget_bytes=args.budget, **_sharing(args, _device(args)))
    what = late("pipeline.verify:plan_verify")(
        args.image, name=args.name, model=args.model and _model(args.model), scheme=scheme
    )
    work = late("pipeline.verify:verifying_multiply_adds")(what, n_boxes=args.boxes)
    n_workers = min(scheme.shared(work), args.boxes)
    with bars(shown=True) as watch, _opened(args.cluster, n_workers, device=scheme.device) as run:
        certificate = late("pipeline.verify:verified")(
            what, n_boxes=args.boxes, seed=args.seed, run=run, watch=watch
        )
    document: Document = certificate.to_json()
    return document if certificate.agrees is None else document | {"verified": certificate.agrees}


def evaluate(args: Namespace) -> Document:
    """Compare labels, or values, with the truth."""
    judged = late("pipeline.evaluate:command")
    with bars(shown=True) as watch:
        document: Document = judged(args, watch=watch)
    return document


def _held(image: str) -> AbstractContextManager[None]:
    """Hold an image's lease: no other run, of an archive, say, works on it at the same time."""
    location = late("pipeline.store.location:Location")(image).absolute()
    held: AbstractContextManager[None] = late("pipeline.store.lease:held")(location)
    return held


def _model(model: str) -> str:
    """Return the path of a model that is told by path or by name."""
    path: str = late("pipeline.store.shelf:model_path")(model)
    return path


def _described(path: str) -> Document:
    document: Document = late("pipeline.info:info")(path)
    return document


def _plan(args: Namespace, image: str, *, name: str, scheme: Scheme) -> Any:  # noqa: ANN401 of a module imported late
    return late("pipeline.plan:plan_segment")(
        image, model=_model(args.model), name=name, probabilities=args.probabilities, scheme=scheme
    )


def _scheme_of(args: Namespace) -> Scheme:
    return Scheme(
        engine=None if args.engine == "auto" else EngineName(args.engine),
        precision=Precision(args.precision), tta=Tta(args.tta), tile=args.tile, slab=args.slab, column=args.column,
        budget_bytes=args.budget, **_sharing(args, _device(args)),
    )  # fmt: skip


def _device(args: Namespace) -> str:
    """Return where the blocks are computed: by the workers of a scheduler, which may have GPUs, or here."""
    cluster = getattr(args, "cluster", "local")
    if cluster == "local":
        device = late("pipeline.unet.device:pick_device")(args.device)
    else:
        device = args.device if args.device != "auto" else late("pipeline.compute.cluster:device_at")(cluster)
    return str(device)


def _sharing(args: Namespace, device: str) -> Document:
    """Return the fields of a scheme that tell on what it runs, and among how many processes of it."""
    is_local = getattr(args, "cluster", "local") == "local"
    n_workers = args.workers or UNCOUNTED_WORKERS
    if is_local:
        usual = min(os.cpu_count() or 1, 8)
        n_workers, _ = late("pipeline.unet.device:workers_here")(device, asked=args.workers, usual=usual)
    worth = WORTH_A_WORKER[device] if is_local and not args.workers else None
    return {"device": device, "n_workers": n_workers, "worth_a_worker": worth}


def _gpus(n_workers: int) -> tuple[str, ...]:
    """Return the GPUs of so many processes here, one for each."""
    gpus: tuple[str, ...] = late("pipeline.unet.device:gpus_for")(n_workers)
    return gpus


def _planned(what: Any) -> Document:  # noqa: ANN401 named in a module that is imported late
    columns = what.columns
    return {
        "image": str(what.image.location), "shape": list(what.image.spatial_shape), "makes": _kind(what.result),
        "blocks": len(what.grid),
        "block_shape": list(what.grid.core_shape), "scheme": "tiles" if columns is None else "columns",
        **_scheme(what), "halo_shape": list(what.rule.halo), "stride_shape": list(what.rule.stride),
        "networks": what.passes.n_networks, "multiply_adds": what.multiply_adds, "halo_tax": what.halo_tax,
        "read_bytes": what.bytes_read, "written_bytes": what.bytes_written,
        "peak_bytes": what.peak_bytes, "budget_bytes": what.budget_bytes, "workers": what.n_workers,
        "device": what.device, "engine": what.engine.value, "precision": what.precision.value, "tta": what.tta.value,
        "normalisation": what.model.normalisation.value, "limits": [list(pair) for pair in what.model.limits],
    }  # fmt: skip


def _scheme(what: Any) -> Document:  # noqa: ANN401
    columns = what.columns
    if columns is None:
        why = late("pipeline.unet.families:why_not_streamed")(what.model.settings) or "asked for"
        return {"tiles": what.n_units, "tile_shape": list(what.tile_shape), "tiles_because": why}
    grid = columns.grid(what.grid)
    return {
        "columns": what.n_units, "column_shape": list(grid.core_shape), "streamed_axis": what.result.axes[columns.axis],
        "slab": columns.slab, "part_shape": list(columns.part_shape),
    }  # fmt: skip


def _runner(args: Namespace, what: Any, scheme: Scheme) -> AbstractContextManager[RunBlocks]:  # noqa: ANN401 late module
    """Return what runs the blocks that are missing: this process where one is enough, else Dask workers."""
    n_missing = len(what.grid) - len(what.done())
    if not n_missing:
        return nullcontext(run_serial)
    left = what.multiply_adds * n_missing // len(what.grid)
    n_workers = min(what.n_workers, scheme.shared(left), n_missing)
    if args.cluster == "local" and n_workers == 1 and not args.workers:
        return _here()
    return _opened(args.cluster, n_workers, device=what.device)


def _copying(args: Namespace) -> AbstractContextManager[RunBlocks]:
    """Return what runs blocks without a device: as many processes here as it is worth, unless told otherwise."""
    return _opened(args.cluster, args.workers) if args.workers or args.cluster != "local" else _here()


def _here(n_most: int | None = None) -> AbstractContextManager[RunBlocks]:
    """Return what copies in processes of this machine: as many as it is worth, at most so many."""
    most = {"n_most": n_most} if n_most else {}
    runner: AbstractContextManager[RunBlocks] = late("pipeline.compute.hosts:here")(**most)
    return runner


def _opened(cluster: str, n_workers: int | None, *, device: str = "cpu") -> AbstractContextManager[RunBlocks]:
    """Return what runs blocks in so many processes; a GPU serves one."""
    n_workers = n_workers or 1  # of a cluster that has its own
    if cluster == "local" and n_workers == 1:
        return nullcontext(run_serial)
    gpus = _gpus(n_workers) if cluster == "local" and device == "cuda" else ()
    if gpus:
        STDERR.print(f"{n_workers} workers, each with a GPU: {', '.join(gpus)}")
    runner: AbstractContextManager[RunBlocks] = late("pipeline.compute.cluster:open_runner")(
        cluster=cluster, n_workers=n_workers, gpus=gpus
    )
    return runner
