"""UNetSettings: what a network is built from, as JSON, and the tiles that follow from it in closed form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule

LARGEST_CLASS = 255


class Padding(StrEnum):
    """What a convolution sees past its input's border."""

    VALID = "valid"  # nothing: the output shrinks
    SAME = "same"  # zeros: the output keeps its size


class Upsampling(StrEnum):
    """How the expanding path doubles the resolution; both reach one voxel of the coarser level."""

    TRANSPOSED = "transposed"  # transposed convolution, kernel 2, stride 2
    RESIZE = "resize"  # convolution, kernel 1, then each voxel repeated


class Head(StrEnum):
    """What turns logits into probabilities."""

    SOFTMAX = "softmax"  # one of the classes per voxel
    SIGMOID = "sigmoid"  # each channel for itself; class 0 where none exceeds one half


@dataclass(frozen=True, slots=True)
class UNetSettings:
    """Everything that decides the network's tensors and geometry.

    Attributes
    ----------
    dims : spatial axes, 2 or 3
    in_channels : channels of the image
    n_classes : channels of the output
    width : channels of the first convolutions; doubled on each level
    depth : number of poolings; the stride is 2**depth
    padding : of every convolution
    kernel : voxels of each convolution along every axis, odd
    n_convs : convolutions per level and path
    batch_norm : normalise between convolution and ReLU, by frozen statistics at inference
    dropout : probability at the end of the contracting path, in training
    up : how resolution is regained
    up_bias : whether upsampling adds a bias
    double_before_pooling : double the channels before each pooling, not after it, and keep them while upsampling
    head : how logits become probabilities
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

    @property
    def n_labels(self) -> int:
        """Values that a segmented voxel may have: for a sigmoid head one more than channels, 0 for none of them."""
        return self.n_classes + (1 if self.head is Head.SIGMOID else 0)

    @property
    def stride(self) -> int:
        """Total downsampling, in voxels."""
        return 1 << self.depth

    @property
    def radius(self) -> int:
        """Voxels that the convolutions of one level and path reach to each side."""
        return self.n_convs * (self.kernel // 2)

    @property
    def loss(self) -> int:
        """Voxels that the output is smaller than the input on each side: 92 for the network of 2015."""
        return self.radius * (3 * self.stride - 2) if self.padding is Padding.VALID else 0

    def legal_size(self, size: int) -> int:
        """Return the smallest size of at least ``size`` voxels that every pooling halves and that leaves an output."""
        if self.padding is Padding.SAME:
            return max(1, -(-size // self.stride)) * self.stride
        phase = 2 * self.radius * (self.stride - 1) % self.stride
        least = max(size, 2 * self.loss + 1)
        return least + (phase - least) % self.stride

    def check_size(self, size: int) -> None:
        """Refuse a size of a tile that not every pooling can halve, or that leaves no output."""
        above = self.legal_size(size)
        if above != size:
            smaller = self.legal_size(above - self.stride)
            use = f"{above}" if smaller == above else f"{smaller} or {above}"
            raise ArgumentError(
                f"input sizes must be legal for depth {self.depth}, padding {self.padding}, got {size}; use {use}"
            )

    def check_slab(self, slab: int) -> None:
        """Refuse rows that are no multiple of the stride."""
        if slab < self.stride or slab % self.stride:
            raise ArgumentError(
                f"slab must be a multiple of the stride {self.stride}, got {slab}; "
                f"use {max(1, -(-slab // self.stride)) * self.stride}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> UNetSettings:  # noqa: ANN401 whatever a file holds
        """Return the settings that ``to_json`` wrote.

        Raises
        ------
        ModelError : a field is missing, unknown, of the wrong type, or breaks a rule.
        """
        names = {field.name: field for field in fields(cls)}
        if not isinstance(document, dict) or set(document) != set(names):
            got = sorted(document) if isinstance(document, dict) else document
            raise ModelError(f"network settings must have exactly the fields {sorted(names)}, got {got}; save it anew")
        try:
            return cls(**{name: _typed(name, document[name]) for name in names})
        except ValueError as error:
            raise ModelError(f"network settings must be ones this version can build: {error}") from error


_ENUMS = {"padding": Padding, "up": Upsampling, "head": Head}
_FLAGS = ("batch_norm", "up_bias", "double_before_pooling")


def _typed(name: str, value: Any) -> Any:  # noqa: ANN401 fields differ in type
    """Return a JSON value as its field's type, or refuse it: nothing is converted in silence."""
    if name in _ENUMS:
        return _ENUMS[name](value)
    if name in _FLAGS:
        fits = isinstance(value, bool)
    elif name == "dropout":
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits:
        raise ArgumentError(f"{name} must be a number or a flag as in UNetSettings, got {value!r}; save the model anew")
    return value


def closed_form_rule(settings: UNetSettings) -> TileRule:
    """Return the tile rule that follows from the settings; ``receptive.measure_tile_rule`` finds the same.

    Valid networks lose ``radius * (3 * stride - 2)`` voxels on each side; tiles that are whole cores apart are legal
    only with a trim of ``radius`` modulo half the stride. Networks that keep their size have their reach as halo,
    rounded up to the stride so that the tile, too, starts on a multiple of it.
    """
    if settings.padding is Padding.VALID:
        trim = settings.radius % (settings.stride // 2)
        halo = settings.loss + trim
    else:
        trim = halo = -(-_reach(settings) // settings.stride) * settings.stride
    n = settings.dims
    return TileRule((settings.stride,) * n, (halo,) * n, (trim,) * n)


def _reach(settings: UNetSettings) -> int:
    """Return how far to the left of an aligned core the outputs in it depend on the input."""
    r = settings.radius
    left = [-r]
    for _ in range(settings.depth):
        left.append(left[-1] // 2 - r)
    deepest = left.pop()
    while left:
        deepest = min(2 * deepest, left.pop()) - r
    return -deepest
