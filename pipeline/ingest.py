"""Ingest: a scan becomes an OME-Zarr image, block by block; or the label volume of an image."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pipeline.compute.levels import build_levels
from pipeline.compute.runner import Quarantined, RunBlocks, run_serial
from pipeline.compute.watch import UNWATCHED, Watcher
from pipeline.copying import IngestBlocks, copy, groups_of, spatial_of
from pipeline.errors import ArgumentError, InputError, QuarantineError, ScanError, StoreError
from pipeline.geometry.grid import BlockGrid
from pipeline.identity import check_unchanged, file_stamps, open_identified
from pipeline.labels.whole import label_dtype
from pipeline.scans.backend import PARTIAL
from pipeline.store.arrays import Layout, plan_layout, sweep
from pipeline.store.image import Image, commit_image, create_image, open_image, read_image
from pipeline.store.labels import Labels, create_labels, label_location, publish, read_labels
from pipeline.store.location import Location, storage_errors
from pipeline.store.moments import PlaneSums, SliceStatistics
from pipeline.store.pyramid import Downsampling
from pipeline.store.results import check_same_result
from pipeline.store.statistics import ChannelStatistics, Histogram, merge
from pipeline.works.measure import MeasureBlocks, Notes

log = logging.getLogger("haloseg")

_NOTES, _NOTES_OF_BEFORE = ".measured", ".histograms"  # an older haloseg noted nothing of slices


def ingest(
    scan: str, image: str, *, voxel_size_um: tuple[float, ...] | None = None, chunk: tuple[int, ...] | None = None,
    shard: tuple[int, ...] | None = None, overwrite: bool = False, run: RunBlocks = run_serial,
    watch: Watcher = UNWATCHED,
) -> Image:
    """Make the OME-Zarr image of a scan; what an earlier, killed ingest of the same scan has done is kept.

    A volume that an older haloseg made of it keeps all that it has, and gets the statistics of its slices.

    Parameters
    ----------
    scan : path or URL of any kind that ``pipeline.scans`` reads
    image : path or URL of the image, by custom ending in .zarr
    voxel_size_um : micrometres along the scan's spatial axes; by default what the scan tells
    chunk, shard : voxels along the spatial axes; one number stands for all
    overwrite : delete the image that is at ``image`` first, with its labels; nothing else is ever deleted

    Raises
    ------
    InputError : the scan cannot be read, or ``image`` holds something else; nothing was written.
    """
    array, identified = open_identified(scan := _absolute(scan))
    target, size = Location(str(image)).absolute(), voxel_size_um or array.attrs.get("voxel_size_um")
    _check_intensities(array, scan)
    if not size and (known := array.attrs.get(PARTIAL)):
        told = ", ".join(f"{length:g} um along {axis}" for axis, length in known.items())
        log.warning("the image has no voxel size, since %s tells %s alone; --voxel-size-um gives all", scan, told)
    shape = tuple(array.sizes[d] for d in spatial_of(array))
    size = _per_axis(size, shape, "voxel size") if size else None
    layout = plan_layout(shape, chunk=_per_axis(chunk, shape, "chunk"), shard=_per_axis(shard, shape, "shard"))
    about = identified | {"layout": [list(layout.chunk), list(layout.shard)], "voxel_size_um": _listed(size)}
    if overwrite:
        _delete_image(target, scan)
    there = _same_ingest(target, about)
    if there is not None and there.lacks_slices:
        return measure(there, run=run, watch=watch)
    if there is not None and there.statistics:
        _forget(target)  # what a kill right after the commit left
        return there
    with _undone_by_bad_input(target, when=there is None), storage_errors(target):
        made = there or create_image(
            target, shape=(array.sizes.get("c", 1), *shape), dtype=_dtype(array), axes="c" + "".join(spatial_of(array)),
            layout=layout, voxel_size_um=size, scan=about,
        )
        return _fill(made, scan, array, run=run, watch=watch)


def ingest_labels(
    scan: str, *, image: str, name: str, run: RunBlocks = run_serial, watch: Watcher = UNWATCHED
) -> Labels:
    """Make the label volume ``name`` of an image from any scan of integers of the image's shape.

    Floats are taken, too, where all are whole numbers, which is seen while they are copied.

    Raises
    ------
    InputError : these are no labels of the image; nothing was written.
    """
    of = open_image(Location(str(image)).absolute())
    target = label_location(of.location, name)
    array, identified = open_identified(scan := _absolute(scan))
    shape = tuple(array.sizes[d] for d in spatial_of(array))
    if "c" in array.dims or shape != of.spatial_shape:
        got = tuple(array.sizes.values())
        how = "save one value per voxel, without channels" if "c" in array.dims else "pad or crop them"
        raise ScanError(f"labels must have the image's shape {of.spatial_shape}, got {got} in {scan}; {how}")
    labels = Labels(
        target, of.axes.removeprefix("c"), str(label_dtype(array.dtype)), of.layout, of.levels,
        identified, provenance={"made_by": "haloseg ingest"},
    )  # fmt: skip
    check_same_result(labels)
    with _undone_by_bad_input(target, when=read_labels(target) is None), storage_errors(target):
        create_labels(of, labels)
        _copy(
            scan, array, target=labels.location / "0", layout=of.layout, about=identified, notes=None, run=run,
            watch=watch,
        )  # fmt: skip
        _levels(labels, Downsampling.MODE, run=run, watch=watch)
        publish(of, labels)
    return labels


def _fill(image: Image, scan: str, array: xr.DataArray, *, run: RunBlocks, watch: Watcher) -> Image:
    """Copy what is missing, build the pyramid, gather the statistics, and commit."""
    notes = Notes(image.location / _NOTES)
    _copy(
        scan, array, target=image.location / "0", layout=image.layout, about=image.scan, notes=notes, run=run,
        watch=watch,
    )  # fmt: skip
    _levels(image, Downsampling.MEAN, run=run, watch=watch)
    return measure(image, run=run, watch=watch)


def measure(image: Image, *, run: RunBlocks = run_serial, watch: Watcher = UNWATCHED) -> Image:
    """Add up an image's statistics and commit it; what is stored without notes, by an older haloseg, is measured first.

    Statistics of the whole that the image has already stay as they are: labels are known by them.
    """
    with storage_errors(image.location):
        statistics, slices = _statistics(image, run=run, watch=watch)
        sweep(image.location)
        done = commit_image(image, statistics, slices)
        _forget(image.location)
    return done


def _forget(image: Location) -> None:
    """Delete the notes of what was measured."""
    for notes in (_NOTES, _NOTES_OF_BEFORE):
        (image / notes).delete()


def _statistics(
    image: Image, *, run: RunBlocks, watch: Watcher
) -> tuple[tuple[ChannelStatistics, ...], SliceStatistics | None]:
    """Return the statistics of the whole, and of a volume those of each slice."""
    notes, grid = Notes(image.location / _NOTES), BlockGrid(image.spatial_shape, image.layout.shard)
    noted = notes.measured()
    if missing := [index for index in range(len(grid)) if index not in noted]:
        watch.begin("measure", n_blocks=len(grid), n_done=len(noted))
        work = MeasureBlocks(image.location / "0", grid, notes)
        _complete(run(work, missing, on_record=watch.advance), work.source)
    planes = PlaneSums(n_channels=image.n_channels, n_planes=image.spatial_shape[0])

    def histograms() -> Iterator[tuple[Histogram, ...]]:
        for index in range(len(grid)):
            of_block, moments = notes.of(index, n_channels=image.n_channels)
            if moments is not None:
                planes.add(moments)
            yield of_block

    measured = merge(histograms())
    return image.statistics or measured, planes.statistics() if image.has_slices else None


def _copy(
    scan: str, array: xr.DataArray, *, target: Location, layout: Layout, about: dict[str, Any], notes: Notes | None,
    run: RunBlocks, watch: Watcher,
) -> None:
    """Copy a scan's voxels into the array of a volume, and see that it stayed the same meanwhile."""
    shards = BlockGrid(tuple(array.sizes[d] for d in spatial_of(array)), layout.shard)
    work = IngestBlocks(scan, target, groups_of(array, shards), shards, notes, file_stamps(scan, about))
    _complete(copy(work, run=run, watch=watch), target)
    check_unchanged(scan, about)


def _levels(volume: Image | Labels, how: Downsampling, *, run: RunBlocks, watch: Watcher) -> None:
    failed = build_levels(volume.location, volume.levels, layout=volume.layout, how=how, run=run, watch=watch)
    _complete(failed, volume.location)


def _complete(failed: tuple[Quarantined, ...], location: Location) -> None:
    if failed:
        raise QuarantineError(
            f"every block must succeed, got {len(failed)} that failed in {location}, block {failed[0].index} with: "
            f"{failed[0].cause}; mend the cause and run the same command again",
            {each.index: each.cause for each in failed},
        )


def _delete_image(target: Location, scan: str) -> None:
    """Delete an image of ours; a folder of anything else, or one that holds the scan itself, is refused."""
    if read_image(target) is None and next(target.files(), None) is not None:
        raise StoreError(f"--overwrite deletes images made by haloseg alone, got {target}; delete it yourself")
    if _holds(target, scan):
        raise StoreError(f"--overwrite must not delete the scan itself, got {scan} in {target}; choose another image")
    with storage_errors(target):
        target.delete()


def _holds(target: Location, scan: str) -> bool:
    """Whether the scan lies at or below ``target``."""
    path = scan.partition("::")[0]
    if not target.is_local or "://" in path:
        return f"{path.rstrip('/')}/".startswith(f"{target.url.rstrip('/')}/")
    return Path(path).resolve().is_relative_to(Path(target.url).resolve())


def _same_ingest(target: Location, about: dict[str, Any]) -> Image | None:
    """Return the image at ``target`` if it is of the same scan and settings; refuse anything else that lies there."""
    there = read_image(target)
    if there is None and next(target.files(), None) is not None:
        raise StoreError(f"image must be a new folder, got {target}, which holds other files; choose another")
    if there is None:
        return None
    for key, now in about.items():
        was = there.scan.get(key)
        if was != now:
            raise StoreError(
                f"image {target} must be of this scan, got another {key} ({now}, was {was}); "
                "choose another image, or make it anew, without its labels: haloseg ingest SCAN IMAGE --overwrite"
            )
    return there


class _undone_by_bad_input:  # noqa: N801 reads as a statement
    """Leave nothing behind when the scan turns out to be bad on the way, if there was nothing before."""

    def __init__(self, target: Location, *, when: bool) -> None:
        self.target, self.when = target, when

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.when and kind is not None and issubclass(kind, InputError):
            self.target.delete()


def _check_intensities(array: xr.DataArray, scan: str) -> None:
    if array.dtype.kind not in "iufb":
        raise ScanError(f"intensities must be real numbers, got {array.dtype} in {scan}; convert them first")
    if 0 in array.shape or not 2 <= len(spatial_of(array)) <= 3:
        raise ScanError(f"a scan must have 2 or 3 spatial axes with voxels, got {dict(array.sizes)} in {scan}")


def _dtype(array: xr.DataArray) -> np.dtype[Any]:
    return np.dtype(np.uint8) if array.dtype.kind == "b" else np.dtype(array.dtype)


def _per_axis(sizes: tuple[Any, ...] | None, shape: tuple[int, ...], what: str) -> tuple[Any, ...] | None:
    """Return one number per spatial axis; one given number stands for all."""
    if sizes is None:
        return None
    every = sizes * len(shape) if len(sizes) == 1 else tuple(sizes)
    if len(every) != len(shape) or min(every) <= 0:
        raise ArgumentError(f"{what} needs {len(shape)} numbers above 0, or one for all, got {sizes}; give so many")
    return every


def _absolute(scan: str) -> str:
    """Return the scan's path for the workers of a cluster, which run in folders of their own."""
    return str(Location(str(scan)).absolute())


def _listed(size: tuple[float, ...] | None) -> list[float] | None:
    return [float(s) for s in size] if size else None
