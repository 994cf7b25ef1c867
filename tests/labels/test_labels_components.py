import cc3d
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import checkerboard, whole

from pipeline.labels import components as module
from pipeline.labels.components import coded, components

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint16]))
def test_components_are_those_of_scipy_in_the_order_of_their_first_voxels(shape, seed, dtype):
    classes = np.random.default_rng(seed).choice(4, shape, p=(0.4, 0.4, 0.1, 0.1)).astype(dtype)
    expected = whole(classes, (1, 2, 3))
    found = components(classes)
    np.testing.assert_array_equal(found.ids, expected)
    every, firsts, counts = np.unique(expected, return_index=True, return_counts=True)
    inner = every > 0
    np.testing.assert_array_equal(found.firsts, firsts[inner])
    np.testing.assert_array_equal(found.n_voxels, counts[inner])
    np.testing.assert_array_equal(found.classes, classes.ravel()[firsts[inner]])
    assert len(found) == inner.sum()


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 8)])
def test_components_do_not_depend_on_how_an_array_lies_in_memory(shape):
    classes = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    read_only = classes.copy()
    read_only.flags.writeable = False
    for other in (np.asfortranarray(classes), np.repeat(classes, 2, axis=-1)[..., ::2], read_only):
        np.testing.assert_array_equal(components(other).ids, components(classes).ids)


def test_parts_that_are_counted_apart_add_up(monkeypatch):
    classes = np.random.default_rng(1).integers(0, 3, (9, 10, 11)).astype(np.uint8)
    at_once = components(classes)
    monkeypatch.setattr(module, "_PART", 17)
    in_parts = components(classes)
    for each in ("ids", "n_voxels", "firsts", "classes"):
        np.testing.assert_array_equal(getattr(in_parts, each), getattr(at_once, each))


def test_numbers_are_in_the_order_of_first_voxels_whichever_way_the_library_counts(monkeypatch):
    classes, count = checkerboard((5, 6, 7)), cc3d.connected_components

    def in_any_order(*args, **kwargs):
        ids, n = count(*args, **kwargs)
        shuffled = np.concatenate([[0], 1 + np.random.default_rng(2).permutation(n)]).astype(ids.dtype)
        return shuffled[ids], n

    expected = components(classes)
    monkeypatch.setattr(cc3d, "connected_components", in_any_order)
    for each in ("ids", "n_voxels", "firsts", "classes"):
        np.testing.assert_array_equal(getattr(components(classes), each), getattr(expected, each))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.bool_])
def test_codes_count_the_values_that_are_wanted(dtype):
    values = (0, 1) if dtype is np.bool_ else (np.iinfo(dtype).max, np.iinfo(dtype).min, 3)
    voxels = np.random.default_rng(3).choice(np.array([*values, *values[:1]], dtype), (5, 6))
    expected = np.zeros(voxels.shape, int)
    for code, value in enumerate(values[:2], start=1):
        expected[voxels == np.array(value, dtype)] = code
    np.testing.assert_array_equal(coded(voxels, values[:2]), expected)


def test_codes_have_room_for_256_classes():
    voxels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(coded(voxels, range(256)), 1 + voxels.astype(int))
