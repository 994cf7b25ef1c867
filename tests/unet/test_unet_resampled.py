"""A network sees one voxel size, whatever the images have, by the one resampling that augments them too."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from test_unet_predict import trained

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.unet.settings import Padding, UNetSettings
from pipeline.unet.training.augment import Augmentation, Change, Field, Grey
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.patches import IGNORED, Patches, Source
from pipeline.unet.training.resampled import about_as_large, checked_size, nearest, placed, seen_region, steps_between
from pipeline.unet.training.validation import validate
from pipeline.unet.training.warp import batch_of

STILL = Augmentation(brightness=0, contrast=0)
WARPED = Augmentation(brightness=0, contrast=0, rotation_degrees=180, scale=0.3, shear=0.2, elastic_sigma_voxels=0.5)
SEEN = (24, 30)


def scene(shape):
    """Return a smooth image of a scene and the labels in it, (1, *shape) and (*shape), whatever the voxels' number.

    Its slope is zero at the edges, so that mirrored context is alike for voxels of every size.
    """
    at = [(np.arange(n) + 0.5) / n for n in shape]
    waves = [np.cos(np.pi * k * x) for k, x in zip((2, 3, 1), at, strict=False)]
    image = np.add.reduce(np.meshgrid(*waves, indexing="ij"))
    return image[None], (image > 0).astype(np.uint8) * 10


def source_of(shape, steps=(), **about):
    image, labels = scene(shape)
    return Source(image, labels, ((0.0, 1.0),), about.get("region") or Box.whole(shape), steps=steps)


def patches_of(*sources, core=(8, 8), halo=(3, 3), change=STILL, n_axes=None, values=(0, 10)):
    turns = orientations(core, halo=halo, voxel_size_um=None)
    return Patches(sources, core, halo, values, n_axes or len(core), turns, change)


def seen(*patches):
    batch = batch_of(list(patches), device="cpu")
    return batch.images.numpy(), batch.classes.numpy()


@pytest.mark.parametrize("change", [STILL, WARPED], ids=["still", "warped"])
@pytest.mark.parametrize(("steps", "most"), [((2.0, 3.0), 0.1), ((1.5, 2.5), 0.1), ((0.5, 0.5), 0.2)])
def test_an_object_at_two_voxel_sizes_gives_the_same_patches(steps, most, change):
    other = tuple(round(n * step) for n, step in zip(SEEN, steps, strict=True))
    as_it_is, resampled = patches_of(source_of(SEEN), change=change), patches_of(source_of(other, steps), change=change)
    assert resampled.sources[0].seen == Box.whole(SEEN)
    n_different = 0
    for seed in range(25):
        (x,), (y,) = seen(as_it_is.draw(np.random.default_rng(seed)))
        (again,), (labels,) = seen(resampled.draw(np.random.default_rng(seed)))
        difference, inner = np.abs(x - again)[0], (slice(3, -3),) * 2  # of 4 from trough to crest
        assert difference[inner][(y != IGNORED) & (labels != IGNORED)].max() < most
        assert difference.max() < 0.4  # mirrored at the centre of an edge voxel, which is not as large
        n_different += (y != labels).sum()
        assert set(np.unique(labels)) <= {IGNORED, 0, 1}
    assert n_different < 0.06 * 25 * y.size


@pytest.mark.parametrize("change", [STILL, WARPED], ids=["still", "warped"])
def test_a_step_of_one_shows_the_same_bits(change):
    plain, rng = source_of((19, 23)), np.random.default_rng(0)
    image, labels = rng.normal(size=(1, 19, 23)), rng.choice([0, 10], (19, 23))
    plain = replace(plain, image=image, labels=labels, borders=rng.random((19, 23)), region=Box((2, 3), (17, 20)))
    stepped = replace(plain, steps=(1.0, 1.0))
    assert stepped.seen == plain.region
    for seed in range(20):
        drawn = [patches_of(each, change=change).draw(np.random.default_rng(seed)) for each in (plain, stepped)]
        one, other = (batch_of([patch], device="cpu") for patch in drawn)
        for name in ("images", "classes", "borders"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_sizes_that_agree_take_no_steps():
    assert steps_between((0.5, 0.25), (0.5, 0.25)) == ()
    assert steps_between((0.499, 0.2502), (0.5, 0.25)) == ()
    assert steps_between((0.5, 0.25), (0.5, 0.5)) == (1.0, 2.0)
    assert about_as_large((0.5, 0.5), (0.75, 0.34))
    assert not about_as_large((0.5, 0.5), (0.5, 0.33))
    with pytest.raises(ArgumentError, match="two or three lengths above 0"):
        checked_size((0.5, float("inf")))


@pytest.mark.parametrize("steps", [(1.37, 0.61), (3.3, 2.0), (0.43, 1.0)])
def test_labels_are_those_of_the_nearest_voxel_and_stay_in_their_set(steps):
    rng = np.random.default_rng(0)
    labels = rng.choice([3, 90, 200], (31, 37))
    source = Source(labels[None], labels, ((0.0, 1.0),), Box((4, 6), (27, 33)), steps=steps)
    patches = patches_of(source, values=(3, 90, 200))
    at = [np.floor((np.arange(n) + 0.5) * step) for n, step in zip((200, 200), steps, strict=True)]
    for seed in range(20):
        core = patches.place(source, np.random.default_rng(seed))
        (x,), (y,) = seen(patches.at(source, core))
        rows, columns = (a[b].astype(int) for a, b in zip(at, core.slices, strict=True))
        inside = np.outer((rows >= 4) & (rows < 27), (columns >= 6) & (columns < 33))
        near = labels[np.ix_(rows.clip(0, 30), columns.clip(0, 36))]
        assert np.array_equal(y, np.where(inside, np.searchsorted((3, 90, 200), near), IGNORED))
        tile = core.grow((3, 3))
        exact = [(np.arange(a, b) + 0.5) * s - 0.5 for a, b, s in zip(tile.start, tile.stop, steps, strict=True)]
        grid = np.stack(np.meshgrid(*exact, indexing="ij"))
        expected = ndimage.map_coordinates(labels.astype(float), grid, order=1, mode="mirror")
        assert np.allclose(x[0], expected, atol=1e-3)
    assert {IGNORED, 0, 1, 2} >= set(np.unique(y))


@given(st.data())
def test_regions_that_touch_share_no_voxel_and_leave_none_out(data):
    step = data.draw(st.floats(0.2, 6))
    n = data.draw(st.integers(20, 60))
    cut = data.draw(st.integers(8, n - 8))
    learnt, held, whole = (seen_region(Box((a,), (b,)), (step,)) for a, b in ((0, cut), (cut, n), (0, n)))
    assert (learnt.start, learnt.stop, held.stop) == (whole.start, held.start, whole.stop)
    assert nearest(learnt.start[0], learnt.stop[0], step).max() <= cut
    assert nearest(held.start[0], held.stop[0], step)[:-1].min(initial=n) >= cut - 1
    assert abs(whole.shape[0] * step - n) <= step


@given(st.integers(-50, 50), st.integers(1, 40), st.floats(0.2, 6))
def test_a_box_lies_about_where_it_is_seen(start, n, step):
    box, (rest,) = placed(Box((start,), (start + n,)), (step,))
    assert box.shape == (n,)
    middle = (start + n / 2) * step
    assert abs(box.start[0] + n / 2 + rest - middle) < 1e-9 * max(1, abs(middle))
    assert -0.5 <= rest <= 0.5


@pytest.mark.parametrize("core", [(16, 16, 16), (1, 16, 16)], ids=["3-D", "slices"])
def test_a_marker_is_found_where_it_lies(core):
    steps, n_axes = (1.0 if core[0] == 1 else 0.5, 2.5, 2.0), sum(n > 1 for n in core)
    shape, low, high = (12, 60, 48), (4, 25, 20), (8, 35, 28)
    image, labels = np.zeros((1, *shape)), np.zeros(shape, np.uint8)
    marker = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    image[(0, *marker)], labels[marker] = 1, 10
    source = Source(image, labels, ((0.0, 1.0),), Box.whole(shape), steps=steps)
    change = replace(WARPED, scale=0.1, elastic_sigma_voxels=0)
    patches = patches_of(source, core=core, halo=(0, 0, 0), n_axes=n_axes, change=change)
    middle = np.array([(a + b) / 2 / step - 0.5 for a, b, step in zip(low, high, steps, strict=True)])
    place = Box(tuple(int(m) - n // 2 for m, n in zip(middle, core, strict=True)),
                tuple(int(m) - n // 2 + n for m, n in zip(middle, core, strict=True)))  # fmt: skip
    (x,), (y,) = seen(patches.at(source, place))
    found = [ndimage.center_of_mass(each)[-n_axes:] for each in (x[0], y)]
    assert np.allclose(found, (middle - place.start)[-n_axes:], atol=0.3)
    assert (y == 1).sum() == pytest.approx(np.prod((np.array(high) - low)[-n_axes:] / steps[-n_axes:]), rel=0.35)
    patches, n_seen = patches.with_foreground(1.0), 0
    for seed in range(20):
        (x,), (y,) = seen(patches.draw(np.random.default_rng(seed)))
        about = ndimage.binary_dilation(y == 1, iterations=1)
        assert (x[0][y == 1] > 0.2).all()
        assert (x[0][~about & (y != IGNORED)] < 0.8).all()
        n_seen += (y == 1).any()
    assert n_seen == 20


def test_a_stepped_field_is_one_field_after_the_other():
    rng = np.random.default_rng(0)
    field = Field(rng.normal(size=(2, 2)), rng.normal(size=2), rng.normal(size=(2, 3, 3)), (8, 8))
    stepped = field.stepped((2.0, 0.5), (0.25, -0.25))
    offset = rng.normal(size=2)
    seen_at = field.matrix @ offset + field.shift + field.nodes[:, 1, 1]
    there = stepped.matrix @ offset + stepped.shift + stepped.nodes[:, 1, 1]
    assert np.allclose(there, seen_at * (2.0, 0.5) + (0.25, -0.25))
    assert np.array_equal(Field.still((8, 8)).matrix, np.eye(2))


def test_what_is_asked_of_grey_values_is_done_where_voxels_are_resampled_too():
    source = source_of((48, 60), (2.0, 2.0))
    patches, core = patches_of(source), Box((4, 5), (12, 13))
    still = Change(None, Grey(gain=2.0, shift=1.0))
    turn = patches.turns[0]
    (plain,), _ = seen(patches.changed(source, core, turn=turn))
    (brighter,), _ = seen(patches.changed(source, core, turn=turn, change=still))
    assert np.allclose(brighter, plain * 2 + 1, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_validation_is_that_of_the_image_resampled_as_a_whole(dims):
    steps, shape, rng = (2.5, 1.6, 0.5)[:dims], (90, 64, 20)[:dims], np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.normal(size=shape), 2) * 6
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    source = Source(image[None], labels, ((0.0, 1.0),), Box.whole(shape), steps=steps)
    at = [(np.arange(n) + 0.5) * step - 0.5 for n, step in zip(source.seen.shape, steps, strict=True)]
    whole = ndimage.map_coordinates(image, np.meshgrid(*at, indexing="ij"), order=1, mode="mirror")
    near = labels[np.ix_(*((a + 0.5).astype(int) for a in at))]
    inner = Box((12,) * dims, tuple(n - 12 for n in whole.shape))  # what is mirrored differs by less than a voxel
    by_hand = Source(whole[None], near, ((0.0, 1.0),), inner)
    region = Box(*(tuple(int((a + 0.5) * s) for a, s in zip(ends, steps, strict=True))
                   for ends in (inner.start, inner.stop)))  # fmt: skip
    net = trained(UNetSettings(dims=dims, n_classes=3, width=2, depth=1, padding=Padding.SAME, n_convs=1), seed=1)
    found = [
        validate(
            net, patches_of(each, core=(8,) * dims, halo=(0,) * dims, values=(0, 1, 2)), objective=Objective(),
            device="cpu", step=1, train_loss=0.0,
        )
        for each in (replace(source, region=region), by_hand)
    ]  # fmt: skip
    assert replace(source, region=region).seen == inner
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4)
    assert found[0].dice == pytest.approx(found[1].dice, abs=2e-3)
