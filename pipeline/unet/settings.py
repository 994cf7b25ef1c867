"""UNetSettings: what a network is built from, as JSON, and the tiles that follow from it in closed form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.reach import Line

LARGEST_CLASS = 255
FCN_LEAST_DEPTH = 3


class Family(StrEnum):
    """How levels are connected."""

    UNET = "unet"  # each level once down and once up (doi:10.1007/978-3-319-24574-4_28)
    NESTED = "unet++"  # and at every stage between (doi:10.1007/978-3-030-00889-5_1)
    FCN = "fcn"  # scores of the coarsest level and of two poolings, interpolated (doi:10.1109/CVPR.2015.7298965)


class Block(StrEnum):
    """What the convolutions of one level and path are."""

    PLAIN = "plain"  # one after another, each with a ReLU
    RESIDUAL = "residual"  # added to what entered, ReLU last (doi:10.1109/CVPR.2016.90)
    PREACTIVATED = "preactivated"  # the same, normalisation and ReLU first (doi:10.1109/LGRS.2018.2802944)


class Down(StrEnum):
    """How resolution is given up."""

    POOLING = "pooling"  # the maximum
    STRIDED = "strided"  # a convolution without overlap, as in V-Net (doi:10.1109/3DV.2016.79)


class Padding(StrEnum):
    """What a convolution sees past its input's border."""

    VALID = "valid"  # nothing: the output shrinks
    SAME = "same"  # zeros: the output keeps its size


class Upsampling(StrEnum):
    """How resolution is regained; both reach one voxel of the coarser level, two in the family "fcn"."""

    TRANSPOSED = "transposed"  # transposed convolution without overlap; "fcn": linear interpolation that is learnt
    RESIZE = "resize"  # convolution, kernel 1, then each voxel repeated; "fcn": linear interpolation


class Head(StrEnum):
    """What turns logits into probabilities, or leaves them as they are."""

    SOFTMAX = "softmax"  # one of the classes per voxel
    SIGMOID = "sigmoid"  # each channel for itself; class 0 where none exceeds one half
    LINEAR = "linear"  # nothing: there are no classes, the logits are values, such as intensities


@dataclass(frozen=True, slots=True)
class UNetSettings:
    """Everything that decides the network's tensors and geometry.

    Attributes
    ----------
    dims : spatial axes, 2 or 3
    in_channels : channels that enter, of the image, or of each of its slices and of their neighbours
    n_classes : channels of the output; of a linear head they are no classes
    width : channels of the first convolutions; doubled on each level
    depth : number of poolings; the stride is 2**depth, or less along an axis where ``poolings`` say so
    padding : of every convolution
    kernel : voxels of each convolution along every axis, odd; see ``poolings``
    n_convs : convolutions per level and path
    batch_norm : normalise between convolution and ReLU, by frozen statistics at inference
    dropout : probability at the end of the contracting path, in training
    up : how resolution is regained
    up_bias : whether upsampling adds a bias
    double_before_pooling : double the channels before each pooling, not after it, and keep them while upsampling
    head : how logits become probabilities
    family : how levels are connected
    block : what the convolutions of one level and path are
    down : how resolution is given up
    attention : weigh the skips of a U-Net by additive gates (doi:10.48550/arXiv.1804.03999), on the finer grid
    deep_supervision : nested networks learn by the outputs of all depths, and infer by the mean of their logits
    poolings : 1 or 2 for each axis, level by level, finest first, such as ((1, 2, 2), (2, 2, 2)) for thick slices;
        empty: 2 everywhere. As in nnU-Net (doi:10.1038/s41592-020-01008-z) kernels are 1 voxel long along an axis on
        levels before the one from which it is first pooled: those of that example are 1 x 3 x 3, then 3 x 3 x 3
    neighbours : slices of a volume on each side of its own that a 2-D network sees, as channels: the first channel of
        the image from the farthest slice above to the farthest one below, then its second one, and so on
    """

    dims: int
    in_channels: int = 1
    n_classes: int = 2
    width: int = 64
    depth: int = 4
    padding: Padding = Padding.VALID
    kernel: int = 3
    n_convs: int = 2
    batch_norm: bool = False
    dropout: float = 0.0
    up: Upsampling = Upsampling.TRANSPOSED
    up_bias: bool = True
    double_before_pooling: bool = False
    head: Head = Head.SOFTMAX
    family: Family = Family.UNET
    block: Block = Block.PLAIN
    down: Down = Down.POOLING
    attention: bool = False
    deep_supervision: bool = False
    poolings: tuple[tuple[int, ...], ...] = ()
    neighbours: int = 0

    def __post_init__(self) -> None:
        if self.dims not in (2, 3):
            raise ArgumentError(f"dims must be 2 or 3, got {self.dims}; use 2 for slides, 3 for volumes")
        for name in ("in_channels", "width", "depth", "n_convs"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}; use 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ArgumentError(f"kernel must be odd, got {self.kernel}; use {max(1, self.kernel + 1)}")
        if not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout must be at least 0 and below 1, got {self.dropout}; use 0.5")
        fewest = 2 if self.head is Head.SOFTMAX else 1
        if self.n_classes < fewest or self.n_labels > LARGEST_CLASS + 1:
            raise ArgumentError(
                f"a {self.head} head needs {fewest} to {LARGEST_CLASS + fewest - 1} classes, got {self.n_classes}; "
                "merge or add classes"
            )
        self._check_poolings()
        self._check_family()
        n_seen = 2 * self.neighbours + 1
        if self.neighbours < 0 or (self.neighbours and self.dims != 2) or self.in_channels % n_seen:
            raise ArgumentError(
                f"neighbours need a 2-D network of {n_seen} channels for each of the image, got {self.neighbours} "
                f"neighbours, dims {self.dims} and {self.in_channels} channels; set dims = 2, or leave neighbours out"
            )

    def _check_poolings(self) -> None:
        fits = all(len(each) == self.dims and {2} <= set(each) <= {1, 2} for each in self.poolings)
        if self.poolings and (len(self.poolings) != self.depth or not fits):
            raise ArgumentError(
                f"poolings must be {self.depth} lists, as many as the depth, of {self.dims} numbers 1 or 2, one of "
                f"them 2, got {self.poolings}; use such as {((1,) * (self.dims - 2) + (2, 2),) * self.depth}"
            )

    def _check_family(self) -> None:
        """Refuse what only other families have."""
        wrong = {
            "padding valid": self.padding is Padding.VALID and self.family is not Family.UNET,
            "attention": self.attention and self.family is not Family.UNET,
            "double_before_pooling": self.double_before_pooling and self.family is not Family.UNET,
            "deep_supervision": self.deep_supervision and self.family is not Family.NESTED,
            f"depth {self.depth}, below 3,": self.depth < FCN_LEAST_DEPTH and self.family is Family.FCN,
        }
        if got := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ArgumentError(f"networks of family {self.family} have no {' and no '.join(got)}; leave it out")

    @property
    def image_channels(self) -> int:
        """Channels of the image."""
        return self.in_channels // (2 * self.neighbours + 1)

    @property
    def n_labels(self) -> int:
        """Values that a segmented voxel may have: for a sigmoid head one more than channels, 0 for none of them.

        None for a linear head.
        """
        if self.head is Head.LINEAR:
            return 0
        return self.n_classes + (1 if self.head is Head.SIGMOID else 0)

    @property
    def strides(self) -> tuple[int, ...]:
        """Total downsampling along each axis, in voxels."""
        return tuple(self.line(axis).stride for axis in range(self.dims))

    @property
    def stride(self) -> int:
        """Total downsampling along the axis that has most, in voxels: a multiple of every axis's."""
        return max(self.strides)

    @property
    def radius(self) -> int:
        """Voxels that the convolutions of one level and path reach to each side, along axes that they reach across."""
        return self.n_convs * (self.kernel // 2)

    def reaches(self, axis: int) -> tuple[int, ...]:
        """Return how far each convolution of each level sees along an axis, to each side; see ``poolings``."""
        factors = self.factors(axis)
        across = (level == self.depth or 2 in factors[: level + 1] for level in range(self.depth + 1))
        return tuple(self.kernel // 2 if each else 0 for each in across)

    def factors(self, axis: int) -> tuple[int, ...]:
        """Return by how much each pooling divides the resolution along an axis."""
        return tuple(each[axis] for each in self.poolings) or (2,) * self.depth

    def line(self, axis: int) -> Line:
        """Return the network's geometry along an axis."""
        radii = tuple(self.n_convs * reach for reach in self.reaches(axis))
        return Line(radii, self.factors(axis), self.padding is Padding.VALID, self.family is Family.FCN)

    @property
    def loss(self) -> int:
        """Voxels that the output is smaller than the input on each side of the last axis: 92 for that of 2015."""
        return self.line(-1).loss

    def legal_size(self, size: int, axis: int = -1) -> int:
        """Return the smallest size of at least ``size`` voxels that every pooling divides and that leaves an output."""
        return self.line(axis).legal_size(size)

    def check_size(self, size: int, axis: int = -1) -> None:
        """Refuse a size of a tile along an axis that not every pooling can divide, or that leaves no output."""
        above = self.legal_size(size, axis)
        if above != size:
            smaller = self.legal_size(above - self.strides[axis], axis)
            use = f"{above}" if smaller == above else f"{smaller} or {above}"
            raise ArgumentError(
                f"input sizes must be legal for depth {self.depth}, padding {self.padding}, got {size}; use {use}"
            )

    def in_proportion(self, size: int) -> tuple[int, ...]:
        """Return ``size``, a multiple of the stride, along the axis of most downsampling, less along others by theirs.

        So many voxels lie on the coarsest level along every axis: patches of thick slices are flat.
        """
        return tuple(size * stride // self.stride for stride in self.strides)

    def check_slab(self, slab: int) -> None:
        """Refuse rows that are no multiple of the stride."""
        if slab < self.stride or slab % self.stride:
            raise ArgumentError(
                f"slab must be a multiple of the stride {self.stride}, got {slab}; "
                f"use {max(1, -(-slab // self.stride)) * self.stride}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object; without neighbours as it was before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "neighbours" or value}

    @classmethod
    def from_json(cls, document: Any) -> UNetSettings:  # noqa: ANN401 whatever a file holds
        """Return the settings that ``to_json`` wrote; a field that an older version did not know has its default.

        Raises
        ------
        ModelError : a field is unknown, of the wrong type, or breaks a rule.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(document, dict) or "dims" not in document or set(document) - names:
            got = sorted(document) if isinstance(document, dict) else document
            raise ModelError(f"network settings must have dims, and fields of {sorted(names)}, got {got}; save it anew")
        try:
            return cls(**{name: _typed(name, value) for name, value in document.items()})
        except ValueError as error:
            raise ModelError(f"network settings must be ones this version can build: {error}") from error


_ENUMS = {
    "padding": Padding, "up": Upsampling, "head": Head, "family": Family, "block": Block, "down": Down,
}  # fmt: skip
_FLAGS = ("batch_norm", "up_bias", "double_before_pooling", "attention", "deep_supervision")


def _typed(name: str, value: Any) -> Any:  # noqa: ANN401 fields differ in type
    """Return a JSON value as its field's type, or refuse it: nothing is converted in silence."""
    if name in _ENUMS:
        return _ENUMS[name](value)
    if name == "poolings":
        return as_poolings(value)
    if name in _FLAGS:
        fits = isinstance(value, bool)
    elif name == "dropout":
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits:
        raise ArgumentError(f"{name} must be a number or a flag as in UNetSettings, got {value!r}; save the model anew")
    return value


def as_poolings(value: Any) -> tuple[tuple[int, ...], ...]:  # noqa: ANN401 whatever a file holds
    """Return a list of lists of whole numbers as tuples, or refuse it."""
    lists = isinstance(value, list | tuple) and all(isinstance(each, list | tuple) for each in value)
    if not lists or any(type(number) is not int for each in value for number in each):
        raise ArgumentError(
            f"poolings must be a list of lists such as [[1, 2, 2], [2, 2, 2]], got {value!r}; give one per level"
        )
    return tuple(tuple(each) for each in value)


def closed_form_rule(settings: UNetSettings) -> TileRule:
    """Return the tile rule that follows from the settings; ``receptive.measure_tile_rule`` finds the same."""
    stride, halo, trim = zip(*(settings.line(axis).rule() for axis in range(settings.dims)), strict=True)
    return TileRule(stride, halo, trim)
