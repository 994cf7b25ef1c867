"""Augmentation: what may be done to a patch, and what one draw does to it; ``warp`` carries it out on the device.

A patch is resampled once. Each voxel of the output looks up one position of the source:

    source = centre + matrix (output - centre) + shift + elastic(output)

The draw comes before the read, so that a patch brings exactly what its own field looks up: a rotated patch has real
corners, mirrored ones only where they lie outside the scan, as at inference.

    |...|hhhh|cccccccc|hhhh|.....|    read for the field; by as much as it reaches, on each side
        |hhhh|cccccccc|hhhh|          what enters the network, looked up in it
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArgumentError

_SHARE_OF_SPACING = 0.2
_OVERSHOOT = 1.25  # a cubic convolution's weights add up to at most this along an axis, without their signs


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far patches are changed; each value is the largest, drawn evenly from none to that, in either direction.

    Lengths are in voxels of the finest axis, so that coarse axes are moved by as many micrometres as the others. Grey
    values are in the network's scale, after normalisation. Zeros change nothing.

    Attributes
    ----------
    flips : all right-angle turns and reflections that keep a patch's shape and voxel size; they do not resample
    warped_share : part of the patches that are resampled, by any of what follows; linear interpolation smooths the
        finest grain, which a network that only ever sees warped patches would not learn from
    rotation_degrees : in the plane of the last two axes, up to 180
    tilt_degrees : out of that plane, for volumes, up to 180
    shift_voxels : along every axis; a patch lies anywhere as it is, so this is for parts of voxels
    scale : objects are up to 1 + scale times larger or smaller
    shear : tangent of the angle between two axes and a right angle, below 1
    elastic_sigma_voxels : standard deviation of random displacements; the paper's is 10 (10.1007/978-3-319-24574-4_28)
    elastic_nodes : displacements along every axis of the coarse grid over a patch, cubic in between, 3 in the paper
    brightness : added to the grey values
    contrast : part by which the grey values are scaled
    gamma : the patch's range is bent by an exponent of up to 1 + gamma or down to 1 / (1 + gamma)
    noise : standard deviation of Gaussian noise
    blur_voxels : standard deviation of a Gaussian blur
    """

    flips: bool = True
    warped_share: float = 1.0
    rotation_degrees: float = 0.0
    tilt_degrees: float = 0.0
    shift_voxels: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    elastic_sigma_voxels: float = 0.0
    elastic_nodes: int = 3
    brightness: float = 0.1
    contrast: float = 0.1
    gamma: float = 0.0
    noise: float = 0.0
    blur_voxels: float = 0.0

    def __post_init__(self) -> None:
        most = {"rotation_degrees": 180.0, "tilt_degrees": 180.0, "shear": 1.0, "warped_share": 1.0, "contrast": 1.0}
        for field in fields(self):
            value, highest = getattr(self, field.name), most.get(field.name, float("inf"))
            if not 0 <= value <= highest or value == float("inf"):
                rule = f"from 0 to {highest:g}" if field.name in most else "at least 0"
                raise ArgumentError(f"{field.name} must be {rule}, got {value}; use 0 for none of it")
        if self.elastic_nodes < 2:
            raise ArgumentError(f"elastic_nodes must be at least 2, got {self.elastic_nodes}; use 3")

    @property
    def resamples(self) -> bool:
        """Whether patches are warped; turns alone only put voxels elsewhere."""
        return any((
            self.rotation_degrees, self.tilt_degrees, self.shift_voxels, self.scale, self.shear,
            self.elastic_sigma_voxels,
        ))  # fmt: skip

    def check(self, tile: tuple[int, ...], *, spacing: tuple[float, ...]) -> None:
        """Refuse what a patch of this shape cannot have: a tilt in 2-D, displacements that would fold it.

        Nodes must be five standard deviations apart: then about one voxel in a thousand lies in a fold, measured.
        """
        if self.tilt_degrees and len(tile) < 3:
            raise ArgumentError(
                f"tilt_degrees needs a 3-D network, got {self.tilt_degrees:g} for patches of {tile}; use "
                "rotation_degrees"
            )
        apart = min((n - 1) * s for n, s in zip(tile, spacing, strict=True)) / (self.elastic_nodes - 1)
        if self.elastic_sigma_voxels > (most := _SHARE_OF_SPACING * apart):
            raise ArgumentError(
                f"elastic_sigma_voxels must be at most {most:.1f}, a fifth of the distance of {self.elastic_nodes} "
                f"nodes on a patch of {tile}, or it folds; got {self.elastic_sigma_voxels:g}; lower it or enlarge patch"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """Where each voxel of a patch comes from; axes are the network's.

    Attributes
    ----------
    matrix : float64 (d, d), from distances to the centre in output voxels to such in source voxels
    shift : float64 (d,), source voxels
    nodes : float64 (d, *(k,) * d), displacements in source voxels at the nodes of a coarse grid, corner to corner over
        ``tile``; None bends nothing
    tile : shape of the patch that enters the network
    """

    matrix: NDArray[np.float64]
    shift: NDArray[np.float64]
    nodes: NDArray[np.float64] | None
    tile: tuple[int, ...]

    @classmethod
    def still(cls, tile: tuple[int, ...]) -> Field:
        """Return the field that shows each voxel where it is."""
        return cls(np.eye(len(tile)), np.zeros(len(tile)), None, tile)

    def stepped(self, steps: tuple[float, ...], rests: tuple[float, ...]) -> Field:
        """Return the field into an image of other voxels: ``steps`` of them per source voxel of this field.

        Parameters
        ----------
        rests : by how much the centre lies further, voxels of that image
        """
        step = np.array(steps)
        nodes = None if self.nodes is None else self.nodes * step.reshape(-1, *(1,) * len(step))
        return Field(self.matrix * step[:, None], self.shift * step + np.array(rests), nodes, self.tile)

    def margins(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Return how many voxels before and after a box of this shape, in the patch's centre, are looked up.

        Negative where a patch is enlarged so much that not all of the box is.
        """
        half = (np.array(shape) - 1) / 2
        reach = np.abs(self.matrix) @ half
        if self.nodes is not None:
            reach += np.abs(self.nodes).reshape(len(shape), -1).max(axis=1) * _OVERSHOOT ** len(shape)
        first, last = np.floor(half + self.shift - reach), np.ceil(self.shift - half + reach)
        return tuple((int(-a), int(b)) for a, b in zip(first, last, strict=True))

    def weights(self, axis: int, n: int) -> NDArray[np.float64]:
        """Return how much each node counts at each voxel of a box of length ``n`` in the patch's centre, (n, nodes)."""
        assert self.nodes is not None
        n_nodes, tile = self.nodes.shape[1 + axis], self.tile[axis]
        at = (np.arange(n) + (tile - n) / 2) * (n_nodes - 1) / max(tile - 1, 1)
        return cubic_weights(at, n_nodes)


@dataclass(frozen=True, slots=True)
class Grey:
    """What happens to the grey values of a patch: blurred, scaled, shifted, bent, made noisy.

    Attributes
    ----------
    blur : standard deviation along each axis, voxels
    noise : standard deviation; ``seed`` draws it
    """

    blur: tuple[float, ...] = ()
    gain: float = 1.0
    shift: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is done to a patch; no field: nothing is resampled."""

    field: Field | None
    grey: Grey


def draw_change(
    augmentation: Augmentation, tile: tuple[int, ...], *, spacing: tuple[float, ...], rng: np.random.Generator
) -> Change:
    """Return a random change of patches.

    Parameters
    ----------
    tile : shape of the patch along the network's axes
    spacing : distance of voxels along these axes, in voxels of the finest
    """
    warped = augmentation.resamples and rng.random() < augmentation.warped_share
    field = draw_field(augmentation, tile, spacing=spacing, rng=rng) if warped else None
    a, even = augmentation, rng.uniform
    grey = Grey(
        blur=tuple((even(0, a.blur_voxels) / np.array(spacing)).tolist()), gain=1 + even(-1, 1) * a.contrast,
        shift=even(-1, 1) * a.brightness, gamma=_factor(a.gamma, rng), noise=even(0, a.noise),
        seed=int(rng.integers(2**63)),
    )
    return Change(field, grey)


def draw_field(
    augmentation: Augmentation, tile: tuple[int, ...], *, spacing: tuple[float, ...], rng: np.random.Generator
) -> Field:
    """Return a random field; rotations are rotations in space, whatever the voxels' shape."""
    n, size = len(tile), np.array(spacing)
    physical = np.eye(n)
    for first, second in combinations(range(n), 2):
        within = (first, second) == (n - 2, n - 1)
        most = augmentation.rotation_degrees if within else augmentation.tilt_degrees
        physical = physical @ rotation(n, (first, second), degrees=most * rng.uniform(-1, 1))
        physical = physical @ _shear(n, (first, second), tangent=augmentation.shear * rng.uniform(-1, 1))
    physical /= _factor(augmentation.scale, rng)
    shift = augmentation.shift_voxels * rng.uniform(-1, 1, n) / size
    nodes = None
    if augmentation.elastic_sigma_voxels:
        nodes = rng.normal(0, augmentation.elastic_sigma_voxels, (n, *(augmentation.elastic_nodes,) * n))
        nodes /= size.reshape(-1, *(1,) * n)
    return Field(in_voxels(physical, spacing=spacing), shift, nodes, tile)


def in_voxels(physical: NDArray[np.float64], *, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Return a matrix between distances in space as one between distances in voxels; right angles stay exact."""
    size = np.array(spacing)
    matrix: NDArray[np.float64] = np.round(physical * size / size[:, None], 12)
    return matrix


def rotation(n: int, plane: tuple[int, int], *, degrees: float) -> NDArray[np.float64]:
    """Return the rotation matrix of ``n`` axes in one plane."""
    matrix, (a, b), angle = np.eye(n), plane, np.radians(degrees)
    matrix[[a, b], [a, b]] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def cubic_weights(at: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the weights of ``n`` nodes at positions from 0 to n - 1, (positions, n), that add up to one.

    Cubic convolution with a = -1/2, through the nodes (Keys 1981, doi:10.1109/TASSP.1981.1163711); the outermost nodes
    are repeated.
    """
    low = np.clip(np.floor(at), 0, n - 2).astype(np.intp)
    weights = np.zeros((len(at), n))
    for step in (-1, 0, 1, 2):
        far = np.abs(at - low - step)
        near = 1 + far**2 * (1.5 * far - 2.5)
        outer = 2 + far * (-4 + far * (2.5 - 0.5 * far))
        value = np.where(far <= 1, near, np.where(far < 2, outer, 0.0))
        np.add.at(weights, (np.arange(len(at)), np.clip(low + step, 0, n - 1)), value)
    return weights


def _shear(n: int, plane: tuple[int, int], *, tangent: float) -> NDArray[np.float64]:
    matrix = np.eye(n)
    matrix[plane] = tangent
    return matrix


def _factor(most: float, rng: np.random.Generator) -> float:
    """Return a factor from 1 / (1 + most) to 1 + most; one is as likely as its inverse."""
    return float(np.exp(np.log1p(most) * rng.uniform(-1, 1)))
