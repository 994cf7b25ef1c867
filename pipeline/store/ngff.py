"""OME-Zarr metadata (NGFF 0.5, Moore 2023, doi:10.1007/s00418-023-02209-1): documents written, 0.4 and 0.5 read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import ScanError

VERSION = "0.5"
TO_UM = {
    "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6,
    "picometer": 1e-6, "inch": 25400.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Level:
    """One array of a pyramid; scale and translation along the spatial axes, in micrometres where the size is known."""

    path: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the level as a JSON object."""
        return {
            "path": self.path, "shape": list(self.shape), "scale": list(self.scale),
            "translation": list(self.translation),
        }  # fmt: skip


def pyramid_levels(shape: tuple[int, ...], voxel_size: tuple[float, ...], *, smallest: int = 256) -> tuple[Level, ...]:
    """Return the levels from full resolution down to at most ``smallest`` voxels on every axis.

    Each level halves the axes that are sampled finest, so that anisotropic volumes become isotropic on the way down;
    sizes are rounded up so that no voxel is dropped.
    """
    levels = [Level("0", shape, voxel_size, (0.0,) * len(shape))]
    while max(levels[-1].shape) > smallest:
        last = levels[-1]
        factors = halved_axes(last)
        levels.append(
            Level(
                str(len(levels)),
                tuple(-(-n // f) for n, f in zip(last.shape, factors, strict=True)),
                tuple(s * f for s, f in zip(last.scale, factors, strict=True)),
                tuple(t + (f - 1) / 2 * s for t, s, f in zip(last.translation, last.scale, factors, strict=True)),
            )
        )
    return tuple(levels)


def halved_axes(level: Level) -> tuple[int, ...]:
    """Return the factor, 1 or 2, by which each axis of a level is downsampled for the next one."""
    long = [s for n, s in zip(level.shape, level.scale, strict=True) if n > 1]
    finest = min(long, default=1.0)
    return tuple(2 if n > 1 and s < 2 * finest else 1 for n, s in zip(level.shape, level.scale, strict=True))


def multiscales(
    name: str, levels: tuple[Level, ...], *, axes: str, unit: str | None, kind: str
) -> list[dict[str, Any]]:
    """Return the ``multiscales`` document; ``axes`` is the spatial ones with "c" in front where there are channels."""
    channels = axes.startswith("c")
    space = {"type": "space"} | ({"unit": unit} if unit else {})
    described = [{"name": "c", "type": "channel"}] if channels else []
    described += [{"name": axis} | space for axis in axes.removeprefix("c")]
    front = [1.0] if channels else []
    zero = [0.0] if channels else []
    datasets = [
        {
            "path": level.path,
            "coordinateTransformations": [
                {"type": "scale", "scale": front + list(level.scale)},
                {"type": "translation", "translation": zero + list(level.translation)},
            ],
        }
        for level in levels
    ]
    return [{"name": name, "axes": described, "datasets": datasets, "type": kind}]


def find_multiscales(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first multiscales document in a group's attributes, of version 0.4 or 0.5; None without one."""
    found = attributes.get("ome", attributes).get("multiscales")
    return found[0] if found else None


def spatial_scale_um(document: dict[str, Any], axes: list[str]) -> dict[str, float]:
    """Return micrometres per voxel of level 0 along each spatial axis that has a unit, as axes should (0.4, 0.5).

    Raises
    ------
    ScanError : a unit that is no length.
    """
    described = [each if isinstance(each, dict) else {} for each in document.get("axes", axes)]
    transforms = document["datasets"][0].get("coordinateTransformations", [])
    transforms = list(transforms) + list(document.get("coordinateTransformations", []))
    size = [1.0] * len(axes)
    for transform in transforms:
        if transform.get("type") == "scale":
            size = [a * float(b) for a, b in zip(size, transform["scale"], strict=True)]
    scale = {}
    for axis, about, s in zip(axes, described, size, strict=True):
        if about.get("type") != "space" and axis not in "zyx":
            continue
        if (unit := about.get("unit")) is None:
            continue
        if unit not in TO_UM:
            raise ScanError(f"units of space must be one of {', '.join(TO_UM)}, got {unit}; mend the OME-Zarr metadata")
        scale[axis] = s * TO_UM[unit]
    return scale
