"""Ensembles: the mean of what several networks say of the whole scan, streamed and by tiles, in one model file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from test_unet_column import rows_of
from test_unet_predict import WINDOWS, scan_of, trained, whole
from test_unet_turns import averaged

import pipeline.demo
from pipeline.config import Passes, Precision, Tta
from pipeline.errors import ModelError
from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.store.statistics import Normalisation
from pipeline.unet.column import ColumnPredictor
from pipeline.unet.cost import weight_bytes
from pipeline.unet.families import chain_of
from pipeline.unet.members import apart, together
from pipeline.unet.model import Model, load_model, networks_of, save_model
from pipeline.unet.network import UNet
from pipeline.unet.predict import Predictor
from pipeline.unet.settings import Head, Padding, UNetSettings, closed_form_rule
from pipeline.unet.turns import Mean, engines_of, mean_of

FLAT = UNetSettings(dims=2, width=4, depth=2, padding=Padding.SAME, batch_norm=True)
CASES = {
    "2-D": (FLAT, (64, 33)), "2-D valid": (replace(FLAT, padding=Padding.VALID, n_classes=3), (61, 33)),
    "sigmoid": (replace(FLAT, head=Head.SIGMOID), (64, 33)),
    "3-D": (replace(FLAT, dims=3, depth=1, n_convs=1), (16, 12, 21)), "slices": (FLAT, (3, 40, 24)),
}  # fmt: skip


def several(network, n=3):
    """Return networks of the same settings that say different things."""
    return [trained(network, seed=seed) for seed in range(n)]


def tile_of(rule):
    """Return a tile that is smaller than the scan."""
    return rule.tile_shape(tuple(3 * s for s in rule.stride))


def by_columns(nets, scan, tta, **about):
    core = Box.whole(scan.shape[1:])
    if len(core.shape) > nets[0].settings.dims:
        slices = [by_columns(nets, scan[:, z], tta, **about) for z in range(len(scan[0]))]
        return tuple(np.stack(each, axis=each[0].ndim - 2) for each in zip(*slices, strict=True))
    return rows_of(None, scan, core, engines=engines_of(nets, tta, device="cpu", **about))


@pytest.mark.parametrize(("network", "shape"), CASES.values(), ids=CASES)
def test_columns_and_tiles_give_the_mean_of_whole_passes(network, shape):
    nets, rule, scan = several(network), closed_form_rule(network), scan_of(shape)
    every = [whole(net, scan, rule) for net in nets]
    expected = np.mean(every, axis=0, dtype=np.float64)
    classes, likely = by_columns(nets, scan, Tta.NONE)
    assert likely.dtype == np.float32
    assert np.abs(likely - expected).max() <= 1e-5
    for by in (mean_of(nets, Tta.NONE), Mean(engines_of(nets, Tta.NONE, device="cpu"), network)):
        over = rule.over_slices() if len(shape) > network.dims else rule
        tiles = Predictor(by, rule, windows=WINDOWS[:1], tile_shape=tile_of(rule), device="cpu")
        raw = read_mirrored(scan, Box.whole(shape).round_up(over.stride).grow(over.halo))
        same, probabilities = tiles.segment_with_probabilities(raw, Box.whole(shape))
        assert np.abs(probabilities - expected).max() <= 1e-5
        assert_same_where_sure(same, classes, expected)
    assert all(np.abs(each - expected).max() > 0.1 for each in every)  # none of them says it alone


def assert_same_where_sure(a, b, likely):
    top = np.sort(likely, axis=0)
    sure = (top[-1] - top[-2] > 1e-4) & (np.abs(top[-1] - 0.5) > 1e-4)
    assert sure.mean() > 0.9
    assert np.array_equal(a[sure], b[sure])


@pytest.mark.parametrize("name", ["2-D", "sigmoid", "3-D"])
def test_each_network_sees_every_turn_and_all_count_alike(name):
    network, shape = CASES[name]
    shape = tuple(-(-n // s) * s for n, s in zip(shape, closed_form_rule(network).stride, strict=True))
    nets, rule, scan = several(network, n=2), closed_form_rule(network), scan_of(shape)
    expected = np.mean([averaged(net, scan, Tta.FLIPS, rule) for net in nets], axis=0)
    engines = engines_of(nets, Tta.FLIPS, device="cpu")
    assert len(engines) == Passes(2, Tta.FLIPS.n_turns(network.dims)).n
    _, likely = by_columns(nets, scan, Tta.FLIPS)
    assert np.abs(likely - expected).max() <= 1e-5
    raw = read_mirrored(scan, Box.whole(shape).grow(rule.halo))
    reference = Predictor(mean_of(nets, Tta.FLIPS), rule, windows=WINDOWS[:1],
                          tile_shape=tile_of(rule), device="cpu")  # fmt: skip
    assert np.abs(reference.segment_with_probabilities(raw, Box.whole(shape))[1] - expected).max() <= 1e-5


def test_values_of_a_linear_head_are_averaged_themselves():
    network, window = replace(FLAT, head=Head.LINEAR, n_classes=1), ((50.0, 0.1),)
    nets, rule, scan = several(network), closed_form_rule(network), scan_of((64, 33))
    expected = np.mean([whole(net, scan, rule) for net in nets], axis=0, dtype=np.float64) * 10 + 50
    core = Box.whole((64, 33))
    raw = read_mirrored(scan, core.round_up(rule.stride).grow(rule.halo))
    engines = engines_of(nets, Tta.NONE, device="cpu")
    for by in (mean_of(nets, Tta.NONE), Mean(engines, network)):
        tiles = Predictor(by, rule, windows=WINDOWS[:1], tile_shape=tile_of(rule), device="cpu",
                          target_windows=window)  # fmt: skip
        assert np.abs(tiles.values(raw, core) - expected).max() <= 1e-4
    columns = ColumnPredictor(*engines, windows=WINDOWS[:1], slab=16, target_windows=window)
    stream, boxes = columns.stream(core)
    slabs = (columns.staged(read_mirrored(scan, box)) for box in boxes)
    rows = [each.reals for each in columns.run(core, stream, slabs, probabilities=False)]
    assert np.abs(np.concatenate(rows, axis=1) - expected).max() <= 1e-4


def test_one_network_is_that_network_and_twice_the_same_is_it_too():
    net, scan = trained(FLAT, seed=5), scan_of((64, 33))
    alone = rows_of(net, scan, Box.whole((64, 33)))
    one = by_columns([net], scan, Tta.NONE)
    assert np.array_equal(one[0], alone[0])
    assert np.array_equal(one[1], alone[1])
    twice = by_columns([net, net], scan, Tta.NONE)
    assert np.abs(twice[1] - alone[1]).max() <= 1e-6
    assert_same_where_sure(twice[0], alone[0], alone[1])


def test_columns_taken_up_in_their_middle_make_the_same_bits():
    nets, scan = several(FLAT), scan_of((120, 33))
    engines = engines_of(nets, Tta.NONE, device="cpu")
    classes, likely = rows_of(None, scan, Box.whole((120, 33)), engines=engines)
    later = rows_of(None, scan, Box((40, 0), (120, 33)), engines=engines)
    assert np.array_equal(later[0], classes[40:])
    assert np.array_equal(later[1], likely[:, 40:])


def test_low_precision_is_averaged_in_float32():
    engines = engines_of(several(FLAT), Tta.NONE, device="cpu", precision=Precision.BF16)
    _, likely = rows_of(None, scan_of((64, 33)), Box.whole((64, 33)), engines=engines)
    assert len(np.unique(likely)) > 500  # bfloat16 has 256 numbers from one half to one


def an_ensemble(n=3, settings=FLAT):
    nets = several(settings, n)
    model = Model(
        settings, ("a", "b"), (0, 1), Normalisation.ZSCORE, ("0",), None, closed_form_rule(settings), {},
        together([net.state_dict() for net in nets]), n_networks=n,
    )  # fmt: skip
    return nets, model


def test_a_file_holds_all_networks_each_with_its_own_tensors(tmp_path):
    nets, model = an_ensemble()
    saved = save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert (again.n_networks, again.digest) == (3, saved.digest)
    assert save_model(again, tmp_path / "other").digest == saved.digest
    x = torch.randn((1, 1, 32, 32))
    for net, member, built in zip(nets, again.members, networks_of(again, "cpu"), strict=True):
        assert member.n_networks == 1
        assert all(torch.equal(tensor, member.weights[name]) for name, tensor in net.state_dict().items())
        assert torch.equal(built(x), net.to(memory_format=torch.channels_last)(x))
    assert again.passes(Tta.FLIPS) == Passes(3, 4)


def test_files_of_one_network_are_as_they_were_before_there_were_ensembles(tmp_path):
    shipped = Path(pipeline.demo.__file__).parent / "model.safetensors"
    shutil.copy(shipped, tmp_path / "before")
    model = load_model(tmp_path / "before")
    assert model.members == (model,)
    save_model(model, tmp_path / "after")
    before, after = (document_of(tmp_path / name) for name in ("before", "after"))
    assert before.pop("network").items() <= after.pop("network").items()  # which has fields that it then had not
    assert after == before
    assert all(torch.equal(model.weights[name], each) for name, each in load_model(tmp_path / "after").weights.items())


def document_of(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["haloseg"])


def rewritten(path, *, document=(), tensors=lambda weights: weights):
    """Change the document, or the tensors, of a model file."""
    about = document_of(path) | dict(document)
    path.write_bytes(save(tensors(load(path.read_bytes())), {"haloseg": json.dumps(about)}))


def without(weights, prefix):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(("change", "message"), [
    ({"document": {"n_networks": 2}}, "must begin with 0 to 1, the number of theirs, got 2"),
    ({"document": {"n_networks": 4}}, "tensors must be those of the network"),
    ({"document": {"n_networks": 1}}, "tensors must be those of the network"),
    ({"document": {"n_networks": 0}}, "a network or more, each with tensors, got 0 of"),
    ({"document": {"n_networks": 10**12}}, "a network or more, each with tensors, got 1000000000000 of"),
    ({"document": {"n_networks": True}}, "its number of networks is True"),
    ({"document": {"n_networks": "3"}}, "its number of networks is '3'"),
    ({"tensors": lambda weights: without(weights, "1.head")}, "tensors must be those of the network"),
    ({"tensors": lambda weights: {name.replace("2.", "02.", 1): each for name, each in weights.items()}},
     "must begin with 0 to 2"),
    ({"tensors": lambda weights: weights | {"1.head.bias": torch.tensor([float("nan"), 0.0])}}, "must be finite"),
])  # fmt: skip
def test_files_whose_networks_do_not_fit_are_refused(tmp_path, change, message):
    save_model(an_ensemble()[1], tmp_path / "m")
    load_model(tmp_path / "m")
    rewritten(tmp_path / "m", **change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m")


def test_an_older_haloseg_takes_an_ensemble_for_newer_than_itself(tmp_path):
    for n, written in ((1, 1), (3, 4)):
        model = an_ensemble(3)[1]
        model = model if n == 3 else model.members[0]
        save_model(model, tmp_path / "m")
        assert document_of(tmp_path / "m")["format"] == written


def test_tensors_come_apart_as_they_were_put_together():
    every = [UNet(FLAT).state_dict() for _ in range(11)]  # two digits, too
    parts = apart(together(every), 11)
    assert [list(part) for part in parts] == [list(each) for each in every]
    assert all(part[name] is each[name] for part, each in zip(parts, every, strict=True) for name in part)


def test_weights_count_in_the_file_for_each_stream_and_for_the_certificate():
    chain = chain_of(FLAT)
    n = sum(tensor.numel() for name, tensor in UNet(FLAT).named_parameters() if tensor.ndim > 1)
    largest = max(tensor.numel() for tensor in UNet(FLAT).parameters())
    for itemsize, passes, exactly in (
        (4, Passes(1, 1), max(12 * n, 8 * n + 16 * largest)), (4, Passes(3, 1), max(12 * n, 8 * n + 16 * largest)),
        (2, Passes(3, 4), (4 + 2 * 4 + 4) * n + 12 * largest), (4, Passes(1, 4), (4 + 4 * 4 + 4) * n + 16 * largest),
    ):  # fmt: skip
        assert weight_bytes(chain, itemsize=itemsize, passes=passes) == passes.n_networks * int(1.08 * exactly)
