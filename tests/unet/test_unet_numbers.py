"""What a network sees is the same in training and at inference."""

import numpy as np
import pytest
import torch

from pipeline.geometry.box import Box
from pipeline.store.scaling import Scaling, Window
from pipeline.store.statistics import Histogram, Normalisation, merge
from pipeline.unet.numbers import normalised
from pipeline.unet.training.source import Source

SCALINGS = {
    how: Scaling(how, ((-160.0, 240.0), (0.0, 90.0)) if how is Normalisation.WINDOW else ()) for how in Normalisation
}


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
    inferred = normalised(voxels, windows, device=torch.device("cpu"))
    assert inferred.dtype == torch.float32
    np.testing.assert_allclose(inferred.numpy(), learnt, rtol=0, atol=2e-6)
    if how is Normalisation.WINDOW:
        assert learnt[1].max() == float(inferred[1].max()) == 1  # intensities go on to 199


def test_limits_hold_for_each_channel_alone():
    raw = np.array([[-5, 0, 5], [-5, 0, 5]], np.int16)
    windows = (Window(0.0, 0.1, 0.0, 0.3), Window(0.0, 1.0))
    seen = normalised(raw, windows, device=torch.device("cpu"))
    assert torch.equal(seen, torch.tensor([[0.0, 0.0, 0.3], [-5.0, 0.0, 5.0]]))
    assert torch.equal(normalised(raw, ((0.0, 1.0),) * 2, device=torch.device("cpu")), torch.tensor(raw).float())
