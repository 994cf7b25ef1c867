"""Voxel size: whether an image has about the one that a model was trained at."""

from __future__ import annotations

import logging

from pipeline.config import Tta
from pipeline.errors import ArgumentError
from pipeline.store.image import Image
from pipeline.unet.model import Model
from pipeline.unet.training.resampled import about_as_large

log = logging.getLogger("haloseg")


def check_rotations(image: Image, tta: Tta) -> None:
    """Refuse quarter turns of voxels that are longer along y than along x, or shorter: objects would change shape.

    Raises
    ------
    ArgumentError : they differ by more than a hundredth.
    """
    y, x = image.voxel_size_um[-2:] if image.voxel_size_um else (1.0, 1.0)
    if tta is Tta.ROTATIONS and abs(y - x) > 0.01 * max(y, x):
        raise ArgumentError(
            f"rotations need voxels as long along y as along x, got {y:g} and {x:g} um in {image.location}; use "
            "--tta flips"
        )


def warn_of_voxel_size(image: Image, model: Model) -> None:
    """Say where an image's voxels are of another size than those that a model learnt from, and what to do about it."""
    if not image.voxel_size_um or not model.voxel_size_um:
        return
    dims = model.settings.dims + (model.settings.neighbours > 0)
    seen = model.voxel_size_um[-dims:]
    if about_as_large(image.voxel_size_um[-dims:], seen):
        return
    coarser = [level for level in image.levels[1:] if about_as_large(level.scale[-dims:], seen)]
    remedy = "resample the scan"
    if coarser:
        size = ",".join(f"{each:g}" for each in coarser[0].scale)
        remedy = f"use its pyramid: haloseg ingest {image.location / coarser[0].path} IMAGE --voxel-size-um {size}"
    log.warning(
        "the model was trained at %s um per voxel, the image has %s: expect worse labels, or %s",
        seen, image.voxel_size_um[-dims:], remedy,
    )  # fmt: skip
