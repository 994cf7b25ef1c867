"""Columns: one result, however far ahead the device is given slabs, and with however little memory."""

import numpy as np
import pytest
import torch
from test_unet_predict import WINDOWS, scan_of, trained, whole

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.unet.calibrate import rows_per_s
from pipeline.unet.column import ColumnPredictor
from pipeline.unet.engine import Engine
from pipeline.unet.engines import make_engine
from pipeline.unet.predict import Predictor
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule

NETWORK = UNetSettings(dims=2, width=4, depth=2, padding=Padding.SAME, batch_norm=True)
SHAPE = (120, 33)


def rows_of(net, scan, core, *, taken=None, engines=(), **about):
    """Return (classes, probabilities) of a core, put together; ``taken`` gets the slabs given before each result."""
    engines = engines or (make_engine(net, device="cpu"),)
    predictor = ColumnPredictor(*engines, windows=WINDOWS[:1], slab=16, **about)
    stream, boxes = predictor.stream(core)
    n_given, found = 0, []

    def slabs():
        nonlocal n_given
        for box in boxes:
            n_given += 1
            yield predictor.staged(read_mirrored(scan, box))

    for rows in predictor.run(core, stream, slabs(), probabilities=True):
        found.append(rows)
        if taken is not None:
            taken.append(n_given)
    assert [rows.box.start[0] for rows in found] == [core.start[0], *(rows.box.stop[0] for rows in found[:-1])]
    return np.concatenate([rows.classes for rows in found]), np.concatenate([rows.reals for rows in found], axis=1)


@pytest.mark.parametrize("start", [0, 40])
def test_a_device_that_is_given_slabs_ahead_makes_the_same(start):
    net, scan, core = trained(NETWORK, seed=0), scan_of(SHAPE), Box((start, 0), SHAPE)
    plain, ahead = [], []
    classes, likely = rows_of(net, scan, core, taken=plain)
    for n_ahead in (1, 3, 100):
        ahead.clear()
        got = rows_of(net, scan, core, taken=ahead, n_ahead=n_ahead)
        assert np.array_equal(got[0], classes)
        assert np.array_equal(got[1], likely)
        assert ahead == [plain[min(at + n_ahead, len(plain) - 1)] for at in range(len(plain))]
    expected = whole(net, scan, closed_form_rule(NETWORK))[:, start:]
    assert np.abs(likely - expected).max() <= 1e-5


class Watched(Engine):
    """An engine that remembers how exactly a GPU was to multiply, and whether by the same kernels each time."""

    def conv(self, at, x, *, padding=()):
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        self.seen = {*getattr(self, "seen", ()), (*flags, torch.backends.cudnn.deterministic)}
        return super().conv(at, x, padding=padding)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_rounds_to_tf32_where_that_was_asked_for_and_nowhere_else(tf32):
    net, scan, core = trained(NETWORK, seed=2), scan_of(SHAPE), Box.whole(SHAPE)
    rule = closed_form_rule(NETWORK)

    def by_columns(engine):
        rows_of(net, scan, core, engines=(engine,))

    def by_tiles(engine):
        raw = read_mirrored(scan, core.round_up(rule.stride).grow(rule.halo))
        tile = rule.tile_shape((40, 36))
        Predictor(engine, rule, windows=WINDOWS[:1], tile_shape=tile, device="cpu").segment(raw, core)

    def by_noise(engine):
        rows_per_s(engine, cross=SHAPE[1:], slab=16, seconds=1e-3)

    for run in (by_columns, by_tiles, by_noise):
        engine = Watched(net, device="cpu", tf32=tf32)
        run(engine)
        assert engine.seen == {(tf32, tf32, True)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch built for it")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_columns_on_a_gpu_give_what_the_whole_gives_on_a_cpu(dtype):
    net, scan, core = trained(NETWORK, seed=1), scan_of((600, 333), dtype=dtype), Box.whole((600, 333))
    expected = whole(net, scan, closed_form_rule(NETWORK))
    taken = []
    classes, likely = rows_of(net, scan, core, engines=(make_engine(net, device="cuda"),), taken=taken)
    assert taken[0] > 1
    assert np.abs(likely - expected).max() <= 1e-5
    assert (classes == expected.argmax(0))[np.abs(expected[0] - expected[1]) > 2e-5].all()
