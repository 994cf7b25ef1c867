"""The image: a scan's intensities as OME-Zarr 0.5, with a pyramid and statistics, which make it complete."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr

from pipeline.errors import StoreError
from pipeline.store.arrays import Layout, create_group, open_array, read_attributes
from pipeline.store.location import Location
from pipeline.store.moments import SliceStatistics
from pipeline.store.ngff import VERSION, Level, multiscales, pyramid_levels
from pipeline.store.pyramid import create_levels
from pipeline.store.scaling import Scaling, SliceWindows, Windows
from pipeline.store.slices import read_slices, write_slices
from pipeline.store.statistics import ChannelStatistics

FORMAT = 1
_SLICES = "slices"
_COLOURS = ("FFFFFF", "00FF00", "FF00FF", "00FFFF", "FFFF00", "FF8000", "8000FF")


@dataclass(frozen=True, slots=True)
class Image:
    """An OME-Zarr image; arrays have the shape (n_channels, *spatial).

    Attributes
    ----------
    axes : "cyx" or "czyx"
    voxel_size_um : along the spatial axes; None where the scan told none and none was given
    statistics : one per channel; empty while the image is being ingested
    scan : what the image was made from, enough to know it again
    slices_sha256 : of the statistics of each slice of a volume; empty where none were measured
    """

    location: Location
    axes: str
    dtype: str
    n_channels: int
    layout: Layout
    levels: tuple[Level, ...]
    voxel_size_um: tuple[float, ...] | None
    scan: dict[str, Any]
    statistics: tuple[ChannelStatistics, ...] = ()
    slices_sha256: str = ""

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels along the spatial axes at full resolution."""
        return self.levels[0].shape

    @property
    def array(self) -> zarr.Array[Any]:
        """The voxels at full resolution, shape (n_channels, *spatial)."""
        return open_array(self.location / "0")

    def level(self, index: int) -> zarr.Array[Any]:
        """Return the voxels at a level of the pyramid."""
        return open_array(self.location / self.levels[index].path)

    @property
    def has_slices(self) -> bool:
        """Whether the image is a volume, of several slices or of one."""
        return len(self.spatial_shape) == 3

    @property
    def lacks_slices(self) -> bool:
        """Whether this is a complete volume, made by an older haloseg, which measured no slices."""
        return bool(self.statistics) and self.has_slices and not self.slices_sha256

    @property
    def slices(self) -> SliceStatistics:
        """The statistics of each slice.

        Raises
        ------
        StoreError : none were measured.
        """
        if not self.slices_sha256:
            raise StoreError(
                f"normalisation by slice needs statistics of each slice, got an image without them at {self.location}, "
                "from an older haloseg; run the same haloseg ingest again, which adds them and keeps all else"
            )
        return read_slices(self.location / _SLICES, sha256=self.slices_sha256)

    def windows(self, scaling: Scaling) -> Windows:
        """Return what a network sees of each channel, of a volume perhaps in each slice another."""
        if scaling.is_slicewise and self.has_slices:
            return SliceWindows.of(self.slices)
        return scaling.windows(self.statistics, dtype=self.dtype)


def create_image(
    location: Location, *, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str, layout: Layout,
    voxel_size_um: tuple[float, ...] | None, scan: dict[str, Any],
) -> Image:
    """Make the arrays of an image of shape (n_channels, *spatial), or return the unfinished one of the same scan."""
    spatial = shape[1:]
    levels = pyramid_levels(spatial, voxel_size_um or (1.0,) * len(spatial))
    image = Image(location, axes, str(dtype), shape[0], layout, levels, voxel_size_um, scan)
    create_group(location, {"haloseg": _to_json(image)})
    create_levels(location, levels, front=shape[:1], dtype=dtype, layout=layout, axes=axes)
    return image


def commit_image(
    image: Image, statistics: tuple[ChannelStatistics, ...], slices: SliceStatistics | None = None
) -> Image:
    """Declare the image complete: from now on it can be opened, by haloseg and by any OME-Zarr reader."""
    if slices is not None:
        write_slices(image.location / _SLICES, slices)
    done = replace(image, statistics=statistics, slices_sha256=slices.sha256 if slices is not None else "")
    unit = "micrometer" if image.voxel_size_um else None
    ome = {
        "version": VERSION,
        "multiscales": multiscales(image.location.name, image.levels, axes=image.axes, unit=unit, kind="mean"),
        "omero": {"channels": _channels(statistics)},
    }
    create_group(image.location, {"ome": ome, "haloseg": _to_json(done)})
    return done


def read_image(location: Location) -> Image | None:
    """Return the image here, complete or not; None where no haloseg image is."""
    about = read_attributes(location).get("haloseg", {})
    if about.get("kind") != "image":
        return None
    if about["format"] > FORMAT:
        raise StoreError(f"image format must be at most {FORMAT}, got {about['format']} in {location}; update haloseg")
    return Image(
        location, about["axes"], about["dtype"], about["n_channels"],
        Layout(tuple(about["chunk"]), tuple(about["shard"])), levels_from_json(about["levels"]),
        tuple(about["voxel_size_um"]) if about["voxel_size_um"] else None, about["scan"],
        tuple(map(ChannelStatistics.from_json, about["statistics"])), about.get("slices_sha256", ""),
    )  # fmt: skip


def open_image(path: str | Location) -> Image:
    """Return the complete image at a path or URL.

    Raises
    ------
    StoreError : there is no image, or its ingest did not finish.
    """
    location = path if isinstance(path, Location) else Location(str(path))
    image = read_image(location)
    if image is None:
        raise StoreError(f"image must be made by haloseg, got {location}; run: haloseg ingest SCAN IMAGE")
    if not image.statistics:
        raise StoreError(f"image must be complete, got an unfinished ingest at {location}; run the same ingest again")
    return image


def levels_from_json(document: list[dict[str, Any]]) -> tuple[Level, ...]:
    """Return the levels that ``Level.to_json`` wrote."""
    return tuple(
        Level(each["path"], tuple(each["shape"]), tuple(each["scale"]), tuple(each["translation"])) for each in document
    )


def _to_json(image: Image) -> dict[str, Any]:
    return {
        "format": FORMAT, "kind": "image", "axes": image.axes, "dtype": image.dtype, "n_channels": image.n_channels,
        "chunk": list(image.layout.chunk), "shard": list(image.layout.shard),
        "voxel_size_um": list(image.voxel_size_um) if image.voxel_size_um else None, "scan": image.scan,
        "levels": [level.to_json() for level in image.levels],
        "statistics": [each.to_json() for each in image.statistics], "slices_sha256": image.slices_sha256,
    }  # fmt: skip


def _channels(statistics: tuple[ChannelStatistics, ...]) -> list[dict[str, Any]]:
    """Return how viewers show the channels at first: red, green, blue where there are three, else white and so on."""
    colours = ("FF0000", "00FF00", "0000FF") if len(statistics) == 3 else _COLOURS
    shown = []
    for index, each in enumerate(statistics):
        at = dict(each.percentiles)
        window = {"min": each.minimum, "max": each.maximum, "start": at[0.1], "end": at[99.9]}
        shown.append(
            {"label": str(index), "color": colours[index % len(colours)], "active": index < 7, "window": window}
        )
    return shown
