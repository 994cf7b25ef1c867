import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.patches import IGNORED, Orientation, Patches, Source, orientations

ALL_3D = orientations((4, 4, 4), halo=(0, 0, 0), voxel_size_um=None)


def marked(shape, *, region=None) -> Source:
    """Return a source whose labels are a function of the intensities, one value per voxel."""
    image = np.arange(np.prod(shape), dtype=np.int32).reshape(1, *shape)
    labels = image[0] % 7 * 10
    return Source(image, labels, ((2.0, 0.5),), region or Box.whole(shape))


def patches_of(source, *, core, halo, n_axes=None, contrast=0.0, turns=None) -> Patches:
    turns = turns or orientations(core, halo=halo, voxel_size_um=None)
    return Patches((source,), core, halo, tuple(range(0, 70, 10)), n_axes or len(core), turns, contrast)


def centre(x, halo):
    return x[(..., *(slice(h, n - h) for h, n in zip(halo, x.shape[-len(halo) :], strict=True)))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple), st.integers(1, 6), st.integers(0, 9),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_image_and_labels_move_together(shape, core, halo, seed):
    patches = patches_of(marked(shape), core=(core,) * len(shape), halo=(halo,) * len(shape))
    x, y = patches.draw(np.random.default_rng(seed))
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
    x, _ = patches_of(source, core=(4, 4), halo=(5, 3)).at(source, core)
    assert np.array_equal(x / 0.5 + 2, read_mirrored(source.image, core.grow((5, 3))))


def test_labels_outside_the_region_are_ignored_and_all_inside_can_be_drawn():
    region = Box((2, 3), (7, 10))
    source = marked((9, 12), region=region)
    patches = patches_of(source, core=(3, 3), halo=(1, 1))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        core = patches.place(source, rng)
        x, y = patches.at(source, core)
        assert (y != IGNORED).all()
        seen |= set((centre(x, (1, 1))[0] / 0.5 + 2).ravel().astype(int).tolist())
    inside = {r * 12 + c for r in range(2, 7) for c in range(3, 10)}
    assert seen == inside


def test_a_region_smaller_than_the_core_is_held_by_it():
    source = marked((3, 20), region=Box((2, 5), (3, 9)))
    patches = patches_of(source, core=(4, 4), halo=(0, 0))
    rng, rows = np.random.default_rng(0), set()
    for _ in range(100):
        core = patches.place(source, rng)
        assert core.start[0] <= 2 < core.stop[0]
        rows.add(core.start[0])
        assert (patches.at(source, core)[1] != IGNORED).sum() in {4, 3, 2, 1}
    assert rows == {-1, 0, 1, 2}


def test_slices_of_a_volume_are_seen_without_the_axis_across():
    source = marked((5, 8, 8))
    patches = patches_of(source, core=(1, 4, 4), halo=(0, 2, 2), n_axes=2)
    x, y = patches.batch(6, np.random.default_rng(0))
    assert x.shape == (6, 1, 8, 8)
    assert y.shape == (6, 4, 4)
    assert np.array_equal((centre(x, (2, 2))[:, 0] / 0.5 + 2) % 7, y)
    assert len({int(each.min()) // 64 for each in x / 0.5 + 2}) > 1  # of several slices


def test_larger_images_are_drawn_from_in_proportion():
    small, large = marked((10, 10)), marked((30, 30))
    shifted = Source(large.image + 7000, large.labels, large.windows, large.region)
    patches = replace(patches_of(small, core=(2, 2), halo=(0, 0)), sources=(small, shifted))
    rng = np.random.default_rng(0)
    share = np.mean([patches.draw(rng)[0].min() > 3000 for _ in range(1000)])
    assert share == pytest.approx(0.9, abs=0.04)


def test_contrast_scales_and_shifts_intensities_only():
    source = marked((16, 16))
    still = orientations((16, 16), halo=(0, 0), voxel_size_um=None)[:1]
    one = patches_of(source, core=(16, 16), halo=(0, 0), contrast=0.2, turns=still)
    plain, labels = one.at(source, Box.whole((16, 16)))
    for seed in range(10):
        x, y = one.draw(np.random.default_rng(seed))
        gain, shift = np.polyfit(plain.ravel(), x.ravel(), 1)
        assert np.allclose(plain * gain + shift, x, atol=1e-3)
        assert 0.8 <= gain <= 1.2
        assert abs(shift) <= 0.2 + 1e-3
        assert np.array_equal(y, labels)


def test_fixed_places_cover_each_region_and_are_the_same_each_time():
    source = marked((9, 12), region=Box((2, 3), (7, 10)))
    patches = patches_of(source, core=(3, 3), halo=(1, 1))
    seen = np.zeros((9, 12), int)
    for _, core in patches.fixed(1000):
        seen[core.slices] += 1
        assert core.intersect(source.region) == core
    assert (seen[source.region.slices] > 0).all()
    assert seen.sum() == seen[source.region.slices].sum()
    assert patches.fixed(3) == patches.fixed(3)
    assert len(patches.fixed(3)) == 3


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
