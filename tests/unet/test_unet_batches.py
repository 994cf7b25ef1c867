import numpy as np
import pytest
from test_unet_fit import RECIPE, patches_of

from pipeline.unet.training.batches import batches, draw_batch, network_seed
from pipeline.unet.training.warp import batch_of


@pytest.fixture(scope="module", params=[0.0, 0.5])
def patches(request):
    learn, _ = patches_of((128, 144), RECIPE.network(dims=2, in_channels=1, n_classes=2))
    return learn.with_foreground(request.param) if request.param else learn


def seen(drawn):
    return batch_of(drawn, device="cpu").images.numpy()


@pytest.mark.parametrize(("first", "ahead"), [(1, 1), (1, 3), (1, 20), (5, 1), (5, 2)])
def test_patches_are_the_same_however_far_ahead_they_are_read(patches, first, ahead):
    steps = list(batches(patches, 3, seed=7, first=first, last=8, ahead=ahead))
    assert [step for step, _ in steps] == list(range(first, 9))
    for step, drawn in steps:
        assert np.array_equal(seen(drawn), seen(draw_batch(patches, 3, seed=7, step=step)))


def test_steps_and_seeds_differ(patches):
    shown = [seen(draw_batch(patches, 2, seed=seed, step=step)).tobytes() for seed, step in ((0, 1), (1, 0), (1, 1))]
    assert len(set(shown)) == 3
    assert len({network_seed(seed, step) for seed in range(20) for step in range(20)}) == 400


def test_nothing_is_drawn_after_the_end(patches):
    assert list(batches(patches, 2, seed=0, first=4, last=3)) == []
