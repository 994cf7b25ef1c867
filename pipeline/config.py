"""Settings: how a run is to compute."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pipeline.errors import ArgumentError

DEFAULT_BUDGET_BYTES = {"cpu": 2**30, "cuda": 2**32}
# Workers of a cluster that are not counted before its scheduler is asked: columns are shared out among so many.
UNCOUNTED_WORKERS = 64
# Multiply-adds that a worker does in the seconds that it needs to start. One core: 1.3e10 a second (3-D, width 16,
# measured). A GPU: 2.5e13 a second (width 16 in TF32 or bfloat16, measured on an H200: 44 to 54 TFLOP/s; width 64 up to
# 323, float32 14 to 30) for four seconds, of which torch takes two to import; for CUDA's own start, which was not
# measured, two are taken.
WORTH_A_WORKER = {"cpu": 30_000_000_000, "cuda": 100_000_000_000_000}


class EngineName(StrEnum):
    """What runs a network."""

    REFERENCE = "reference"  # the network as it is written, in float32, by overlapping tiles: the oracle
    FUSED = "fused"  # folded and fused layers, streamed


class Precision(StrEnum):
    """In which numbers a network computes; all but float32 are asked for by name, and their difference is measured."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP16 = "fp16"
    TF32 = "tf32"

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self in (Precision.BF16, Precision.FP16) else 4


class Tta(StrEnum):
    """Test-time augmentation: a result is the mean of what a network says of a scan that is turned in several ways."""

    NONE = "none"
    FLIPS = "flips"  # along every axis: 4 ways in 2-D, 8 in 3-D
    ROTATIONS = "rotations"  # and by a quarter turn in the plane of y and x: 8 ways in 2-D, 16 in 3-D

    def n_turns(self, dims: int) -> int:
        """Return in how many ways a network of so many axes sees a scan."""
        if self is Tta.NONE:
            return 1
        return 1 << (dims + (self is Tta.ROTATIONS))


@dataclass(frozen=True, slots=True)
class Passes:
    """What is averaged at each voxel: each network of a model sees the scan in each of its turns.

    Attributes
    ----------
    n_networks : more than one of an ensemble
    n_turns : of test-time augmentation
    """

    n_networks: int = 1
    n_turns: int = 1

    @property
    def n(self) -> int:
        """How many there are: each is a stream of its own beside the others, or one pass over a tile after another."""
        return self.n_networks * self.n_turns


ONE_PASS = Passes()


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a run is to compute; nothing of it but precision and test-time augmentation changes the labels.

    Attributes
    ----------
    engine : what runs the network; None takes the fastest
    precision : of weights and activations
    tta : test-time augmentation
    device : "cpu" or "cuda"
    tile : run by overlapping tiles of this shape along the network's own axes, twice the halo and a multiple of the
        stride; one number for all
    slab : rows that enter the network at once when it is streamed
    column : shards of a column along each of the image's spatial axes
    budget_bytes : memory of one worker for activations, weights and buffers; None takes the device's default
    n_workers : among which columns are shared out, at most
    worth_a_worker : multiplications of a run without halos for each further worker; None shares out any run
    """

    engine: EngineName | None = None
    precision: Precision = Precision.FLOAT32
    tta: Tta = Tta.NONE
    device: str = "cpu"
    tile: tuple[int, ...] | None = None
    slab: int | None = None
    column: tuple[int, ...] | None = None
    budget_bytes: int | None = None
    n_workers: int = 1
    worth_a_worker: int | None = None

    def __post_init__(self) -> None:
        if self.precision in (Precision.TF32, Precision.FP16) and self.device == "cpu":
            raise ArgumentError(f"precision {self.precision} needs a GPU, got device cpu; use float32 or bf16")
        if self.streamed and self.tile:
            raise ArgumentError("a run is by tiles or by columns, got --tile and --slab or --column; leave one out")
        if self.engine is EngineName.REFERENCE and (self.streamed or self.precision is not Precision.FLOAT32):
            raise ArgumentError(
                "the reference engine runs tiles in float32, got a slab, a column or another precision; leave it out"
            )

    @property
    def taken(self) -> EngineName:
        """The engine: fused layers unless another is asked for; see the README for what was measured."""
        return self.engine or EngineName.FUSED

    @property
    def bound_bytes(self) -> int:
        """The memory of one worker."""
        return DEFAULT_BUDGET_BYTES[self.device] if self.budget_bytes is None else self.budget_bytes

    def shared(self, multiply_adds: int) -> int:
        """Return among how many workers so much work is shared out."""
        worth = self.worth_a_worker
        return self.n_workers if worth is None else min(self.n_workers, 1 + multiply_adds // worth)

    @property
    def streamed(self) -> bool:
        """Whether something was asked for that only streaming has."""
        return self.slab is not None or self.column is not None

    @property
    def tiled(self) -> bool:
        """Whether the run is by overlapping tiles."""
        return self.tile is not None or self.engine is EngineName.REFERENCE
