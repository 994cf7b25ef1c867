import numpy as np
import pytest

from pipeline.errors import ArgumentError
from pipeline.store.scaling import Scaling, Window
from pipeline.store.statistics import ChannelStatistics, Histogram, Normalisation, merge

HOUNSFIELD = ((-160.0, 240.0),)


def statistics_of(*channels):
    return merge([tuple(Histogram.of(channel) for channel in channels)])


def seen(voxels, window):
    offset, scale, low, high = window
    return np.clip((voxels.astype(np.float64) - offset) * scale, low, high)


def test_zscore_has_mean_0_and_deviation_1():
    voxels = np.random.default_rng(0).normal(70, 9, 5000).astype(np.float32)
    (window,) = Scaling().windows(statistics_of(voxels), dtype="float32")
    assert abs(seen(voxels, window).mean()) < 1e-9
    assert seen(voxels, window).std() == pytest.approx(1)


@pytest.mark.parametrize(
    ("scaling", "dtype", "low", "high"),
    [
        (Scaling(Normalisation.RANGE), "uint16", 0, 999), (Scaling(Normalisation.PERCENTILE), "uint16", 9, 989),
        (Scaling(Normalisation.PERCENTILE, ((0.5, 99.5),)), "uint16", 4, 994),
        (Scaling(Normalisation.PERCENTILE, ((0.0, 100.0),)), "uint16", 0, 999),
        (Scaling(Normalisation.DTYPE), "uint16", 0, 65535), (Scaling(Normalisation.DTYPE), "int8", -128, 127),
        (Scaling(Normalisation.DTYPE), "bool", 0, 1), (Scaling(Normalisation.WINDOW, HOUNSFIELD), "int16", -160, 240),
    ],
)  # fmt: skip
def test_the_limits_become_0_and_1(scaling, dtype, low, high):
    (window,) = scaling.windows(statistics_of(np.arange(1000, dtype=np.uint16)), dtype=dtype)
    assert seen(np.array([low, high]), window) == pytest.approx([0, 1], abs=1e-12)


def test_a_window_alone_clamps_what_is_outside():
    voxels = np.array([-1024, -160, 40, 240, 3000], np.int16)
    window = Scaling(Normalisation.WINDOW, HOUNSFIELD).windows(statistics_of(voxels), dtype="int16")[0]
    assert seen(voxels, window) == pytest.approx([0, 0, 0.5, 1, 1])
    for how in set(Normalisation) - {Normalisation.WINDOW}:
        assert Scaling(how).windows(statistics_of(voxels), dtype="int16")[0][2:] == (-np.inf, np.inf)


def test_channels_have_one_window_for_all_or_each_its_own():
    both = statistics_of(*np.arange(20, dtype=np.int16).reshape(2, 10))
    assert Scaling(Normalisation.WINDOW, ((0.0, 4.0),)).windows(both, dtype="int16") == (Window(0, 0.25, 0, 1),) * 2
    own = Scaling(Normalisation.WINDOW, ((0.0, 4.0), (10.0, 12.0))).windows(both, dtype="int16")
    assert own == (Window(0, 0.25, 0, 1), Window(10, 0.5, 0, 1))
    with pytest.raises(ArgumentError, match="one for each of 2 channels, got 3; give 2"):
        Scaling(Normalisation.WINDOW, ((0.0, 4.0),) * 3).windows(both, dtype="int16")


@pytest.mark.parametrize("how", [Normalisation.ZSCORE, Normalisation.PERCENTILE, Normalisation.RANGE])
def test_a_constant_image_is_zero(how):
    constant = np.full(9, 3, np.uint8)
    (window,) = Scaling(how).windows(statistics_of(constant), dtype="uint8")
    assert window.scale == 1
    assert not seen(constant, window).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scaling(Normalisation.WINDOW), "needs its limits .* got none; set window"),
        (lambda: Scaling(Normalisation.WINDOW, ((5.0, 5.0),)), "the lower one first, got 5 and 5"),
        (lambda: Scaling(Normalisation.WINDOW, ((0.0, float("nan")),)), "must be two numbers"),
        (lambda: Scaling(Normalisation.PERCENTILE, ((-1.0, 99.0),)), "percentiles must be from 0 to 100"),
        (lambda: Scaling(Normalisation.ZSCORE, HOUNSFIELD), "limits belong to window and percentile"),
        (lambda: Scaling.of(Normalisation.ZSCORE, window=HOUNSFIELD), "needs normalisation = window, got zscore"),
        (lambda: Scaling.of(Normalisation.PERCENTILE, percentiles=(1.0,)), r"must be two numbers.*got \(1.0,\)"),
        (
            lambda: Scaling(Normalisation.PERCENTILE, ((4.0, 98.0),)).windows(
                statistics_of(np.arange(9)), dtype="int64"),
            "those that ingest has stored, 0, 0.1, 0.2, 0.5, .* got 4; take two of them",
        ),
        (
            lambda: Scaling(Normalisation.DTYPE).windows(statistics_of(np.arange(9.0)), dtype="float64"),
            "normalisation dtype needs integers, got float64; use range",
        ),
    ],
)  # fmt: skip
def test_limits_that_are_none_are_refused_in_one_line(make, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_images_of_before_have_the_percentiles_that_they_have():
    (now,) = statistics_of(np.arange(1000, dtype=np.uint16))
    document = now.to_json()
    del document["percentiles"]["0.5"]
    before = ChannelStatistics.from_json(document)
    usual = Scaling(Normalisation.PERCENTILE)
    assert usual.windows([before], dtype="uint16") == usual.windows([now], dtype="uint16")
    with pytest.raises(ArgumentError, match=r"got 0.5; take two of them, or ingest again"):
        Scaling(Normalisation.PERCENTILE, ((0.5, 99.5),)).windows([before], dtype="uint16")
