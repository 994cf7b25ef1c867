"""Changes of patches: drawn in ``augment``, carried out in ``warp``; SciPy and plain numpy are the oracles."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.errors import ArgumentError
from pipeline.unet.training import warp
from pipeline.unet.training.augment import (
    Augmentation,
    Field,
    Grey,
    cubic_weights,
    draw_change,
    draw_field,
    in_voxels,
    rotation,
)
from pipeline.unet.training.packed import Places, Row, Shades
from pipeline.unet.training.patches import IGNORED, Patch
from pipeline.unet.training.warp import Ragged, batch_of

ALL = Augmentation(
    rotation_degrees=180, tilt_degrees=40, shift_voxels=3, scale=0.4, shear=0.3, elastic_sigma_voxels=1.5,
    gamma=0.5, noise=0.1, blur_voxels=1.0,
)  # fmt: skip
STILL = Augmentation(brightness=0, contrast=0)


def keys(x):
    """Return the kernel of cubic convolution with a = -1/2, as its author wrote it down."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def sources_of(field, shape):
    """Return where each voxel comes from, counted from the box's centre, voxel by voxel."""
    out = np.zeros((len(shape), *shape))
    half = (np.array(shape) - 1) / 2
    for at in np.ndindex(*shape):
        offset = np.array(at) - half
        where = field.matrix @ offset + field.shift
        if field.nodes is not None:
            k = field.nodes.shape[1]
            on_grid = (offset + (np.array(field.tile) - 1) / 2) * (k - 1) / (np.array(field.tile) - 1)
            low = [min(int(u), k - 2) for u in on_grid]
            for step in np.ndindex(*(4,) * len(shape)):
                node = [a + s - 1 for a, s in zip(low, step, strict=True)]
                weight = np.prod([keys(u - i) for u, i in zip(on_grid, node, strict=True)])
                where = where + weight * field.nodes[(slice(None), *(min(max(i, 0), k - 1) for i in node))]
        out[(slice(None), *at)] = where
    return out


def positions(field, shape):
    return warp.positions(Places.of([field], shape))[0]


def linear(x, at):
    return warp.linear(Ragged.of(Row.of([x.numpy()])), at[None])[0]


def nearest(y, at):
    return warp.nearest(Ragged.of(Row.of([y[None].numpy()])), at[None])[0]


def shaded(x, grey):
    return warp.shaded(x[None], Shades.of([grey], x.shape[1:]))[0]


def wide(field, shape, rng):
    """Return random voxels over what a field asks for, and their positions as SciPy wants them."""
    margins = field.margins(shape)
    array = rng.normal(size=tuple(a + n + b for n, (a, b) in zip(shape, margins, strict=True)))
    first = np.array([a + (n - 1) / 2 for n, (a, _) in zip(shape, margins, strict=True)])
    return array, sources_of(field, shape) + first.reshape(-1, *(1,) * len(shape))


def still(n):
    return Field(np.eye(n), np.zeros(n), None, (0,) * n)


@pytest.mark.parametrize(("tile", "spacing"), [((13, 16), (1, 1)), ((9, 12), (1, 2.5)), ((7, 8, 9), (4, 1, 1))])
@pytest.mark.parametrize("seed", range(3))
def test_the_warp_is_scipys(tile, spacing, seed):
    rng = np.random.default_rng(seed)
    field = draw_field(replace(ALL, elastic_sigma_voxels=0.8), tile, spacing=spacing, rng=rng)
    for shape in (tile, tuple(n - 4 for n in tile)):  # what enters the network, and its core
        array, where = wide(field, shape, rng)
        at = positions(field, shape)
        assert np.allclose(at, where, atol=1e-4)
        assert where.min() >= 0
        assert (where <= np.array(array.shape).reshape(-1, *(1,) * len(shape)) - 1).all()  # nothing is mirrored
        x = torch.from_numpy(array.astype(np.float32))[None]
        assert np.allclose(linear(x, at)[0], ndimage.map_coordinates(array, where, order=1), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple), st.integers(0, 2**32 - 1))
def test_outside_is_mirrored_as_scipy_mirrors(shape, seed):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=shape)
    at = rng.uniform(-20, 20, (len(shape), 5, 4)).astype(np.float32)
    padded = np.pad(array, [(24 * (n > 1), 24 * (n > 1)) for n in shape], mode="reflect")
    inner = at.astype(np.float64) + np.array([24 * (n > 1) for n in shape]).reshape(-1, 1, 1)
    inner[np.array(shape) == 1] = 0
    got = linear(torch.from_numpy(array.astype(np.float32))[None], torch.from_numpy(at))[0]
    assert np.allclose(got, ndimage.map_coordinates(padded, inner, order=1), atol=1e-4)
    if min(shape) > 1:
        assert np.allclose(got, ndimage.map_coordinates(array, at, order=1, mode="mirror"), atol=1e-4)
        labels = rng.integers(0, 9, shape)
        near = nearest(torch.from_numpy(labels), torch.from_numpy(at))
        clear = (np.abs(at - np.round(at)) < 0.49).all(axis=0)
        expected = ndimage.map_coordinates(labels, at, order=0, mode="mirror")
        assert np.array_equal(near.numpy()[clear], expected[clear])


@pytest.mark.parametrize("shape", [(1, 7), (8, 5), (3, 4, 6)])
def test_no_change_is_the_identity_bit_by_bit(shape):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2, *shape)).astype(np.float32))
    field = draw_field(STILL, shape, spacing=(1,) * len(shape), rng=rng)
    assert field.margins(shape) == ((0, 0),) * len(shape)
    assert torch.equal(linear(x, positions(field, shape)), x)
    assert torch.equal(nearest(x[0], positions(field, shape)), x[0])
    change = draw_change(STILL, shape, spacing=(1,) * len(shape), rng=rng)
    assert change.field is None
    assert torch.equal(shaded(x, change.grey), x)


@pytest.mark.parametrize("n_turns", range(-2, 3))
@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (3, 6, 6)])
def test_right_angles_are_numpys_bit_by_bit(n_turns, shape):
    n = len(shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    physical = rotation(n, (n - 2, n - 1), degrees=90.0 * n_turns)
    field = Field(in_voxels(physical, spacing=(1.0,) * n), np.zeros(n), None, shape)
    assert field.margins(shape) == ((0, 0),) * n
    got = linear(torch.from_numpy(x)[None], positions(field, shape))[0].numpy()
    assert np.array_equal(got, np.rot90(x, -n_turns, axes=(n - 2, n - 1)))


@pytest.mark.parametrize("axis", range(3))
def test_reflections_and_whole_shifts_are_numpys_bit_by_bit(axis):
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    matrix, shift = np.eye(3), np.zeros(3)
    matrix[axis, axis] = -1
    field = Field(matrix, shift, None, x.shape)
    assert np.array_equal(linear(torch.from_numpy(x)[None], positions(field, x.shape))[0], np.flip(x, axis))
    shift[axis] = 1
    moved = Field(np.eye(3), shift, None, x.shape)
    assert moved.margins(x.shape)[axis] == (-1, 1)
    longer = np.concatenate([x.take([0], axis) * 0, x], axis).take(range(1, x.shape[axis] + 1), axis)
    assert np.array_equal(linear(torch.from_numpy(longer)[None], positions(moved, x.shape))[0], x)


def test_circles_stay_circles_whatever_the_voxels_shape():
    # voxels of 4 x 1 x 1: a ball of radius 12 micrometres, turned by a right angle about y, is the same ball
    spacing, shape = (4.0, 1.0, 1.0), (13, 31, 31)
    field = Field(in_voxels(rotation(3, (0, 2), degrees=90), spacing=spacing), np.zeros(3), None, shape)

    def ball(n):
        grid = np.meshgrid(*((np.arange(k) - (k - 1) / 2) * s for k, s in zip(n, spacing, strict=True)), indexing="ij")
        return np.sqrt(sum(each**2 for each in grid))

    radius = ball(tuple(a + n + b for n, (a, b) in zip(shape, field.margins(shape), strict=True)))
    got = linear(torch.from_numpy(radius.astype(np.float32))[None], positions(field, shape))[0].numpy()
    inner = ball(shape) < 24
    assert np.abs(got - ball(shape))[inner].max() < 2  # the error of linear interpolation over 4 micrometres
    about_z = Field(in_voxels(rotation(3, (1, 2), degrees=90), spacing=spacing), np.zeros(3), None, shape)
    x = torch.from_numpy(ball(shape).astype(np.float32))[None]
    assert torch.equal(linear(x, positions(about_z, shape)), x)


@pytest.mark.parametrize("shape", [(40, 44), (24, 28, 28)])
@pytest.mark.parametrize("seed", range(4))
def test_a_bright_blob_and_its_label_stay_together(shape, seed):
    n, rng = len(shape), np.random.default_rng(seed)
    augmentation = replace(ALL, rotation_degrees=30, tilt_degrees=20, noise=0, elastic_sigma_voxels=1.0)
    change = draw_change(augmentation, shape, spacing=(1.0,) * n, rng=rng)
    margins = change.field.margins(shape)
    grid = np.meshgrid(
        *(np.arange(-a, k + b) - (k - 1) / 2 for k, (a, b) in zip(shape, margins, strict=True)), indexing="ij"
    )
    blob = sum((g - rng.uniform(-4, 4)) ** 2 for g in grid) < 4.5**2
    patch = Patch(
        blob[None].astype(np.float32), blob.astype(np.int64) * 3, blob.astype(np.float32), shape, shape, change
    )
    batch = batch_of([patch], device="cpu")
    image, labels = batch.images[0, 0].double().numpy(), batch.classes[0].numpy()
    assert set(np.unique(labels)) == {0, 3}
    bright = ndimage.center_of_mass(image - image.min())
    assert np.abs(np.subtract(bright, ndimage.center_of_mass(labels))).max() < 0.5
    marked = ndimage.center_of_mass(batch.borders[0].double().numpy())
    assert np.abs(np.subtract(marked, ndimage.center_of_mass(labels))).max() < 0.5


def test_labels_stay_in_the_set_of_labels():
    rng = np.random.default_rng(0)
    for seed in range(10):
        change = draw_change(ALL, (12, 12), spacing=(1, 1), rng=np.random.default_rng(seed))
        shape = tuple(a + 12 + b for a, b in change.field.margins((12, 12)))
        labels = rng.choice([IGNORED, 0, 2, 7], shape)
        patch = Patch(rng.normal(size=(1, *shape)).astype(np.float32), labels, None, (12, 12), (12, 12), change)
        got = batch_of([patch], device="cpu").classes
        assert got.dtype == torch.int64
        assert set(got.unique().tolist()) <= {IGNORED, 0, 2, 7}


def test_the_same_seed_draws_the_same_change():
    x = torch.randn(1, 20, 20)
    changes = [draw_change(ALL, (16, 16), spacing=(1, 1), rng=np.random.default_rng(s)) for s in (1, 1, 2)]
    first, again, other = (linear(shaded(x, c.grey), positions(c.field, (16, 16))) for c in changes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_displacements_have_the_deviation_that_was_asked_for_in_finest_voxels():
    rng, elastic = np.random.default_rng(0), replace(STILL, elastic_sigma_voxels=10)
    nodes = [draw_field(elastic, (300, 300), spacing=(2.0, 1.0), rng=rng).nodes for _ in range(400)]
    assert nodes[0].shape == (2, 3, 3)
    assert np.std(nodes, axis=(0, 2, 3)) == pytest.approx([5, 10], rel=0.05)
    field = Field(np.eye(2), np.zeros(2), nodes[0], (9, 9))
    flat = positions(replace(field, nodes=None), (9, 9)).numpy()
    first = np.array([a for a, _ in field.margins((9, 9))]).reshape(2, 1, 1)
    bent = positions(field, (9, 9)).numpy() - first - flat
    assert np.allclose(bent[:, ::4, ::4], nodes[0], atol=1e-4)  # at the nodes, corner to corner


def test_cubic_weights_go_through_the_nodes_and_add_up_to_one():
    assert np.array_equal(cubic_weights(np.arange(4.0), 4), np.eye(4))
    fine = cubic_weights(np.linspace(0, 3, 50), 4)
    assert np.allclose(fine.sum(axis=1), 1)
    assert np.allclose((fine @ np.arange(4))[17:33], np.linspace(0, 3, 50)[17:33])  # straight between inner nodes
    assert np.abs(fine).sum(axis=1).max() <= 1.25


@pytest.mark.parametrize("shape", [(12, 13), (7, 8, 9)])
def test_the_blur_is_scipys(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape))
    sigma = tuple(0.7 + 0.4 * axis for axis in range(len(shape)))
    got = shaded(torch.from_numpy(x), Grey(blur=sigma))
    radius = [int(np.ceil(4 * s)) for s in sigma]
    expected = [ndimage.gaussian_filter(each, sigma, mode="mirror", radius=radius) for each in x]
    assert np.allclose(got, expected, atol=1e-6)


def test_grey_values_are_scaled_shifted_bent_and_made_noisy():
    x = torch.randn(1, 200, 200, dtype=torch.float64)
    assert torch.allclose(shaded(x, Grey(gain=1.2, shift=-0.3)), 1.2 * x - 0.3)
    bent = shaded(x, Grey(gamma=2.0))
    assert (bent.amin(), bent.amax()) == (pytest.approx(float(x.amin())), pytest.approx(float(x.amax())))
    inside = (x - x.amin()) / (x.amax() - x.amin())
    assert torch.allclose((bent - x.amin()) / (x.amax() - x.amin()), inside**2)
    noise = (shaded(x, Grey(noise=0.5, seed=3)) - x).numpy()
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(0.5, rel=0.02))
    assert torch.equal(shaded(x * 0, Grey(gamma=2.0)), x * 0)  # a patch of one grey value stays it


def test_nothing_is_drawn_beyond_its_setting():
    rng = np.random.default_rng(0)
    greys = [draw_change(ALL, (8, 8), spacing=(2, 1), rng=rng).grey for _ in range(500)]
    assert 0.9 <= min(g.gain for g in greys) < 0.92
    assert 1.08 < max(g.gain for g in greys) <= 1.1
    assert max(abs(g.shift) for g in greys) <= 0.1
    assert 1 / 1.5 <= min(g.gamma for g in greys) < 0.7
    assert 1.45 < max(g.gamma for g in greys) <= 1.5
    assert np.mean([g.gamma > 1 for g in greys]) == pytest.approx(0.5, abs=0.1)
    assert 0.095 < max(g.noise for g in greys) <= 0.1
    assert max(g.blur[1] for g in greys) <= 1
    assert all(g.blur[0] == g.blur[1] / 2 for g in greys)
    drawn = (draw_field(replace(STILL, scale=0.4), (8, 8), spacing=(2, 1), rng=rng) for _ in range(500))
    scales = [np.linalg.det(field.matrix) for field in drawn]
    assert 1 / 1.4**2 <= min(scales) < 0.55
    assert 1.85 < max(scales) <= 1.4**2 + 1e-9


@pytest.mark.parametrize("field", fields(Augmentation), ids=lambda field: field.name)
def test_settings_without_sense_are_refused(field):
    if field.name != "flips":
        with pytest.raises(ArgumentError, match=f"{field.name} must be .*, got -1"):
            Augmentation(**{field.name: -1})
        with pytest.raises(ArgumentError, match=f"{field.name} must be .*, got inf"):
            Augmentation(**{field.name: float("inf")})


def test_a_tilt_of_slides_is_refused():
    Augmentation(tilt_degrees=10).check((32, 32, 32), spacing=(1, 1, 1))
    with pytest.raises(ArgumentError, match=r"tilt_degrees needs a 3-D network, got 10 .* use rotation_degrees"):
        Augmentation(tilt_degrees=10).check((32, 32), spacing=(1, 1))


def test_displacements_below_the_limit_hardly_ever_fold():
    rng, folded = np.random.default_rng(0), []
    elastic = Augmentation(elastic_sigma_voxels=6.2)
    elastic.check((63, 63), spacing=(1, 1))
    for _ in range(200):
        at = positions(draw_field(elastic, (63, 63), spacing=(1, 1), rng=rng), (63, 63)).numpy()
        (a, b), (c, d) = (np.gradient(each) for each in at)
        folded.append((a * d - b * c <= 0).mean())
    assert np.mean(folded) < 0.01


def test_displacements_that_fold_a_patch_are_refused():
    Augmentation(elastic_sigma_voxels=10).check((128, 128), spacing=(1, 1))
    with pytest.raises(ArgumentError, match=r"elastic_sigma_voxels must be at most 4.7, .*got 10; lower it or enlarge"):
        Augmentation(elastic_sigma_voxels=10).check((48, 48, 48), spacing=(1, 1, 1))
    with pytest.raises(ArgumentError, match="elastic_nodes must be at least 2, got 1"):
        Augmentation(elastic_nodes=1)
