"""Dims: whether a network is to be 2-D or 3-D."""

from __future__ import annotations

from pipeline.errors import ArgumentError
from pipeline.unet.training.recipe import Recipe

LARGEST_ANISOTROPY = 3.0
FEWEST_SLICES_3D = 16


def choose_dims(
    recipe: Recipe, *, shapes: list[tuple[int, ...]], voxel_size_um: tuple[float, ...] | None
) -> int:
    """Return the dimensions of the network for images of these spatial shapes.

    Raises
    ------
    ArgumentError : the recipe asks for 3, or for neighbours of slices, and the images have 2.
    """
    n_axes, asked = len(shapes[0]), recipe.dims or (len(recipe.poolings[0]) if recipe.poolings else 0)
    asked = asked or (2 if recipe.neighbours else 0)
    if recipe.neighbours and n_axes == 2:
        raise ArgumentError(
            f"neighbours are slices of volumes, got images of shape {shapes[0]}; leave neighbours out, or ingest the "
            "slices as one volume"
        )
    if asked > n_axes:
        raise ArgumentError(f"a {asked}-D network needs volumes, got images of shape {shapes[0]}; set dims = 2")
    if asked or n_axes == 2:
        return asked or 2
    anisotropy = max(voxel_size_um) / min(voxel_size_um) if voxel_size_um else 1.0
    thick = all(shape[0] >= FEWEST_SLICES_3D for shape in shapes)
    return 3 if thick and anisotropy <= LARGEST_ANISOTROPY else 2
