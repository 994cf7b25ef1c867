"""Neighbouring slices as channels: tiles, columns and patches hold what a stack of whole slices does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet_predict import WINDOWS, assert_equal, scan_of, tiled, trained, whole

from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.mirror import read_mirrored
from pipeline.store.moments import SliceStatistics
from pipeline.store.scaling import SliceWindows
from pipeline.unet.column import ColumnPredictor
from pipeline.unet.columns import Columns, Streaming
from pipeline.unet.engines import make_engine
from pipeline.unet.numbers import batched
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.patches import Patches
from pipeline.unet.training.source import Source
from pipeline.unet.training.targets import Target
from pipeline.unet.training.warp import batch_of


def network(n, *, channels=1, **about):
    return UNetSettings(
        dims=2, in_channels=channels * (2 * n + 1), width=3, depth=1, padding=Padding.SAME, neighbours=n, **about
    )  # fmt: skip


def stacked(array, n):
    """Return slices (channels, z, y, x) with those beside them, (channels * (2 n + 1), z, y, x), by NumPy alone."""
    padded = np.pad(array, [(0, 0), (n, n), *[(0, 0)] * (array.ndim - 2)], mode="reflect")
    every = [padded[:, at : at + array.shape[1]] for at in range(2 * n + 1)]
    return np.stack(every, axis=1).reshape(-1, *array.shape[1:])


def test_slices_become_a_batch_with_their_neighbours_as_channels():
    x = torch.arange(2 * 5 * 3 * 4.0).reshape(2, 5, 3, 4)
    middle = batched(x, dims=2, neighbours=1)
    assert middle.shape == (3, 6, 3, 4)
    for z, c, d in np.ndindex(3, 2, 3):
        assert torch.equal(middle[z, 3 * c + d], x[c, z + d])
    assert torch.equal(batched(x, dims=2), x.transpose(0, 1))
    assert torch.equal(batched(x, dims=3), x[None])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tiles_of_blocks_are_the_whole_slices(data):
    n, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from(Padding))
    about = replace(network(n, channels=channels), padding=padding, n_classes=3)
    net = trained(about, seed=data.draw(st.integers(0, 9)))
    shape = tuple(data.draw(st.integers(1, most)) for most in (7, 30, 30))
    scan, rule = scan_of(shape, channels=channels, seed=n), closed_form_rule(net.settings)
    core = tuple(data.draw(st.integers(1, 6)) * s for s in rule.stride)
    blocks = (data.draw(st.integers(1, 4)), *(max(c, 12) for c in core))
    got = tiled(net, scan, block_core=blocks, tile_core=core, n_slices=data.draw(st.integers(1, 5)))
    assert_equal(net, got, whole(net, scan, rule))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_columns_are_the_whole_slices(data):
    n, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    net = trained(network(n, channels=channels), seed=data.draw(st.integers(0, 9)))
    shape = tuple(data.draw(st.integers(1, most)) for most in (7, 30, 30))
    scan = scan_of(shape, channels=channels, seed=n)
    engine = make_engine(net, device="cpu", first=data.draw(st.integers(0, 1)))
    predictor = ColumnPredictor(engine, windows=WINDOWS[:channels], slab=data.draw(st.sampled_from((2, 8))))
    likely = np.full((2, *shape), np.nan, np.float32)
    for block in BlockGrid(shape, (data.draw(st.integers(1, 4)), 16, 16)):
        stream, boxes = predictor.stream(block.core)
        slabs = (predictor.staged(read_mirrored(scan, box)) for box in boxes)
        for rows in predictor.run(block.core, stream, slabs, probabilities=True):
            likely[(slice(None), *rows.box.slices)] = rows.reals
    assert np.abs(likely - whole(net, scan, closed_form_rule(net.settings))).max() <= 1e-5


def test_what_is_read_counts_the_neighbours():
    shape, halo = (10, 64, 64), 8
    for n, n_read in ((0, 10), (1, 5 + 6 + 3), (3, 7 + 9 + 5)):
        what = Streaming(network(n), BlockGrid(shape, (4, 32, 32)), (4, 16, 32), 2, 1, 4, "cpu")
        assert what.voxels_read(Columns(1, 2, (1, 2, 2), (1, 64, 64))) == n_read * 64 * 64
        assert what.voxels_read(Columns(1, 2, (3, 2, 1), (1, 64, 32))) == 10 * 64 * 2 * (32 + halo)


def test_memory_counts_the_slices_that_are_read_for_others():
    columns, shards = Columns(1, 2, (1, 2, 2), (1, 64, 64)), BlockGrid((10, 64, 64), (4, 32, 32))
    # networks of the same tensors: of three channels, or of one and its neighbours
    alone, beside = (
        Streaming(each, shards, (4, 16, 32), 2, 1, 4, "cpu").peak_bytes(columns)
        for each in (network(0, channels=3), network(1))
    )
    n_rows, width = 64 + 2 * 8, 64 + 2 * 8
    kept = n_rows * width * 2 * (6 - 4)
    ahead = 4 * 2 * width * (3 * (2 + 4) - (2 + 3 * 4))
    assert beside - alone == kept + ahead


SHAPE = (5, 24, 28)
CHANGED = Augmentation(
    warped_share=0.7, rotation_degrees=30, scale=0.2, elastic_sigma_voxels=1, noise=0.1, blur_voxels=0.5, gamma=0.2
)  # fmt: skip


def sources(n, *, slicewise):
    """Return an image of two channels, and what it is stacked with its neighbours, which are no neighbours then."""
    rng = np.random.default_rng(n)
    image = rng.integers(0, 255, (2, *SHAPE)).astype(np.uint8)
    labels, target = rng.integers(0, 3, SHAPE), rng.standard_normal((1, *SHAPE)).astype(np.float32)
    windows, beside = ((100.0, 1 / 64), (31.5, 1 / 256)), 2 * n + 1
    repeated = tuple(each for each in windows for _ in range(beside))
    if slicewise:
        windows, repeated = (
            SliceWindows.of(SliceStatistics(each.mean(axis=(2, 3)), each.std(axis=(2, 3))))
            for each in (image, stacked(image, n))
        )
    about = {"region": Box((1, 2, 0), (5, 20, 28)), "target": Target(target, ((0.0, 1.0),), (1.0,))}
    return Source(image, labels, windows, **about), Source(stacked(image, n), labels, repeated, **about)


def patches_of(source, *, halo, turned, steps):
    """Return patches of slices; ``turned`` says whether all of them are flipped across slices, or none."""
    core = (1, 8, 8)
    turns = tuple(each for each in orientations(core, halo=halo, voxel_size_um=None) if each.flipped[0] is turned)
    assert len(turns) == 8
    changed = replace(CHANGED, noise=0) if turned else CHANGED  # which is drawn in the order of the channels
    return Patches((replace(source, steps=steps),), core, halo, (0, 1, 2), 2, turns, changed)


@pytest.mark.parametrize("slicewise", [False, True])
@pytest.mark.parametrize(("n", "halo", "steps"), [(1, 0, ()), (2, 6, ()), (6, 0, ()), (1, 0, (1.0, 1.3, 0.8))])
@pytest.mark.parametrize("turned", [False, True])
def test_patches_show_the_slices_and_their_neighbours_however_they_are_changed(n, halo, steps, slicewise, turned):
    both = (
        patches_of(source, halo=(beside, halo, halo), turned=turned, steps=steps)
        for source, beside in zip(sources(n, slicewise=slicewise), (n, 0), strict=True)
    )
    ours, expected = (batch_of(each.batch(60, np.random.default_rng(0)), device="cpu") for each in both)
    assert ours.images.shape == (60, 2 * (2 * n + 1), 8 + 2 * halo, 8 + 2 * halo)
    slices = expected.images.unflatten(1, (2, 2 * n + 1))
    seen = slices.flip(2) if turned else slices  # from below
    assert torch.equal(ours.images, seen.flatten(1, 2))
    assert torch.equal(ours.classes, expected.classes)
    assert torch.equal(ours.target, expected.target)
    assert not torch.equal(slices, slices.flip(2))


def test_settings_that_cannot_have_neighbours_are_refused():
    for wrong in ({"dims": 3}, {"in_channels": 4}, {"neighbours": -1}):
        with pytest.raises(ArgumentError, match=r"neighbours need a 2-D network of .* or leave neighbours out"):
            replace(network(1), **wrong)
    assert network(2, channels=3).image_channels == 3
