import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.training.augment import Augmentation, draw_change
from pipeline.unet.training.orientation import Orientation, orientations
from pipeline.unet.training.patches import IGNORED, Patches, Source
from pipeline.unet.training.warp import batch_of

STILL = Augmentation(brightness=0, contrast=0)
ALL_2D = orientations((4, 4), halo=(0, 0), voxel_size_um=None)
ALL_3D = orientations((4, 4, 4), halo=(0, 0, 0), voxel_size_um=None)


def marked(shape, *, region=None) -> Source:
    """Return a source whose labels are a function of the intensities, one value per voxel."""
    image = np.arange(np.prod(shape), dtype=np.int32).reshape(1, *shape)
    labels = image[0] % 7 * 10
    return Source(image, labels, ((2.0, 0.5),), region or Box.whole(shape))


def patches_of(source, *, core, halo, n_axes=None, change=STILL, turns=None) -> Patches:
    turns = turns or orientations(core, halo=halo, voxel_size_um=None)
    return Patches((source,), core, halo, tuple(range(0, 70, 10)), n_axes or len(core), turns, change)


def seen(patches):
    """Return image and classes of patches as the network sees them."""
    batch = batch_of(patches, device="cpu")
    return batch.images.numpy(), batch.classes.numpy()


def centre(x, halo):
    return x[(..., *(slice(h, n - h) for h, n in zip(halo, x.shape[-len(halo) :], strict=True)))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple), st.integers(1, 6), st.integers(0, 9),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_image_and_labels_move_together(shape, core, halo, seed):
    patches = patches_of(marked(shape), core=(core,) * len(shape), halo=(halo,) * len(shape))
    (x,), (y,) = seen([patches.draw(np.random.default_rng(seed))])
    assert x.dtype == np.float32
    assert x.shape == (1, *(core + 2 * halo,) * len(shape))
    intensities = centre(x, patches.halo)[0] / 0.5 + 2
    assert (y != IGNORED).any()
    assert np.array_equal(intensities[y != IGNORED] % 7, y[y != IGNORED])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_context_is_what_inference_would_read(data):
    source = marked((9, 11))
    core = Box(*((data.draw(st.integers(-3, 8)), data.draw(st.integers(-3, 8))),) * 2)
    core = Box(core.start, tuple(a + 4 for a in core.start))
    x = patches_of(source, core=(4, 4), halo=(5, 3)).at(source, core).image
    assert np.array_equal(x / 0.5 + 2, read_mirrored(source.image, core.grow((5, 3))))


def test_labels_outside_the_region_are_ignored_and_all_inside_can_be_drawn():
    region = Box((2, 3), (7, 10))
    source = marked((9, 12), region=region)
    patches = patches_of(source, core=(3, 3), halo=(1, 1))
    rng, drawn = np.random.default_rng(0), set()
    for _ in range(300):
        core = patches.place(source, rng)
        patch = patches.at(source, core)
        assert (patch.classes != IGNORED).all()
        drawn |= set((centre(patch.image, (1, 1))[0] / 0.5 + 2).ravel().astype(int).tolist())
    inside = {r * 12 + c for r in range(2, 7) for c in range(3, 10)}
    assert drawn == inside


def test_a_region_smaller_than_the_core_is_held_by_it():
    source = marked((3, 20), region=Box((2, 5), (3, 9)))
    patches = patches_of(source, core=(4, 4), halo=(0, 0))
    rng, rows = np.random.default_rng(0), set()
    for _ in range(100):
        core = patches.place(source, rng)
        assert core.start[0] <= 2 < core.stop[0]
        rows.add(core.start[0])
        assert (patches.at(source, core).classes != IGNORED).sum() in {4, 3, 2, 1}
    assert rows == {-1, 0, 1, 2}


def test_slices_of_a_volume_are_seen_without_the_axis_across():
    source = marked((5, 8, 8))
    patches = patches_of(source, core=(1, 4, 4), halo=(0, 2, 2), n_axes=2)
    x, y = seen(patches.batch(6, np.random.default_rng(0)))
    assert x.shape == (6, 1, 8, 8)
    assert y.shape == (6, 4, 4)
    assert np.array_equal((centre(x, (2, 2))[:, 0] / 0.5 + 2) % 7, y)
    assert len({int(each.min()) // 64 for each in x / 0.5 + 2}) > 1  # of several slices


def test_larger_images_are_drawn_from_in_proportion():
    small, large = marked((10, 10)), marked((30, 30))
    shifted = Source(large.image + 7000, large.labels, large.windows, large.region)
    patches = replace(patches_of(small, core=(2, 2), halo=(0, 0)), sources=(small, shifted))
    rng = np.random.default_rng(0)
    share = np.mean([patches.draw(rng).image.min() > 3000 for _ in range(1000)])
    assert share == pytest.approx(0.9, abs=0.04)


def test_contrast_scales_and_shifts_intensities_only():
    source = marked((16, 16))
    still = orientations((16, 16), halo=(0, 0), voxel_size_um=None)[:1]
    one = patches_of(source, core=(16, 16), halo=(0, 0), change=Augmentation(brightness=0.2, contrast=0.2), turns=still)
    (plain,), (labels,) = seen([one.at(source, Box.whole((16, 16)))])
    for seed in range(10):
        (x,), (y,) = seen([one.draw(np.random.default_rng(seed))])
        gain, shift = np.polyfit(plain.ravel(), x.ravel(), 1)
        assert np.allclose(plain * gain + shift, x, atol=1e-3)
        assert 0.8 <= gain <= 1.2
        assert abs(shift) <= 0.2 + 1e-3
        assert np.array_equal(y, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
@pytest.mark.parametrize("n_classes", [2, 3, 12])
@pytest.mark.parametrize("ignored", [0, 6, 126])
def test_classes_are_the_positions_of_their_values(dtype, n_classes, ignored):
    known = tuple(range(1, 121, 10))[:n_classes]
    labels = np.random.default_rng(0).choice([*known, ignored], (30, 31)).astype(dtype)
    source = Source(labels[None], labels, ((0.0, 1.0),), Box((0, 4), (30, 20)))
    patches = replace(patches_of(source, core=(30, 31), halo=(0, 0)), class_values=known, ignore=ignored)
    got = patches.at(source, Box.whole((30, 31))).classes
    wanted = {value: number for number, value in enumerate(known)} | {ignored: IGNORED}
    assert np.array_equal(got[:, 4:20], np.vectorize(wanted.get)(labels[:, 4:20].astype(int)))
    assert (np.delete(got, np.s_[4:20], axis=1) == IGNORED).all()


def test_a_cube_has_48_orientations_and_a_square_8():
    assert len(ALL_3D) == 48
    block = np.arange(64).reshape(4, 4, 4)
    assert len({turn.apply(block).tobytes() for turn in ALL_3D}) == 48
    assert len(orientations((4, 4), halo=(1, 1), voxel_size_um=(0.5, 0.5))) == 8


def test_the_first_orientation_changes_nothing():
    block = np.arange(64).reshape(4, 4, 4)
    assert np.array_equal(ALL_3D[0].apply(block), block)


@pytest.mark.parametrize("turn", ALL_3D[::5], ids=str)
def test_orientations_keep_neighbours(turn):
    at = np.stack(np.meshgrid(*(np.arange(4),) * 3, indexing="ij"))
    turned = turn.apply(at)
    for axis in range(1, 4):
        steps = np.abs(np.diff(turned, axis=axis)).sum(0)
        assert (steps == 1).all()


def test_orientations_form_a_group():
    block = np.arange(27).reshape(3, 3, 3)
    results = {turn.apply(block).tobytes() for turn in ALL_3D}
    for first, second in itertools.product(ALL_3D[::7], ALL_3D[::5]):
        assert second.apply(first.apply(block)).tobytes() in results


@pytest.mark.parametrize(
    ("core", "halo", "size", "swaps"),
    [
        ((4, 4, 4), (0, 0, 0), (0.05, 0.004, 0.004), {(0, 1, 2), (0, 2, 1)}),
        ((1, 4, 4), (0, 2, 2), (1.0, 1.0, 1.0), {(0, 1, 2), (0, 2, 1)}),
        ((4, 4), (0, 2), None, {(0, 1)}),
        ((4, 4), (2, 2), (0.5, 0.25), {(0, 1)}),
    ],
)
def test_only_axes_that_are_alike_are_swapped(core, halo, size, swaps):
    turns = orientations(core, halo=halo, voxel_size_um=size)
    assert {turn.order for turn in turns} == swaps
    assert len(turns) == len(swaps) * 2 ** len(core)


def test_channels_are_not_turned():
    x = np.stack([np.zeros((2, 2)), np.ones((2, 2))])
    assert np.array_equal(Orientation((1, 0), (True, True)).apply(x), x)


AFFINE = Augmentation(
    brightness=0, contrast=0, rotation_degrees=180, tilt_degrees=30, shift_voxels=2, scale=0.5, shear=0.2
)


@pytest.mark.parametrize(("core", "halo"), [((1, 5, 5), (0, 2, 2)), ((4, 4, 4), (2, 2, 2))])
@pytest.mark.parametrize("seed", range(12))
def test_a_warped_patch_is_what_the_field_shows_of_the_whole_scan(core, halo, seed):
    rng, shape, n_axes = np.random.default_rng(seed), (9, 11, 12), sum(n > 1 for n in core)
    source = Source(rng.normal(size=(1, *shape)), rng.integers(0, 3, shape), ((0.0, 1.0),), Box.whole(shape))
    turns = orientations(core, halo=halo, voxel_size_um=None)
    patches = Patches((source,), core, halo, (0, 1, 2), n_axes, turns, AFFINE)
    place, turn = patches.place(source, rng), turns[int(rng.integers(len(turns)))]
    change = draw_change(AFFINE, patches.tile, spacing=(1.0,) * n_axes, rng=rng)
    (x,), (y,) = seen([patches.changed(source, place, turn=turn, change=change)])

    # the oracle turns all of the scan, mirrored far around the patch's centre, and looks up by SciPy
    far = place.grow((0 if n_axes == 2 else 20, 20, 20))
    known = np.pad(np.zeros(shape), 1, constant_values=1)  # 1 outside the scan, where labels do not count
    outside = far.shift((1, 1, 1))
    at = [np.clip(np.arange(a, b), 0, n + 1) for a, b, n in zip(outside.start, outside.stop, shape, strict=True)]
    parts = read_mirrored(source.image[0], far), read_mirrored(source.labels, far), known[np.ix_(*at)]
    image, labels, unknown = (turn.apply(part).reshape(part.shape[3 - n_axes :]) for part in parts)

    def looked_up(array, n, order):
        offset = np.stack(np.meshgrid(*(np.arange(k) - (k - 1) / 2 for k in n), indexing="ij"))
        middle = (np.array(array.shape) - 1) / 2 + change.field.shift
        where = np.tensordot(change.field.matrix, offset, 1) + middle.reshape(-1, *(1,) * n_axes)
        return ndimage.map_coordinates(array, where, order=order), np.abs(where - np.round(where)).max(axis=0)

    assert np.allclose(x[0], looked_up(image.astype(float), x.shape[1:], 1)[0], atol=1e-4)
    unknown, part = looked_up(unknown, y.shape, 0)
    clear = part < 0.499  # SciPy may round the other way in the middle between two voxels
    expected = np.where(unknown, IGNORED, looked_up(labels, y.shape, 0)[0])
    assert np.array_equal(y[clear], expected[clear])
    assert clear.mean() > 0.9


def test_margins_before_a_turn_are_those_of_the_turned_box():
    block = np.zeros((4, 5, 6))
    margins = ((1, 2), (3, 4), (5, 6))
    for turn in orientations((1, 1, 1), halo=(0, 0, 0), voxel_size_um=None):
        wide = np.pad(block, turn.before(margins), constant_values=1)
        assert np.array_equal(turn.apply(wide), np.pad(turn.apply(block), margins, constant_values=1))


def test_unlabelled_voxels_are_ignored_and_every_patch_shows_a_label():
    labels = np.full((40, 40), 99, np.uint8)
    labels[30:33, 5:8] = 20
    source = Source(np.zeros((1, 40, 40)), labels, ((0.0, 1.0),), Box.whole((40, 40)))
    patches = Patches((source,), (8, 8), (0, 0), (10, 20), 2, ALL_2D, STILL, ignore=99).with_labelled()
    rng = np.random.default_rng(0)
    shown = [patches.draw(rng).classes for _ in range(200)]
    assert {int(v) for each in shown for v in np.unique(each)} == {IGNORED, 1}
    assert all((each != IGNORED).any() for each in shown)
    assert np.mean([each != IGNORED for each in shown], axis=0).min() > 0  # anywhere in a patch, not in its middle
    assert patches.class_counts().tolist() == [0, 9]


def test_classes_are_counted_in_the_regions_only():
    source = marked((9, 12), region=Box((2, 3), (7, 10)))
    counts = patches_of(source, core=(4, 4), halo=(1, 1)).class_counts()
    assert np.array_equal(counts, np.bincount(source.labels[2:7, 3:10].ravel() // 10, minlength=7))


def test_border_weights_move_with_the_labels():
    weights = np.arange(12 * 12, dtype=np.float32).reshape(12, 12)
    source = replace(marked((12, 12)), borders=weights)
    patches = patches_of(source, core=(4, 4), halo=(2, 2))
    for seed in range(20):
        patch = patches.draw(np.random.default_rng(seed))
        assert np.array_equal(patch.borders % 7 * 10, patch.classes * 10)
