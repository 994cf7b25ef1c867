from dataclasses import replace

import pytest
import torch
from test_unet_fit import RECIPE, fitted

from pipeline.errors import ArgumentError, ModelError
from pipeline.unet.settings import Padding
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.checkpoint import Checkpoint, CheckpointFile
from pipeline.unet.training.course import Validation
from pipeline.unet.training.recipe import Optimiser, Schedule

RUN = {"recipe": {"steps": 3, "augmentation": {"noise": 0.1}}, "seed": 0, "images": [{"image": "a.zarr"}]}
SHORT = replace(RECIPE, steps=7, validate_every=2)


class KilledError(Exception):
    """Stands for what ends a run."""


def stop_at(n_validations):
    """Return what is told of progress and ends the run at a validation."""
    told = []

    def on_progress(now):
        told.append(now)
        if len(told) == n_validations:
            raise KilledError

    return on_progress


def some(path, run=RUN) -> CheckpointFile:
    file = CheckpointFile(str(path), run)
    state = {"network.a": torch.arange(6.0).reshape(2, 3), "optimiser.0.step": torch.tensor(3.0)}
    best = {"a": torch.ones(2, 3), "n": torch.tensor(3)}
    file.save(Checkpoint(12.5, (Validation(20, 0.1, 1 / 3, (0.7, None)),), state, best))
    return file


CHANGED = Augmentation(rotation_degrees=90, elastic_sigma_voxels=2, noise=0.1, gamma=0.3)
RECIPES = {
    "adamw": SHORT,
    "average, dropout, warped": replace(SHORT, ema=0.9, dropout=0.3, augmentation=CHANGED, weight_decay=0.01),
    "momentum, valid, plateau": replace(
        SHORT, optimiser=Optimiser.SGD, momentum=0.9, padding=Padding.VALID, schedule=Schedule.PLATEAU,
        plateau_patience=1, learning_rate=0.3,
    ),
    "no momentum, patience": replace(SHORT, optimiser=Optimiser.SGD, momentum=0.0, patience=3, clip_norm=1.0),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_run_that_was_stopped_ends_in_the_same_weights(recipe, tmp_path):
    settings = recipe.network(dims=2, in_channels=1, n_classes=2)
    undisturbed = CheckpointFile(str(tmp_path / "a"), RUN)
    expected = fitted(settings, recipe=recipe, seed=3, checkpoint=undisturbed)
    file, told = CheckpointFile(str(tmp_path / "b"), RUN), []
    for n in (1, 3):  # a run that goes on is told of what was before it, so the second ends two validations later
        with pytest.raises(KilledError):
            fitted(settings, recipe=recipe, seed=3, checkpoint=file, on_progress=stop_at(n))
    result = fitted(settings, recipe=recipe, seed=3, checkpoint=file, on_progress=told.append)
    assert (result.n_before, result.n_steps) == (6, expected.n_steps)
    assert result.curve == expected.curve == tuple(told)
    assert result.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, result.weights[name]) for name, tensor in expected.weights.items())
    last, same = undisturbed.load(), file.load()
    assert last.state.keys() == same.state.keys()
    assert all(torch.equal(tensor, same.state[name]) for name, tensor in last.state.items())


def test_a_run_that_was_stopped_after_its_end_only_ends(tmp_path):
    file = CheckpointFile(str(tmp_path / "c"), RUN)
    settings = SHORT.network(dims=2, in_channels=1, n_classes=2)
    expected = fitted(settings, recipe=SHORT, checkpoint=file)
    content = (tmp_path / "c").read_bytes()
    again = fitted(settings, recipe=SHORT, checkpoint=file)
    assert (again.n_before, again.n_steps, again.curve) == (7, 7, expected.curve)
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in expected.weights.items())
    assert (tmp_path / "c").read_bytes() == content


def test_time_is_counted_over_restarts(tmp_path):
    recipe = replace(SHORT, steps=10**6)
    file, settings = CheckpointFile(str(tmp_path / "c"), RUN), recipe.network(dims=2, in_channels=1, n_classes=2)
    with pytest.raises(KilledError):
        fitted(settings, recipe=recipe, checkpoint=file, minutes=60, on_progress=stop_at(2))
    there = file.load()
    assert 0 < there.elapsed_s < 60
    file.save(replace(there, elapsed_s=3599.9))
    assert fitted(settings, recipe=recipe, checkpoint=file, minutes=60).n_steps < 1000
    file.save(replace(there, elapsed_s=3600.0))
    assert fitted(settings, recipe=recipe, checkpoint=file, minutes=60).n_steps == 4


def test_what_is_written_is_read(tmp_path):
    read = some(tmp_path / "c").load()
    assert (read.elapsed_s, read.curve) == (12.5, (Validation(20, 0.1, 1 / 3, (0.7, None)),))
    assert torch.equal(read.state["network.a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read.state["optimiser.0.step"], torch.tensor(3.0))
    assert torch.equal(read.best["n"], torch.tensor(3))
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


def test_there_is_none_before_the_first_and_after_the_removal(tmp_path):
    file = CheckpointFile(str(tmp_path / "c"), RUN)
    assert file.load() is None
    file.remove()
    (tmp_path / ".c.0f.partial").write_bytes(b"of a run that was killed while it wrote")
    some(tmp_path / "c").remove()
    assert file.load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (RUN | {"seed": 7}, "got seed 7 where .*c has 0; use those, or delete"),
        (RUN | {"recipe": {"steps": 3, "augmentation": {"noise": 0.2}}}, "recipe.augmentation.noise 0.2 where .* 0.1"),
        (RUN | {"images": [{"image": "b.zarr"}]}, "images.0.image 'b.zarr' where .* has 'a.zarr'"),
        (RUN | {"images": [*RUN["images"], {"image": "b.zarr"}]}, "images.1.image 'b.zarr' where .* has None"),
        ({"seed": 1}, "got images.0.image None and 3 more where"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(run, named, tmp_path):
    some(tmp_path / "c")
    with pytest.raises(ArgumentError, match=f"goes on with the settings it began with, .*{named}") as caught:
        CheckpointFile(str(tmp_path / "c"), run).load()
    assert "\n" not in str(caught.value)


def test_one_wrong_byte_anywhere_is_noticed(tmp_path):
    file = some(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    for at in range(0, len(content), 3):
        (tmp_path / "c").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ModelError, match=r"a checkpoint must be undamaged .* delete it to begin anew") as caught:
            file.load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ModelError, match="a checkpoint must be undamaged"):
        CheckpointFile(str(tmp_path / "c"), RUN).load()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    file = some(tmp_path / "c")
    with pytest.raises(ModelError, match=r"a checkpoint must be of this network and optimiser, .* delete it") as caught:
        fitted(SHORT.network(dims=2, in_channels=1, n_classes=2), recipe=SHORT, checkpoint=file)
    assert "\n" not in str(caught.value)
