from dataclasses import replace

import numpy as np
import pytest
import torch
from test_unet_fit import RECIPE, patches_of

from pipeline.unet.settings import Family
from pipeline.unet.training.batches import draw_batch
from pipeline.unet.training.checkpoint import Checkpoint, CheckpointFile
from pipeline.unet.training.learner import Learner, average_decay
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.recipe import Optimiser
from pipeline.unet.training.warp import batch_of


def learner_of(recipe, *, dims=2):
    settings = recipe.network(dims=dims, in_channels=1, n_classes=2)
    patches, _ = patches_of((128, 144) if dims == 2 else (32, 40, 72), settings, recipe)
    learner = Learner.new(settings, objective=Objective(), recipe=recipe, device="cpu")
    return learner, batch_of(draw_batch(patches, 2, seed=0, step=1), device="cpu")


def test_the_average_is_what_numpy_makes_of_the_weights_after_each_step():
    learner, batch = learner_of(replace(RECIPE, ema=0.8))
    expected = {name: tensor.numpy().astype(np.float64) for name, tensor in learner.network.state_dict().items()}
    for step in range(1, 61):
        learner.learn(batch, step=step, rate=0.01)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, tensor in learner.network.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.numpy().astype(np.float64)
            else:
                expected[name] = tensor.numpy().copy()
    kept = learner.weights()
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        assert np.allclose(tensor.numpy(), expected[name], rtol=1e-4, atol=1e-6), name
    moved = learner.network.state_dict()["head.weight"]
    assert not torch.allclose(kept["head.weight"], moved, rtol=1e-3)


def test_the_average_begins_fast_and_keeps_to_its_decay():
    assert average_decay(0.99, step=1) == pytest.approx(2 / 11)
    assert average_decay(0.99, step=10**6) == 0.99


def test_without_an_average_the_network_itself_is_kept():
    learner, batch = learner_of(RECIPE)
    learner.learn(batch, step=1, rate=0.01)
    assert learner.kept is learner.network
    assert not any(name.startswith("average.") for name in learner.state())


def test_what_was_put_down_is_not_changed_by_the_next_step():
    learner, batch = learner_of(replace(RECIPE, ema=0.5))
    learner.learn(batch, step=1, rate=0.01)
    state = learner.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    learner.learn(batch, step=2, rate=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    learner.restore(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state().items())


@pytest.mark.parametrize("optimiser", Optimiser)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_learner_from_a_checkpoint_is_laid_out_in_memory_as_one_that_went_on(dims, optimiser, tmp_path):
    recipe = replace(RECIPE, optimiser=optimiser, momentum=0.9, ema=0.5, patch=32 if dims == 2 else 16)
    went_on, batch = learner_of(recipe, dims=dims)
    went_on.learn(batch, step=1, rate=0.01)
    file, (taken_up, _) = CheckpointFile(str(tmp_path / "c"), {}), learner_of(recipe, dims=dims)
    file.save(Checkpoint(0.0, (), went_on.state(), {}))
    taken_up.restore(file.load().state)

    def layout(learner):
        memory = learner.optimizer.state_dict()["state"]
        held = {f"{number}.{name}": t for number, each in memory.items() for name, t in each.items()}
        held |= learner.network.state_dict() | {f"kept.{name}": t for name, t in learner.kept.state_dict().items()}
        return {name: (t.device, t.dtype, t.shape, t.squeeze().stride()) for name, t in held.items()}

    assert layout(taken_up) == layout(went_on)
    for learner in (went_on, taken_up):
        learner.learn(batch, step=2, rate=0.01)
    after = taken_up.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in went_on.state().items())


def test_a_state_taken_up_is_not_changed_by_the_next_step():
    learner, batch = learner_of(replace(RECIPE, ema=0.5))
    learner.learn(batch, step=1, rate=0.01)
    state = learner.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    learner.restore(state)
    learner.learn(batch, step=2, rate=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_the_loss_held_out_does_not_hang_on_the_rounding_of_gradients():
    recipe = replace(RECIPE, dropout=0.0, ema=0.5, learning_rate=1e-3)
    losses = []
    for seed in range(3):
        torch.manual_seed(0)
        learner, batch = learner_of(recipe)
        drawn = torch.Generator().manual_seed(seed)
        for weight in learner.network.parameters():
            if weight.requires_grad and seed:  # as rounding does, by 2e-7 of the largest
                weight.register_hook(lambda g, d=drawn: g + 2e-7 * g.abs().max() * torch.randn(g.shape, generator=d))
        for step in range(1, 5):
            learner.learn(batch, step=step, rate=1e-3)
        with torch.inference_mode():
            losses.append(float(learner.objective(learner.kept.eval()(batch.images), batch.classes)))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-5)


def test_deep_supervision_learns_by_the_mean_loss_of_all_depths_and_infers_by_their_mean():
    torch.manual_seed(0)
    learner, batch = learner_of(replace(RECIPE, family=Family.NESTED, deep_supervision=True, batch_norm=False))
    with torch.no_grad():
        heads = learner.network.supervised(batch.images)
        assert len(heads) == RECIPE.depth
        assert torch.allclose(learner.network(batch.images), torch.stack(heads).mean(0), atol=1e-6)
        expected = torch.stack([learner.objective(each, batch.classes, batch.borders) for each in heads]).mean()
    assert learner.learn(batch, step=1, rate=0.0).item() == pytest.approx(expected.item(), rel=1e-6)
