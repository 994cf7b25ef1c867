"""Recipe: how a network is built and trained, from a TOML file or by default."""

from __future__ import annotations

import tomllib
from dataclasses import Field, asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.config import Precision
from pipeline.errors import ArgumentError
from pipeline.store.scaling import Limits, Scaling
from pipeline.store.statistics import Normalisation
from pipeline.unet.settings import Block, Down, Family, Head, Padding, UNetSettings, Upsampling
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.resampled import checked_size
from pipeline.unet.training.typed import typed

_SHIPPED = Path(__file__).parents[2] / "recipes"


class Schedule(StrEnum):
    """How the learning rate goes on."""

    CONSTANT = "constant"
    COSINE = "cosine"  # from the full rate at the start to zero at the end (doi:10.48550/arXiv.1608.03983)
    POLY = "poly"  # the same, by what is left to the power of 0.9 (doi:10.48550/arXiv.1606.00915)
    PLATEAU = "plateau"  # halved after plateau_patience validations without progress


class Optimiser(StrEnum):
    """What takes the steps."""

    ADAMW = "adamw"  # doi:10.48550/arXiv.1711.05101; without weight_decay it is Adam, doi:10.48550/arXiv.1412.6980
    SGD = "sgd"  # with momentum, the U-Net paper's; takes a higher learning_rate, such as 0.01


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a training; zeros are chosen by the images.

    The defaults keep the size (padding "same") and normalise by batch. Measured on the training slices of ISBI 2012
    after 200 steps of 8 patches, Dice of the membranes held out: 0.75 as by default (82 s of CPU time), 0.72 with valid
    padding (55 s, of which a smaller part is learnt from). Both infer exactly. Dice with cross-entropy against
    cross-entropy alone, 120 steps of 8 patches of 64 x 64 on slices of the demo's scan, Dice of the boundaries held
    out, mean of two seeds: 0.678 against 0.667; with displacements of 6 voxels 0.670 against 0.652.
    Two seeds there (width 8, depth 2) do not tell these from chance, so they are off: 0.681 without, 0.677 with an
    average of the weights (ema 0.95), 0.686 with a third of the patches about the rarer class.

    Attributes
    ----------
    dims : 2 or 3; 0 chooses 3 for volumes of at least 16 slices whose voxels are at most 3 times longer than wide
    width, depth, kernel, n_convs, padding, batch_norm, dropout, up : see UNetSettings; width 0 is 16 in 2-D, 8 in 3-D
    family : unet, unet++ or fcn, the baseline; see UNetSettings, as for the next ones; padding "valid" is unet's alone
    block : plain, residual or preactivated
    down : pooling or strided; with block = "residual" and kernel = 5 the network is a V-Net, but for its PReLU
    attention : gates on the skips of a unet
    deep_supervision : of unet++: the loss is the mean over the outputs of all depths
    poolings : for thick slices, such as [[1, 2, 2], [1, 2, 2], [2, 2, 2]], finest level first: by how much each
        pooling divides the resolution along z, y and x; depth and dims follow from it, and patches are flat; empty: 2
    neighbours : slices of a volume on each side of its own that a 2-D network also sees, as channels, such as 1: each
        channel of the image from the farthest slice above to the farthest one below, mirrored at the volume's ends; it
        learns the truth of the one between, and the flips of [augmentation] turn their order round, too
    normalisation : of intensities, by the statistics of each image, or of each slice, its dtype, or a fixed window; see
        Normalisation; l1 and l2 take zscore, by the statistics of all together
    window : of the normalisation window, such as [-160, 240], or one pair for each channel
    percentiles : of the normalisation percentile, two that ingest stores, such as [0.5, 99.5]; empty: 1 and 99
    voxel_size_um : [z, y, x] or [y, x] that the network is to see, whatever the images have; a 2-D network takes slices
        of volumes as they lie; empty: as they are, all about the same
    patch : voxels of a patch's core along every axis, less where the stride is less, in proportion to it; 0 is 128 in
        2-D, 48 in 3-D
    batch : patches per step; 0 is 8 in 2-D, 4 in 3-D
    optimiser : what takes the steps
    learning_rate : its rate, at the highest
    momentum : of sgd, at least 0 and below 1, 0.99 in the paper
    weight_decay : of adamw, and of sgd as an L2 penalty
    schedule : how the rate goes on
    warm_up_steps : over which the rate rises to what the schedule says
    plateau_patience : of the schedule plateau, validations without progress
    clip_norm : longest gradient, as the norm over all weights; a longer one is shortened; 0 takes all as they are
    loss : what is made small; binary_cross_entropy and dice_binary_cross_entropy make a sigmoid head, which several
        label volumes that overlap need (train --labels A,B); l1 and l2 make a linear one, which learns
        target images instead of labels: denoising, say. Targets keep their grey values: set brightness and contrast of
        [augmentation] to 0, as the recipe ``regression`` does, or the network learns to undo them
    focal_gamma : of the focal loss, how much less a voxel counts that is nearly right
    balance_classes : weigh classes so that each counts as much as another, whatever their frequency
    instances : labels are instances, each value one: class 1 inside, class 0 outside and between those that touch
    border_weight : added to the weight of background voxels between two instances, 10 in the paper; 0: none
    border_sigma_voxels : how far that weight reaches, voxels of the finest axis, 5 in the paper
    ignore : label value of voxels that nobody has labelled, which do not count, or intensity of such voxels in any
        channel of a target; left out: all are labelled
    foreground_share : part of the patches that are centred on a voxel of a class other than the most frequent one
    ema : decay per step of a moving average of the weights, at least 0 and below 1, such as 0.99; the average is
        validated and kept instead of them (doi:10.1137/0330046); 0: none
    precision : of the network while it learns, float32 or bf16 (autocast); loss, weights and their updates, checkpoints
        and validations are float32 either way; left out: bf16 where the device has instructions for it, GPUs since
        Ampere and processors with AMX or AVX-512 BF16, else float32
    steps : when to stop
    patience : stop earlier, after so many validations without progress; 0: never
    validate_every : steps between two validations
    validation_fraction : of each image, a slab across its first axis, is held out
    augmentation : how patches are changed, a table of its own; see Augmentation
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
    family: Family = Family.UNET
    block: Block = Block.PLAIN
    down: Down = Down.POOLING
    attention: bool = False
    deep_supervision: bool = False
    poolings: tuple[tuple[int, ...], ...] = ()
    neighbours: int = 0
    normalisation: Normalisation = Normalisation.ZSCORE
    window: Limits = ()
    percentiles: tuple[float, ...] = ()
    voxel_size_um: tuple[float, ...] = ()
    patch: int = 0
    batch: int = 0
    optimiser: Optimiser = Optimiser.ADAMW
    learning_rate: float = 2e-3
    momentum: float = 0.99
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.COSINE
    warm_up_steps: int = 0
    plateau_patience: int = 5
    clip_norm: float = 0.0
    loss: Loss = Loss.DICE_CROSS_ENTROPY
    focal_gamma: float = 2.0
    balance_classes: bool = False
    instances: bool = False
    border_weight: float = 0.0
    border_sigma_voxels: float = 5.0
    ignore: int | None = None
    foreground_share: float = 0.0
    ema: float = 0.0
    precision: Precision | None = None
    steps: int = 1000
    patience: int = 0
    validate_every: int = 50
    validation_fraction: float = 0.2
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {
            "dims": 0, "width": 0, "patch": 0, "batch": 0, "steps": 1, "validate_every": 1, "warm_up_steps": 0,
            "weight_decay": 0, "clip_norm": 0, "focal_gamma": 0, "border_weight": 0, "patience": 0,
            "plateau_patience": 1, "neighbours": 0,
        }  # fmt: skip
        for name, lowest in least.items():
            if not lowest <= (value := getattr(self, name)) < float("inf"):
                raise ArgumentError(f"{name} must be at least {lowest}, got {value}; use {lowest} or more")
        for name, usual in (("learning_rate", 0.002), ("border_sigma_voxels", 5)):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ArgumentError(f"{name} must be above 0, got {value}; use {usual}")
        if self.neighbours and 3 in (self.dims, *map(len, self.poolings)):
            raise ArgumentError(
                f"neighbours need a 2-D network, got {self.neighbours} for a 3-D one, which sees them without; set "
                "dims = 2"
            )
        if self.dims not in (0, 2, 3):
            raise ArgumentError(f"dims must be 2 or 3, or 0 to choose, got {self.dims}; use 0")
        if not 0 < self.validation_fraction < 1:
            raise ArgumentError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}; use 0.2")
        if not 0 <= self.foreground_share <= 1:
            raise ArgumentError(f"foreground_share must be from 0 to 1, got {self.foreground_share}; use 0.33")
        for name in ("momentum", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ArgumentError(f"{name} must be at least 0 and below 1, got {value}; use 0.99")
        if self.precision not in (None, Precision.FLOAT32, Precision.BF16):
            raise ArgumentError(f"precision of a training must be float32 or bf16, got {self.precision}; use bf16")
        self._check_weights()
        _ = self.scaling, checked_size(self.voxel_size_um)

    def _check_weights(self) -> None:
        """Refuse weights that the loss or the labels cannot have."""
        of_classes = ("balance_classes", "instances", "border_weight", "foreground_share", "classes")
        if self.loss.is_of_values and (asked := [name for name in of_classes if getattr(self, name)]):
            raise ArgumentError(
                f"loss {self.loss} learns values, which have no classes, got {', '.join(asked)}; leave that out"
            )
        if self.loss.is_of_values and self.normalisation is not Normalisation.ZSCORE:
            raise ArgumentError(
                f"loss {self.loss} brings all images together to mean 0 and deviation 1, got {self.normalisation}; "
                "leave normalisation out"
            )
        if self.border_weight and not self.instances:
            raise ArgumentError(
                f"border_weight needs labels that are instances, got {self.border_weight:g} and instances = false; "
                "give each object its own value and set instances = true"
            )
        if (self.border_weight or self.balance_classes) and not self.loss.takes_weights:
            raise ArgumentError(
                f"border_weight and balance_classes need a loss that is a sum over voxels, got loss {self.loss}; use "
                f"{Loss.DICE_CROSS_ENTROPY}"
            )
        if self.instances and self.ignore == 0:
            raise ArgumentError("ignore must be another value than the background of instances, got 0; use 255, say")

    @property
    def scaling(self) -> Scaling:
        """How intensities are brought to the network's scale."""
        return Scaling.of(self.normalisation, window=self.window, percentiles=self.percentiles)

    def network(self, *, dims: int, in_channels: int, n_classes: int) -> UNetSettings:
        """Return the settings of the network to train; a sigmoid has no channel for the first class.

        For losses of values ``n_classes`` are the channels of the target; ``in_channels`` are the image's.
        """
        sigmoid = self.loss.is_of_labels
        head = Head.LINEAR if self.loss.is_of_values else Head.SIGMOID if sigmoid else Head.SOFTMAX
        return UNetSettings(
            dims=dims, in_channels=in_channels * (2 * self.neighbours + 1), n_classes=n_classes - sigmoid,
            head=head, width=self.width or {2: 16, 3: 8}[dims],
            depth=len(self.poolings) or self.depth, padding=self.padding, kernel=self.kernel, n_convs=self.n_convs,
            batch_norm=self.batch_norm, dropout=self.dropout, up=self.up, family=self.family, block=self.block,
            down=self.down, attention=self.attention, deep_supervision=self.deep_supervision, poolings=self.poolings,
            neighbours=self.neighbours,
        )  # fmt: skip

    def patch_core(self, settings: UNetSettings) -> int:
        """Return voxels of a patch along the axis of the largest stride, a multiple of it."""
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


def shipped() -> dict[str, Path]:
    """Return the recipes that ship, by name."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.toml"))}


def load_recipe(path: str | Path) -> Recipe:
    """Return a recipe that ships, by its name, or the one in a TOML file; settings that it lacks have their defaults.

    Raises
    ------
    ArgumentError : the file cannot be read, is no TOML, or has a setting that is unknown or breaks a rule.
    """
    try:
        document = tomllib.loads(shipped().get(str(path), Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ArgumentError(
            f"a recipe must be one of {', '.join(shipped())} or a TOML file, got {path} ({cause}); check the path"
        ) from error
    table = document.get("augmentation", {})
    if type(table) is not dict:
        raise ArgumentError(f"augmentation must be a table, got {table!r} in {path}; write [augmentation] above it")
    changes = Augmentation(**_settings(table, fields(Augmentation), what=f"[augmentation] in {path}"))
    return Recipe(**_settings(document, fields(Recipe), what=f"a recipe such as {path}") | {"augmentation": changes})


def _settings(table: dict[str, Any], known: tuple[Field[Any], ...], *, what: str) -> dict[str, Any]:
    """Return the settings of a table, each of its field's type; the table within it is left out."""
    names = [each.name for each in known]
    if unknown := sorted(set(table) - set(names)):
        side, other = ("below", Augmentation) if "augmentation" in names else ("above", Recipe)
        moved = sorted(set(unknown) & {each.name for each in fields(other)})
        remedy = f"put {', '.join(moved)} {side} [augmentation]" if moved else "correct it"
        raise ArgumentError(f"{what} has the settings {', '.join(names)}, got {unknown}; {remedy}")
    kinds = {each.name: type(each.default) for each in known} | {"ignore": int, "precision": Precision}
    return {name: typed(name, value, kinds[name]) for name, value in table.items() if name != "augmentation"}
