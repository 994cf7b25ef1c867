"""The law of streaming for every family: networks that branch come out as one pass over the whole scan, too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet_columns import streaming
from test_unet_families import EVERY, NETWORKS, SAME
from test_unet_predict import trained
from test_unet_streaming import check_a_stream_of_any_part, noise, streamed, whole
from torch.utils.flop_counter import FlopCounterMode

from pipeline.unet.columns import Columns
from pipeline.unet.engine import Engine
from pipeline.unet.engines import make_engine
from pipeline.unet.families import chain_of
from pipeline.unet.layers import Conv, Gate, Join, Sum, parts
from pipeline.unet.schedule import Ring, schedule_of
from pipeline.unet.settings import FCN_LEAST_DEPTH, Block, Down, Family, Padding, UNetSettings, Upsampling


@st.composite
def networks(draw, dims):
    family = draw(st.sampled_from(Family if dims == 2 else (Family.UNET, Family.NESTED)))
    depth = draw(st.integers(1, 4 - dims if family is Family.NESTED else 5 - dims))
    depth = FCN_LEAST_DEPTH if family is Family.FCN else depth
    is_unet = family is Family.UNET
    pooling = st.tuples(*(st.integers(1, 2),) * dims).filter(lambda each: 2 in each)
    return UNetSettings(
        dims=dims, in_channels=draw(st.integers(1, 2)), width=draw(st.integers(1, 3)), depth=depth,
        padding=draw(st.sampled_from(Padding)) if is_unet else Padding.SAME,
        kernel=draw(st.sampled_from((1, 3, 5) if depth == 1 else (1, 3))), n_convs=draw(st.integers(1, 2)),
        batch_norm=draw(st.booleans()), up=draw(st.sampled_from(Upsampling)), up_bias=draw(st.booleans()),
        double_before_pooling=is_unet and draw(st.booleans()), family=family, block=draw(st.sampled_from(Block)),
        down=draw(st.sampled_from(Down)), attention=is_unet and draw(st.booleans()),
        deep_supervision=family is Family.NESTED and draw(st.booleans()),
        poolings=draw(st.one_of(st.just(()), st.tuples(*(pooling,) * depth))),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_stream_through_any_family_is_the_whole_pass(data):
    check_a_stream_of_any_part(data, networks, longest={2: 33, 3: 9})


@EVERY
def test_the_multiplications_of_a_column_are_those_that_run_and_make_the_whole_pass(network):
    shape = (2 * network.stride + 5, 19) if network.dims == 2 else (9, 14, 11)
    net, x, axis = trained(network, seed=0), noise(shape, 1).float(), network.dims - 1
    flops = FlopCounterMode(display=False)
    with flops:
        got = streamed(Engine(net, device="cpu", first=axis), x, (0,) * len(shape), shape, slab=2 * network.stride)
    assert (got - whole(net, x)).abs().max() <= 2e-5 * (1 + got.abs().max())
    what = streaming(shape, tuple(-(-n // 16) * 16 for n in shape), network)
    cost = what.cost(Columns(axis, 2 * network.stride, (1,) * len(shape), shape), n_workers=1)
    assert 2 * cost.multiply_adds == flops.get_total_flops()


@pytest.mark.parametrize("name", ["all at once", "U-Net++, three deep", "FCN"])
def test_a_branching_column_taken_up_in_its_middle_has_the_same_bits(name):
    network = replace(NETWORKS[name], width=8)
    engine, x = make_engine(trained(network, seed=3), device="cpu"), noise((90, 40), 1).float()
    first = streamed(engine, x, (0, 0), (90, 40), slab=8)
    for row in (8, 33, 64, 89):
        assert torch.equal(streamed(engine, x, (row, 0), (90, 40), slab=8), first[:, :, row:])


def schedule(network, *, slab):
    order = tuple(range(network.dims))
    return schedule_of(chain_of(network), ((0, 64),) * (network.dims - 1), in_channels=1, order=order, slab=slab)


@EVERY
def test_branches_that_meet_are_at_the_same_row_and_wait_no_longer_than_their_rings(network):
    plan = schedule(network, slab=2 * network.stride)
    for at, layer in enumerate(plan.chain):
        for taken in plan.takes[at]:
            for part in taken:
                row = plan.lags[part.tensor] - part.delay - (layer.reach[0] if isinstance(layer, Conv) else 0)
                assert part.delay >= 0
                assert not (isinstance(layer, Conv) or layer.skips) or row == plan.lags[at + 1]
                if part.delay:
                    assert plan.n_rows[part.tensor] + part.delay <= plan.rings[part.tensor].n_rows
    assert all(lag <= 0 for lag in plan.lags)
    assert {tensor for taken in plan.freed for tensor in taken} | {len(plan.chain)} == plan.at_hand


def test_a_skip_waits_for_the_levels_below_it_and_no_row_longer():
    # the pooling is one row ahead of its skip, whose pairs begin at an odd row; the two convolutions below it reach two
    # rows, which are four of the skip's
    plan = schedule(UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME), slab=16)
    assert plan.lags == (0, -1, -2, -1, -2, -3, -6, -6, -7, -8, -8)
    assert plan.rings == {2: Ring(16 + 4, ((-2, 66),))}


def test_what_gates_and_shortcuts_see_waits_once():
    gated = schedule(replace(SAME, attention=True), slab=16)
    skips = [layer.skips[0] for layer in gated.chain if isinstance(layer, Gate)]
    assert sorted(gated.rings) == sorted(skips)  # not what the gates make of them, too
    residual = schedule(replace(SAME, block=Block.RESIDUAL), slab=16)
    sums = [layer for layer in residual.chain if isinstance(layer, Sum)]
    entered = {part for layer in sums for part in parts(residual.chain, residual.chain[layer.skips[0] - 1].source)}
    assert entered.union(*(layer.skips for layer in residual.chain if isinstance(layer, Join))) == set(residual.rings)
