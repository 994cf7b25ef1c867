"""Test-time augmentation: a network with turned kernels is one that sees a turned scan, streamed and by tiles alike."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from test_unet_column import rows_of
from test_unet_families import NETWORKS
from test_unet_predict import WINDOWS, scan_of, trained

from pipeline.config import Precision, Tta
from pipeline.errors import ArgumentError
from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.network import probabilities_of
from pipeline.unet.predict import Predictor
from pipeline.unet.readout import mean
from pipeline.unet.settings import Head, Padding, UNetSettings, closed_form_rule
from pipeline.unet.turns import Mean, Turn, check_turns, engines_of, mean_of, turned, turns_of

FLAT = UNetSettings(dims=2, width=4, depth=2, padding=Padding.SAME, batch_norm=True)
EVERY = NETWORKS | {
    "valid": UNetSettings(dims=2, width=2, depth=2, n_convs=1), "valid volumes": UNetSettings(dims=3, width=2, depth=1),
}  # fmt: skip


@pytest.mark.parametrize(("dims", "tta", "n"), [(2, "none", 1), (2, "flips", 4), (2, "rotations", 8),
                                                (3, "none", 1), (3, "flips", 8), (3, "rotations", 16)])
def test_turns_are_the_symmetries_of_the_grid_each_once_the_first_none(dims, tta, n):
    x = torch.arange(3**dims).reshape((3,) * dims)
    turns = turns_of(Tta(tta), dims)
    seen = {tuple(turn.of(x).flatten().tolist()) for turn in turns}
    assert len(seen) == len(turns) == Tta(tta).n_turns(dims) == n
    assert torch.equal(turns[0].of(x), x)
    assert all(torch.equal(turn.back(turn.of(x)), x) for turn in turns)
    by_numpy = x.numpy()
    square = {tuple(np.rot90(each, k, (-2, -1)).ravel().tolist()) for k in range(4)
              for each in (by_numpy, np.flip(by_numpy, -1))}
    assert tta != "rotations" or square <= seen


@pytest.mark.parametrize("network", EVERY.values(), ids=EVERY)
def test_turned_kernels_see_what_the_network_sees_of_a_turned_tile(network):
    net = trained(network, seed=4)
    alike = network.factors(-1) == network.factors(-2)
    tile = closed_form_rule(network).tile_shape(network.in_proportion(2 * network.stride))
    x = torch.randn((1, 1, *tile))
    for turn in turns_of(Tta.ROTATIONS if alike else Tta.FLIPS, network.dims)[1::3]:
        with torch.inference_mode():
            got, expected = turned(net, turn)(x), turn.back(net(turn.of(x)))
        assert (got.softmax(1) - expected.softmax(1)).abs().max() <= 1e-5, turn
        assert (got - net(x)).abs().max() > 1e-3  # and not what it sees of the tile as it is


def averaged(net, scan, tta, rule):
    """Return the mean of what NumPy's turns of the mirrored scan are given, turned back; of whole strides."""
    wide = read_mirrored(scan, Box.whole(scan.shape[1:]).round_up(rule.stride).grow(rule.halo))
    x = (wide.astype(np.float64) - WINDOWS[0][0]) * WINDOWS[0][1]
    total, n = 0.0, 0
    dims = len(rule.stride)
    for flips in product((False, True), repeat=dims):
        for k in range(2 if tta is Tta.ROTATIONS else 1):
            axes = tuple(1 + at for at, each in enumerate(flips) if each)
            seen = np.rot90(np.flip(x, axes), k, (-2, -1))
            with torch.inference_mode():
                logits = net(torch.from_numpy(seen.copy()).float()[None])
            likely = probabilities_of(logits, net.settings.head)[0].double().numpy()
            total = total + np.flip(np.rot90(likely, -k, (-2, -1)), axes)
            n += 1
    inner = tuple(slice(t, t + size) for t, size in zip(rule.trim, scan.shape[1:], strict=True))
    return (total / n)[(slice(None), *inner)]


@pytest.mark.parametrize(("network", "shape"), [
    (FLAT, (64, 33)), (replace(FLAT, padding=Padding.VALID, n_classes=3), (64, 33)),
    (replace(FLAT, head=Head.SIGMOID), (64, 33)),
    (replace(FLAT, dims=3, depth=1, n_convs=1), (16, 12, 21)),
])  # fmt: skip
@pytest.mark.parametrize("tta", [Tta.FLIPS, Tta.ROTATIONS])
def test_columns_and_tiles_give_the_mean_over_turned_scans(network, shape, tta):
    net, rule, scan = trained(network, seed=5), closed_form_rule(network), scan_of(shape)
    expected = averaged(net, scan, tta, rule)
    core = Box.whole(shape)
    classes, likely = rows_of(net, scan, core, engines=engines_of([net], tta, device="cpu"))
    assert np.abs(likely - expected).max() <= 1e-5
    raw = read_mirrored(scan, core.round_up(rule.stride).grow(rule.halo))
    tile = rule.tile_shape(shape[-1:] * network.dims)
    for by in (mean_of([net], tta), Mean(engines_of([net], tta, device="cpu"), network)):
        tiles = Predictor(by, rule, windows=WINDOWS[:1], tile_shape=tile, device="cpu")
        same, probabilities = tiles.segment_with_probabilities(raw, core)
        assert np.abs(probabilities - expected).max() <= 1e-5
        assert np.array_equal(same, tiles.segment(raw, core))
    top = np.sort(likely, axis=0)
    sure = (top[-1] - top[-2] > 1e-4) & (np.abs(top[-1] - 0.5) > 1e-4)
    assert np.array_equal(same[sure], classes[sure])
    alone = rows_of(net, scan, core)
    assert np.abs(alone[1] - likely).max() > 1e-2  # what is averaged differs from the network alone


def test_columns_taken_up_in_their_middle_and_other_slabs_make_the_same_bits():
    net, scan = trained(FLAT, seed=6), scan_of((120, 33))
    engines = engines_of([net], Tta.FLIPS, device="cpu")
    classes, likely = rows_of(net, scan, Box.whole((120, 33)), engines=engines)
    later = rows_of(net, scan, Box((40, 0), (120, 33)), engines=engines)
    assert np.array_equal(later[0], classes[40:])
    assert np.array_equal(later[1], likely[:, 40:])


@pytest.mark.parametrize("head", list(Head))
def test_the_mean_is_of_probabilities_not_of_logits(head):
    few = [torch.randn((1, 3, 5, 4), dtype=torch.bfloat16) * 4 for _ in range(3)]
    got = mean(iter(few), head)
    expected = sum(probabilities_of(each.double(), head) for each in few) / 3
    assert (probabilities_of(got, head).double() - expected).abs().max() <= 1e-6
    assert mean(iter(few[:1]), head) is few[0]
    assert mean(iter([]), head) is None


def test_a_certain_voxel_stays_certain():
    few = [torch.tensor([[[200.0]], [[-200.0]]])[None], torch.tensor([[[300.0]], [[0.0]]])[None]]
    for head, expected in ((Head.SOFTMAX, [1.0, 0.0]), (Head.SIGMOID, [1.0, 0.25])):
        assert probabilities_of(mean(iter(few), head), head).flatten().tolist() == pytest.approx(expected)


def test_low_precision_is_averaged_in_float32():
    engines = engines_of([trained(FLAT, seed=7)], Tta.FLIPS, device="cpu", precision=Precision.BF16)
    _, likely = rows_of(None, scan_of((64, 33)), Box.whole((64, 33)), engines=engines)
    assert len(np.unique(likely)) > 500  # bfloat16 has 256 numbers from one half to one


def test_rotations_are_refused_where_y_and_x_differ():
    thin = replace(FLAT, poolings=((1, 2), (2, 2)))
    check_turns(thin, Tta.FLIPS)
    with pytest.raises(ArgumentError, match=r"along y and .* along x; use --tta flips"):
        check_turns(thin, Tta.ROTATIONS)
    assert Turn((False, False)) in turns_of(Tta.FLIPS, 2)
