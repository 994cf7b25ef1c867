"""How far networks see along one axis, and which sizes they take there, in closed form: plain integers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

FCN_BOTTOM = 3


@dataclass(frozen=True, slots=True)
class Line:
    """One axis of a network.

    Attributes
    ----------
    radii : voxels that the convolutions of each level and path reach to each side, finest level first
    factors : by which each pooling divides the resolution, one less
    valid : convolutions drop the border, where the others see zeros past it
    fcn : scores are interpolated, there is no expanding path
    """

    radii: tuple[int, ...]
    factors: tuple[int, ...]
    valid: bool
    fcn: bool

    @property
    def stride(self) -> int:
        """Total downsampling, in voxels."""
        return prod(self.factors)

    @property
    def loss(self) -> int:
        """Voxels that the output is smaller than the input on each side."""
        return self._way_down() + self.radii[-1] * self.stride + self._way_down() if self.valid else 0

    def legal_size(self, size: int) -> int:
        """Return the smallest size of at least ``size`` voxels that every pooling divides and that leaves an output."""
        if not self.valid:
            return max(1, -(-size // self.stride)) * self.stride
        phase = 2 * self._way_down() % self.stride
        least = max(size, 2 * self.loss + 1)
        return least + (phase - least) % self.stride

    def rule(self) -> tuple[int, int, int]:
        """Return stride, halo and trim of tiles.

        A valid network of one radius loses ``radius * (3 * stride - 2)`` voxels on each side; tiles that are whole
        cores apart are legal only with a trim of what it loses before the coarsest level, up to half the stride.
        Networks that keep their size have their reach as halo, rounded up to the stride so that the tile, too, starts
        on a multiple of it.
        """
        if self.valid:
            trim = -self._way_down() % max(1, self.stride // 2)
            return self.stride, self.loss + trim, trim
        reach = self._fcn_reach() if self.fcn else self._u_shaped_reach()
        halo = -(-reach // self.stride) * self.stride
        return self.stride, halo, halo

    def _way_down(self) -> int:
        """Return the voxels that the levels above the coarsest one reach to each side, each once."""
        scales = accumulate(self.factors, mul, initial=1)
        return sum(radius * scale for radius, scale in zip(self.radii[:-1], scales, strict=False))

    def _u_shaped_reach(self) -> int:
        """Return how far to the left of an aligned core a U-Net's outputs in it depend on the input.

        Residuals and gates see no further than the convolutions beside them. Of the paths through a nested U-Net the
        one over the coarsest level, which is the U-Net's, sees furthest.
        """
        left = [-self.radii[0]]
        for factor, radius in zip(self.factors, self.radii[1:], strict=True):
            left.append(left[-1] // factor - radius)
        deepest = left.pop()
        for radius, factor in zip(self.radii[-2::-1], self.factors[::-1], strict=True):
            deepest = min(factor * deepest, left.pop()) - radius
        return -deepest

    def _fcn_reach(self) -> int:
        """Return the same where scores of the last poolings are interpolated and added."""
        scores = [_interpolated(0, prod(self.factors[:-2]))]
        for factor in self.factors[:-3:-1]:
            scores.append(_interpolated(scores[-1], factor))
        deepest = scores.pop() - FCN_BOTTOM
        for radius, factor in zip(self.radii[-2::-1], self.factors[::-1], strict=True):
            deepest = min(factor * deepest - radius, scores.pop() if scores else 0)
        return -deepest


def _interpolated(left: int, factor: int) -> int:
    """Return the first of the two coarse voxels between which the fine one at ``left`` is interpolated."""
    return left if factor == 1 else (left - factor // 2) // factor
