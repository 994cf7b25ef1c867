"""The voxel size that a TIFF tells, in micrometres by axis, and what tifffile complains about while it opens one.

Asked in this order, the first that answers counts: OME-XML PhysicalSize; ImageJ resolution, spacing and unit; Aperio's
MPP; the baseline resolution, per centimetre only. Resolution per inch is what cameras and drawing programs write
without knowing any (72, 96, 300 dpi), so it is never a voxel size, nor is such a print resolution put in centimetres.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from tifffile import TiffFile

UM_PER_UNIT = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "micrometre": 1.0, "nm": 1e-3, "nanometer": 1e-3, "å": 1e-4, "angstrom": 1e-4, "pm": 1e-6, "inch": 25400.0,
    "in": 25400.0,
}
_PRINT_DPI = (72, 75, 96, 100, 150, 200, 240, 300, 400, 600, 720, 1200)
_CENTIMETER = 3


def voxel_size_um(tiff: TiffFile) -> dict[str, float]:
    """Return micrometres by axis ("z", "y", "x"), as far as the file tells them."""
    if tiff.is_ome and tiff.ome_metadata:
        return _from_ome(tiff.ome_metadata)
    page = tiff.pages.first
    pitch = _pitch(page)
    unit = _um((tiff.imagej_metadata or {}).get("unit"))
    if unit is not None and pitch is not None:
        spacing = (tiff.imagej_metadata or {}).get("spacing")
        depth = {} if spacing is None else {"z": float(spacing) * unit}
        return {"y": pitch[0] * unit, "x": pitch[1] * unit} | depth
    aperio = re.match(r"Aperio[\s\S]*?MPP\s*=\s*([0-9]+(\.[0-9]+)?)", page.description)
    if aperio:
        return {"y": float(aperio[1]), "x": float(aperio[1])}
    if pitch is not None and _is_measured(page, pitch):
        return {"y": pitch[0] * 1e4, "x": pitch[1] * 1e4}
    return {}


def _from_ome(xml: str) -> dict[str, float]:
    """Return the physical size of the first image."""
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.rpartition("}")[2] == "Pixels":
            sizes = {}
            for axis in "ZYX":
                value = element.get(f"PhysicalSize{axis}")
                unit = _um(element.get(f"PhysicalSize{axis}Unit", "µm"))
                if value is not None and unit is not None:
                    sizes[axis.lower()] = float(value) * unit
            return sizes
    return {}


def _um(unit: object) -> float | None:
    """Return micrometres per unit; None for pixels and what else is no length."""
    if not isinstance(unit, str):
        return None
    # ImageJ writes the micro sign as an escape, others as the Greek letter.
    plain = unit.strip().lower().replace("\\u00b5", "µ").replace("\u03bc", "µ")
    return UM_PER_UNIT.get(plain)


def _pitch(page: Any) -> tuple[float, float] | None:  # noqa: ANN401 tifffile's pages are not typed
    """Return resolution units per voxel along y and x."""
    pitch = []
    for name in ("YResolution", "XResolution"):
        numerator, denominator = page.tags.valueof(name, (0, 0))
        if not numerator or not denominator:
            return None
        pitch.append(denominator / numerator)
    return pitch[0], pitch[1]


def _is_measured(page: Any, pitch: tuple[float, float]) -> bool:  # noqa: ANN401
    """Whether the baseline resolution is a voxel size: per centimetre, and none that printers have."""
    dpi = [2.54 / p for p in pitch]
    printed = all(any(abs(d - known) < 0.01 * known for known in _PRINT_DPI) for d in dpi)
    return int(page.tags.valueof("ResolutionUnit", 0)) == _CENTIMETER and not printed


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect what tifffile logs in this thread, and keep it from the user, who gets one line from us instead."""
    told: list[str] = []
    here = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != here:
            return True
        if record.levelno >= logging.ERROR:
            told.append(record.getMessage())
        return False

    logger = logging.getLogger("tifffile")
    logger.addFilter(keep)
    try:
        yield told
    finally:
        logger.removeFilter(keep)
