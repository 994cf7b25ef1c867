"""What a network sees is the same in training and at inference."""

import numpy as np
import pytest
import torch

from pipeline.geometry.box import Box
from pipeline.geometry.mirror import read_mirrored
from pipeline.store.moments import Moments, PlaneSums
from pipeline.store.scaling import Scaling, SliceWindows, Window
from pipeline.store.statistics import Histogram, Normalisation, merge
from pipeline.unet.numbers import normalised
from pipeline.unet.training.orientation import orientations
from pipeline.unet.training.source import Source
from pipeline.unet.transfer import staged

SCALINGS = {
    how: Scaling(how, ((-160.0, 240.0), (0.0, 90.0)) if how is Normalisation.WINDOW else ()) for how in Normalisation
}



def seen_of(raw, windows):
    cpu = torch.device("cpu")
    return normalised(staged(raw, device=cpu), windows, device=cpu)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        (how, dtype) for how in SCALINGS for dtype in ("uint8", "int16", "uint32", "float32", "float64")
        if how is not Normalisation.DTYPE or dtype[0] != "f"
    ],
)  # fmt: skip
def test_training_and_inference_see_the_same_numbers(how, dtype):
    voxels = np.random.default_rng(0).integers(0, 200, (2, 6, 7)).astype(dtype)
    voxels[0] += np.array(50, dtype)
    windows = SCALINGS[how].windows(merge([tuple(map(Histogram.of, voxels))]), dtype=dtype)
    learnt = Source(voxels, voxels[0], windows, Box.whole((6, 7))).intensities(Box.whole((6, 7)))
    inferred = seen_of(voxels, windows)
    assert inferred.dtype == torch.float32
    np.testing.assert_allclose(inferred.numpy(), learnt, rtol=0, atol=2e-6)
    if how is Normalisation.WINDOW:
        assert learnt[1].max() == float(inferred[1].max()) == 1  # intensities go on to 199


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "int16", "float32"])
@pytest.mark.parametrize("turn", orientations((4, 4, 4), halo=(0, 0, 0), voxel_size_um=None)[::7], ids=str)
def test_voxels_that_are_turned_and_looked_up_are_those_of_the_formula(dtype, turn):
    voxels = np.random.default_rng(0).integers(-128, 128, (2, 9, 10, 11)).astype(dtype)
    windows, box = (Window(3.7, 1 / 3, -0.5, 4.0), Window(-11.0, 0.1)), Box((1, -2, 3), (9, 8, 14))
    source = Source(voxels, voxels[0], windows, Box.whole(voxels.shape[1:]))
    seen = read_mirrored(voxels, box).astype(np.float64)
    exact = [np.clip((x - w.offset) * w.scale, w.low, w.high) for x, w in zip(seen, windows, strict=True)]
    got = source.intensities(box, turn)
    assert got.dtype == np.float32
    assert np.array_equal(got, turn.apply(np.array(exact)).astype(np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float64"])
def test_training_and_inference_see_the_same_numbers_of_each_slice(dtype):
    voxels = (np.random.default_rng(0).integers(0, 200, (2, 5, 6, 7)) // np.arange(1, 6)[:, None, None]).astype(dtype)
    sums = PlaneSums(n_channels=2, n_planes=5)
    sums.add(Moments.of(voxels, start=0))
    windows, box = SliceWindows.of(sums.statistics()), Box((2, -3, 1), (4, 5, 9))
    learnt = Source(voxels, voxels[0], windows, Box.whole((5, 6, 7))).intensities(box)
    own = [[(c - c.mean()) / c.std() for c in channel[2:4].astype(np.float64)] for channel in voxels]
    around = (*((0, 0),) * 2, (3, 0), (0, 2))
    np.testing.assert_allclose(learnt, np.pad(own, around, mode="reflect")[:, :, :8, 1:], atol=1e-5)
    raw = np.pad(voxels, around, mode="reflect")[:, 2:4, :8, 1:]
    inferred = seen_of(raw, windows.between(2, 4))
    np.testing.assert_allclose(inferred.numpy(), learnt, rtol=0, atol=2e-6)


def test_limits_hold_for_each_channel_alone():
    raw = np.array([[-5, 0, 5], [-5, 0, 5]], np.int16)
    windows = (Window(0.0, 0.1, 0.0, 0.3), Window(0.0, 1.0))
    seen = seen_of(raw, windows)
    assert torch.equal(seen, torch.tensor([[0.0, 0.0, 0.3], [-5.0, 0.0, 5.0]]))
    assert torch.equal(seen_of(raw, ((0.0, 1.0),) * 2), torch.tensor(raw).float())
