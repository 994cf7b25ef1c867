"""TIFF, BigTIFF, OME-TIFF, ImageJ stacks and slides (SVS and its like): full resolution, decoded segment by segment.

tifffile reads the structure, imagecodecs decodes. Damage is looked for at the start: pages or segments that lie past
the end of the file, and a first segment that cannot be decoded, are refused before a run begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tifffile import TiffFile, TiffFileError

from pipeline.errors import ScanError
from pipeline.scans.axes import arrange
from pipeline.scans.files import about, opened
from pipeline.scans.lazy import LazyScan, VoxelSource, damaged
from pipeline.scans.mapped import MappedSource
from pipeline.scans.tiff_inflate import inflate_for
from pipeline.scans.tiff_metadata import complaints, voxel_size_um
from pipeline.scans.tiff_rows import short_strips
from pipeline.scans.tiff_segments import Page, SegmentSource

_JPEG = {6, 7, 33007, 34892}
_PAGE_AXES = {"Z": 1, "Y": 2, "X": 3}
_BESIDE = re.compile(r"label|macro|thumb|overview", re.IGNORECASE)
# Complaints that mean lost data: pages or baseline tags past the end of the file, metadata for more than is there.
_LOST = re.compile(
    r"page offset|offset to page|tag list|circular|series .*(raised|corrupted|description)|TiffTag (2|3)\d\d |"
    r"offset tag|ByteCounts"
)
_NAMES = (("is_ome", "OME-TIFF"), ("is_svs", "SVS"), ("is_imagej", "ImageJ TIFF"), ("is_bigtiff", "BigTIFF"))


def open_tiff(path: str, /) -> LazyScan:
    """Return the scan in a TIFF file: the first image of it, at full resolution.

    Raises
    ------
    ScanError : no TIFF, cut off, of a compression that cannot be decoded, or with several images of which none is
        evidently the scan (a slide's label, macro and thumbnail are not).
    """
    source, axes, name, size = _parsed(path)
    return arrange(source, axes=axes, path=path, format_name=name, voxel_size_um=size)


def reopened(path: str, /) -> VoxelSource:
    """Return the voxels of a TIFF along the file's own axes."""
    return _parsed(path)[0]


def _parsed(path: str) -> tuple[VoxelSource, str, str, Mapping[str, float]]:
    """Return voxels, letters of their axes, name of the format and voxel size."""
    # Files that a multi-file OME-TIFF points to are left alone: a scan is one file.
    with complaints() as told:
        try:
            with opened(path) as file, TiffFile(file, name=_name(path), _multifile=False) as tiff:
                image = _image(tiff, path=path)
                source = _source(tiff, image, path=path)
                name = next((n for flag, n in _NAMES if getattr(tiff, flag)), "TIFF")
                size = voxel_size_um(tiff)
        except TiffFileError as error:
            raise damaged(path, cause=str(error)) from error
        lost = next((c for c in told if _LOST.search(c)), None)
        if lost is not None:
            raise damaged(path, cause=lost)
        if isinstance(source, SegmentSource):
            source.check_first()
    return source, _axes(image)[0], name, size


def _name(path: str) -> str:
    """Return a file's name for tifffile, which tells some formats by its ending."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _image(tiff: TiffFile, *, path: str) -> Any:  # noqa: ANN401 tifffile is not typed
    """Return the first series; refuse a file with others that may be meant as well."""
    if not tiff.series:
        raise damaged(path, cause="it holds no image")
    vendor = tiff.series[0].kind not in {"generic", "uniform", "shaped", "ome", "imagej", "geotiff"}
    others = [s for s in tiff.series[1:] if not (vendor or _BESIDE.search(s.name) or s.keyframe.is_reduced)]
    if others:
        shapes = ", ".join(str(s.shape) for s in tiff.series)
        raise ScanError(f"a TIFF must hold one image, got {len(tiff.series)} of shapes {shapes} in {path}; split it")
    # From tifffile 2026.5.2 on, the series are told to keep axes of one voxel; before it, each tells them by _axes.
    return (tiff.series(squeeze=False) if callable(tiff.series) else tiff.series)[0]


def _axes(image: Any, /) -> tuple[str, tuple[int, ...]]:  # noqa: ANN401
    """Return a series' axes and shape, with those of one voxel, in tifffile before 2026.5.2 and since."""
    if hasattr(image, "get_axes"):
        return image.get_axes(squeeze=False), tuple(image.get_shape(squeeze=False))
    return image.axes, tuple(image.shape)


def _source(tiff: TiffFile, image: Any, *, path: str) -> VoxelSource:  # noqa: ANN401
    """Return the voxels of a series: mapped where they lie in one piece, decoded otherwise."""
    if any(page is None for page in image.pages):
        missing = sum(page is None for page in image.pages)
        raise ScanError(
            f"all pages of a TIFF must lie in one file, got {path} that lacks {missing} of {len(image.pages)}; "
            "save it as one file"
        )
    if image.dtype is None:
        raise damaged(path, cause="its sample format is unknown")
    _, shape = _axes(image)
    if image.dataoffset is not None:
        return MappedSource(path, image.dtype.newbyteorder(tiff.byteorder), shape, image.dataoffset)
    key = image.keyframe
    size, version = about(path)
    pages = tuple(_page(page, size=size, path=path) for page in image.pages)
    rows = short_strips(key, dtype=image.dtype.newbyteorder(tiff.byteorder))
    if rows is not None and all(rows.fit(page.counts) for page in pages):
        pages = tuple(Page(*rows.places(page.offsets), rows, {}) for page in pages)
    else:
        rows = None
    return SegmentSource(
        path=path, dtype=image.dtype.newbyteorder("="), shape=shape, places=_places(image, path=path),
        page_shape=key.shaped, segment_shape=rows.segment_shape if rows else _segment_shape(key), pages=pages,
        nodata=key.nodata, stamp=(size, version), reopen=reopened,
        inflate=inflate_for(key, path=path, dtype=image.dtype.newbyteorder(tiff.byteorder)),
    )


def _places(image: Any, *, path: str) -> tuple[int | None, ...]:  # noqa: ANN401
    """Return for each axis of the series the page's axis it is, or None if it counts pages."""
    key = image.keyframe
    own = {letter: place for letter, place in _PAGE_AXES.items() if letter in key.axes}
    own["S"] = 0 if key.axes.find("S") in range(key.axes.find("Y")) else 4
    axes, shape = _axes(image)
    places = tuple(own.get(letter) for letter in axes)
    within = [p for p in places if p is not None]
    n_pages = 1
    for size, place in zip(shape, places, strict=True):
        n_pages *= size if place is None else 1
    fits = all(n == key.shaped[p] for n, p in zip(shape, places, strict=True) if p is not None)
    # Pages are counted by the axes in front, so that the file's order is the array's.
    front = [p is None or n == 1 for n, p in zip(shape, places, strict=True)][: len(places) - len(within)]
    if not fits or within != sorted(within) or not all(front) or n_pages != len(image.pages):
        raise ScanError(
            f"pages of a TIFF must fill the axes it names, got {len(image.pages)} of shape {key.shape} for "
            f"{axes} {shape} in {path}; save it again"
        )
    return places


def _segment_shape(key: Any) -> tuple[int, ...]:  # noqa: ANN401
    _, _, length, width, samples = key.shaped
    if key.is_tiled:
        return 1, key.tiledepth, key.tilelength, key.tilewidth, samples
    return 1, 1, min(key.rowsperstrip, length), width, samples


def _page(page: Any, *, size: int, path: str) -> Page:  # noqa: ANN401
    """Return where a page's segments lie; all must lie inside the file."""
    key = page.keyframe
    options: dict[str, Any] = {}
    if key.compression in _JPEG:
        options = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
    offsets, counts = tuple(page.dataoffsets), tuple(page.databytecounts)
    _check_segments(offsets, counts, n_expected=_product(key.chunked), page=page.index, size=size, path=path)
    return Page(offsets, counts, key.decode, options)


def _check_segments(
    offsets: Sequence[int], counts: Sequence[int], *, n_expected: int, page: int, size: int, path: str
) -> None:
    if not len(offsets) == len(counts) >= n_expected:
        raise damaged(
            path, cause=f"page {page} has {len(offsets)} offsets and {len(counts)} sizes for {n_expected} segments"
        )
    for number, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if count and (offset <= 0 or offset + count > size):
            raise damaged(
                path,
                cause=f"segment {number} of page {page} ends at byte {offset + count}, the file at byte {size}",
            )


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for n in numbers:
        result *= int(n)
    return result
