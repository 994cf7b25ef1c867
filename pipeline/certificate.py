"""Certificates: how far a result is from the reference on sampled boxes, one float32 pass of the network as written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import Precision
from pipeline.works.certify import TOLERANCE


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far labels are from the reference, which sees a larger window.

    Attributes
    ----------
    engine, precision : what made the labels
    n_boxes, n_voxels : that were computed again: at the scan's first corner, then at its last, then by chance
    max_difference : of the probabilities, in two digits
    n_flipped : voxels of another class
    n_flipped_decided : of them those where the reference's best two are further apart than rounding, 2e-5
    """

    engine: str
    precision: str
    n_boxes: int
    n_voxels: int
    max_difference: float
    n_flipped: int
    n_flipped_decided: int

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as a JSON object."""
        return asdict(self)

    @property
    def is_rounding(self) -> bool:
        """Whether nothing but rounding in float32 was found."""
        return self.max_difference <= TOLERANCE and not self.n_flipped_decided

    @property
    def agrees(self) -> bool | None:
        """Whether the labels are those of the reference beyond rounding; None of lower precision, where not all are."""
        return not self.n_flipped_decided if self.precision == Precision.FLOAT32 else None

    @property
    def line(self) -> str:
        """The certificate in one line."""
        return (
            f"{self.n_voxels:,} voxels of {_boxes(self.n_boxes)} computed again by the reference: probabilities differ "
            f"by at most {self.max_difference:.2g}, {self.n_flipped:,} classes differ, {self.n_flipped_decided:,} of "
            "them beyond rounding"
        )


@dataclass(frozen=True, slots=True)
class ValueCertificate:
    """How far a prediction is from the reference, which sees a larger window.

    Attributes
    ----------
    engine, precision, n_boxes, n_voxels : as in Certificate
    max_difference : of the stored values, in the target's intensities, in two digits
    max_difference_std : the same in standard deviations of the target
    n_beyond_rounding : voxels where it is more than 1e-4 standard deviations, or 1e-4 of the value's distance from the
        mean, and one step of float32 at this value
    """

    engine: str
    precision: str
    n_boxes: int
    n_voxels: int
    max_difference: float
    max_difference_std: float
    n_beyond_rounding: int

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as a JSON object."""
        return asdict(self)

    @property
    def is_rounding(self) -> bool:
        """Whether nothing but rounding in float32 was found."""
        return not self.n_beyond_rounding

    @property
    def agrees(self) -> bool | None:
        """Whether the values are those of the reference; None of lower precision, where they are not."""
        return self.is_rounding if self.precision == Precision.FLOAT32 else None

    @property
    def line(self) -> str:
        """The certificate in one line."""
        return (
            f"{self.n_voxels:,} voxels of {_boxes(self.n_boxes)} computed again by the reference: values differ by at "
            f"most {self.max_difference:.2g}, {self.max_difference_std:.2g} standard deviations of the target, "
            f"{self.n_beyond_rounding:,} of them beyond rounding"
        )


def certificate_of(document: dict[str, Any]) -> Certificate | ValueCertificate:
    """Return the certificate that ``to_json`` wrote."""
    return ValueCertificate(**document) if "n_beyond_rounding" in document else Certificate(**document)


def _boxes(n: int) -> str:
    return f"{n} box" if n == 1 else f"{n} boxes"
