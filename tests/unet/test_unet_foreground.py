from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.patches import IGNORED, Patches, Source

STILL = Augmentation(brightness=0, contrast=0)


def source_of(labels, region=None) -> Source:
    return Source(np.zeros((1, *labels.shape)), labels, ((0.0, 1.0),), region or Box.whole(labels.shape))


def patches_of(*sources, core, values=(0, 10, 20), ignore=None) -> Patches:
    turns = orientations(core, halo=(0,) * len(core), voxel_size_um=None)[:1]
    return Patches(sources, core, (0,) * len(core), values, len(core), turns, STILL, ignore=ignore)


def sparse(shape=(200, 180)):
    """Return labels of two small objects, of 24 and of 6 voxels, in a large background."""
    labels = np.zeros(shape, np.uint8)
    labels[40:44, 50:56], labels[150:152, 90:93] = 10, 20
    return labels


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_that_part_is_centred_on_rare_classes_and_each_as_often(share):
    patches, n = patches_of(source_of(sparse()), core=(9, 9)).with_foreground(share), 3000
    rng = np.random.default_rng(1)
    centres = np.array([patch.classes[4, 4] for patch in patches.batch(n, rng)])
    by_chance = (1 - share) * 30 / (192 * 172)
    sigma = np.sqrt(n * share * (1 - share)) + 1
    assert abs((centres > 0).sum() - n * (share + by_chance)) < 5 * sigma
    n_centred = (centres > 0).sum()
    assert abs((centres == 1).sum() - n_centred / 2) < 5 * np.sqrt(n_centred) / 2


def test_all_voxels_of_rare_classes_are_in_the_index_and_no_other():
    labels = np.random.default_rng(0).choice([0, 10, 20], (31, 27), p=[0.7, 0.1, 0.2])
    region = Box((3, 2), (29, 20))
    found = patches_of(source_of(labels, region), core=(8, 8)).with_foreground(0.5).foreground
    inside = np.zeros_like(labels)
    inside[region.slices] = labels[region.slices]
    for value, (voxels,), (count,) in zip((10, 20), found.voxels, found.counts, strict=True):
        assert sorted(map(tuple, voxels.tolist())) == sorted(map(tuple, np.argwhere(inside == value).tolist()))
        assert count == len(voxels)


def test_an_index_that_is_full_is_an_even_sample(monkeypatch):
    monkeypatch.setattr("pipeline.unet.training.foreground.MOST_VOXELS", 400)
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 60:] = 10
    found = patches_of(source_of(labels), core=(16, 16)).with_foreground(1.0).foreground
    ((voxels,),) = found.voxels
    assert found.counts.tolist() == [[4000]]
    assert len(set(map(tuple, voxels.tolist()))) == 400
    assert (labels[tuple(voxels.T)] == 10).all()
    assert voxels.mean(axis=0) == pytest.approx([49.5, 79.5], abs=5 * 29 / 20)
    again = patches_of(source_of(labels), core=(16, 16)).with_foreground(1.0).foreground
    assert np.array_equal(voxels, again.voxels[0][0])


def test_sources_are_drawn_from_by_their_voxels_of_the_class():
    empty, few, many = (np.zeros((40, 40), np.uint8) for _ in range(3))
    few[5, 5:8], many[5:8, 5:11] = 10, 10
    patches = patches_of(*map(source_of, (empty, few, many)), core=(5, 5)).with_foreground(1.0)
    rng = np.random.default_rng(0)
    drawn = np.bincount([patches.foreground.draw(rng)[0] for _ in range(2000)], minlength=3) / 2000
    assert drawn[0] == 0
    assert drawn[1] == pytest.approx(3 / 21, abs=0.04)


@given(st.data())
def test_a_core_about_a_voxel_holds_it_and_stays_in_the_region(data):
    size = data.draw(st.integers(1, 12))
    region = Box((2, 3), (9, 14))
    patches, source = patches_of(core=(size, size)), source_of(np.zeros((12, 16), np.uint8), region)
    voxel = np.array([data.draw(st.integers(2, 8)), data.draw(st.integers(3, 13))])
    core = patches.about(source, voxel)
    for at, a, b, first, last in zip(voxel, core.start, core.stop, region.start, region.stop, strict=True):
        assert b - a == size
        assert a <= at < b
        assert (first <= a and b <= last) or (a <= first and last <= b)
        if a not in (first, last - size):
            assert a == at - size // 2


def test_slices_of_a_volume_are_those_of_the_voxel():
    labels = np.zeros((6, 20, 20), np.uint8)
    labels[4, 10, 10] = 10
    patches = replace(patches_of(source_of(labels), core=(1, 5, 5)), n_axes=2, turns=orientations(
        (1, 5, 5), halo=(0, 0, 0), voxel_size_um=None)[:1]).with_foreground(1.0)  # fmt: skip
    patch = patches.draw(np.random.default_rng(0))
    assert patch.classes.shape == (5, 5)
    assert patch.classes[2, 2] == 1


def test_voxels_that_nobody_has_labelled_are_no_foreground():
    labels = sparse()
    labels[:, :45] = 99
    patches = patches_of(source_of(labels), core=(9, 9), ignore=99).with_foreground(1.0)
    assert patches.foreground.counts.tolist() == [[24], [6]]
    assert all((patch.classes[4, 4] != IGNORED) for patch in patches.batch(50, np.random.default_rng(0)))


def test_one_class_alone_is_refused():
    patches = patches_of(source_of(np.full((20, 20), 10, np.uint8)), core=(5, 5))
    with pytest.raises(ArgumentError, match=r"at least 2 classes where the network learns, got 1; label another"):
        patches.with_foreground(0.3)
