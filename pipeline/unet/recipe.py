"""Recipe: how a network is built and trained, from a TOML file or by default."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import ArgumentError
from pipeline.store.statistics import Normalisation
from pipeline.unet.settings import Padding, UNetSettings, Upsampling

LARGEST_ANISOTROPY = 3.0
FEWEST_SLICES_3D = 16


class Schedule(StrEnum):
    """How the learning rate goes on."""

    CONSTANT = "constant"
    COSINE = "cosine"  # from the full rate at the start to zero at the end (doi:10.48550/arXiv.1608.03983)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a training; zeros are chosen by the images.

    The defaults keep the size (padding "same") and normalise by batch. Measured on the training slices of ISBI 2012
    after 200 steps of 8 patches, Dice of the membranes held out: 0.75 as by default (82 s of CPU time), 0.72 with valid
    padding (55 s, of which a smaller part is learnt from). Both infer exactly.

    Attributes
    ----------
    dims : 2 or 3; 0 chooses 3 for volumes of at least 16 slices whose voxels are at most 3 times longer than wide
    width, depth, kernel, n_convs, padding, batch_norm, dropout, up : see UNetSettings; width 0 is 16 in 2-D, 8 in 3-D
    normalisation : of intensities, by the statistics of each image
    patch : voxels of a patch's core along every axis; 0 is 128 in 2-D, 48 in 3-D
    batch : patches per step; 0 is 8 in 2-D, 4 in 3-D
    learning_rate : of Adam (doi:10.48550/arXiv.1412.6980)
    schedule : how the rate goes on
    steps : when to stop
    validate_every : steps between two validations
    validation_fraction : of each image, a slab at the end of its first axis, is held out
    contrast : each patch is scaled and shifted by about this part of the network's scale
    classes : names of the labels' values, ascending; empty takes "class 0" and so on
    """

    dims: int = 0
    width: int = 0
    depth: int = 3
    kernel: int = 3
    n_convs: int = 2
    padding: Padding = Padding.SAME
    batch_norm: bool = True
    dropout: float = 0.0
    up: Upsampling = Upsampling.TRANSPOSED
    normalisation: Normalisation = Normalisation.ZSCORE
    patch: int = 0
    batch: int = 0
    learning_rate: float = 2e-3
    schedule: Schedule = Schedule.COSINE
    steps: int = 1000
    validate_every: int = 50
    validation_fraction: float = 0.2
    contrast: float = 0.1
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"dims": 0, "width": 0, "patch": 0, "batch": 0, "steps": 1, "validate_every": 1, "contrast": 0}
        for name, lowest in least.items():
            if (value := getattr(self, name)) < lowest:
                raise ArgumentError(f"{name} must be at least {lowest}, got {value}; use {lowest} or more")
        if self.dims not in (0, 2, 3):
            raise ArgumentError(f"dims must be 2 or 3, or 0 to choose, got {self.dims}; use 0")
        if not 0 < self.validation_fraction < 1:
            raise ArgumentError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}; use 0.2")
        if not 0 < self.learning_rate < float("inf"):
            raise ArgumentError(f"learning_rate must be above 0, got {self.learning_rate}; use 0.002")

    def network(self, *, dims: int, in_channels: int, n_classes: int) -> UNetSettings:
        """Return the settings of the network to train."""
        return UNetSettings(
            dims=dims, in_channels=in_channels, n_classes=n_classes, width=self.width or {2: 16, 3: 8}[dims],
            depth=self.depth, padding=self.padding, kernel=self.kernel, n_convs=self.n_convs,
            batch_norm=self.batch_norm, dropout=self.dropout, up=self.up,
        )  # fmt: skip

    def patch_core(self, settings: UNetSettings) -> int:
        """Return voxels of a patch along every axis of the network, a multiple of its stride."""
        size = self.patch or {2: 128, 3: 48}[settings.dims]
        if size % settings.stride:
            raise ArgumentError(
                f"patch must be a multiple of the stride {settings.stride}, got {size}; "
                f"use {-(-size // settings.stride) * settings.stride}"
            )
        return size

    def batch_size(self, dims: int) -> int:
        """Return patches per step."""
        return self.batch or {2: 8, 3: 4}[dims]

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a JSON object."""
        return asdict(self)


def choose_dims(
    recipe: Recipe, *, shapes: list[tuple[int, ...]], voxel_size_um: tuple[float, ...] | None
) -> int:
    """Return the dimensions of the network for images of these spatial shapes.

    Raises
    ------
    ArgumentError : the recipe asks for 3 and the images have 2.
    """
    n_axes = len(shapes[0])
    if recipe.dims > n_axes:
        raise ArgumentError(f"a {recipe.dims}-D network needs volumes, got images of shape {shapes[0]}; set dims = 2")
    if recipe.dims or n_axes == 2:
        return recipe.dims or 2
    anisotropy = max(voxel_size_um) / min(voxel_size_um) if voxel_size_um else 1.0
    thick = all(shape[0] >= FEWEST_SLICES_3D for shape in shapes)
    return 3 if thick and anisotropy <= LARGEST_ANISOTROPY else 2


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a TOML file; settings that it lacks have their defaults.

    Raises
    ------
    ArgumentError : the file cannot be read, is no TOML, or has a setting that is unknown or breaks a rule.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ArgumentError(f"a recipe must be a TOML file, got {path} ({cause}); check the path") from error
    known = {field.name: type(field.default) for field in fields(Recipe)}
    if unknown := sorted(set(document) - set(known)):
        raise ArgumentError(f"a recipe has the settings {', '.join(known)}, got {unknown} in {path}; correct it")
    return Recipe(**{name: _typed(name, value, known[name]) for name, value in document.items()})


def _typed(name: str, value: Any, kind: type) -> Any:  # noqa: ANN401 whatever TOML holds
    """Return a TOML value as its field's type; a whole number may stand for a real one, nothing else is converted."""
    if issubclass(kind, StrEnum):
        if value not in set(kind):
            raise ArgumentError(f"{name} must be one of {', '.join(kind)}, got {value!r}; choose one")
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple:
        if type(value) is not list or not all(type(each) is str for each in value):
            raise ArgumentError(f"{name} must be a list of texts, got {value!r}; correct it")
        return tuple(value)
    if type(value) is not kind:
        raise ArgumentError(f"{name} must be of type {kind.__name__}, got {value!r}; correct it")
    return value
