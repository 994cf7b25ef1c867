"""A model that is there is never lost to another: the same command keeps it, any other is refused."""

import json
from pathlib import Path

import pytest
from foreign import Encoder, random_network, saved
from test_train import image_of, textures
from volumes import model_file, tree_digest

from pipeline import cli
from pipeline.unet.settings import UNetSettings

pytestmark = pytest.mark.usefixtures("one_thread")
TOML = "width = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 4\nvalidate_every = 2\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_of(tmp_path, "a", *textures((96, 96)))
    Path("r.toml").write_text(TOML)
    return tmp_path


def told(capsys, *command, code=0):
    assert cli.main([*map(str, command), "--json"]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out) if not code else printed.err.splitlines()[-1]


def training(*more):
    given = {"labels": "truth", "model": "m.safetensors", "recipe": "r.toml", "device": "cpu"}
    return ["train", "a.zarr", *(part for name, value in given.items() for part in (f"--{name}", value)), *more]


def test_a_training_keeps_its_own_model_and_refuses_any_other(folder, capsys):
    made = told(capsys, *training())
    before = tree_digest(folder)
    for lost in ("m.safetensors.sample.png", "m.safetensors.curves.png"):  # as by a kill after the model was written
        Path(lost).unlink()
    Path("m.safetensors.checkpoint").write_bytes(b"left")
    again = told(capsys, *training())
    assert again | {"wall_s": 0} == made | {"wall_s": 0, "steps_before": made["steps"]}
    assert tree_digest(folder) == before
    assert cli.main(training()) == 0
    assert "m.safetensors was made by the same command before, and stays as it is" in capsys.readouterr().err
    for more, why in [
        (("--seed", "1"), "of a training with seed 1 where it has 0"),
        (("--minutes", "1"), "of a training with minutes 1.0 where it has None"),
        (("--members", "2"), "of 1 networks, not 2"),
    ]:
        refused = told(capsys, *training(*more), code=2)
        assert f"must not replace another file, got m.safetensors, {why}; name a new file, or delete that" in refused
    Path("r.toml").write_text(TOML.replace("steps = 4", "steps = 6"))
    assert "with recipe.steps 6 where it has 4" in told(capsys, *training(), code=2)
    Path("r.toml").write_text(TOML)
    assert tree_digest(folder) == before
    Path("m.safetensors").write_bytes(b"")  # a file that mktemp has made
    told(capsys, *training())
    assert tree_digest(folder) == before


def test_an_ensemble_that_was_trained_is_kept(folder, capsys):
    made = told(capsys, *training("--members", "2"))
    before = tree_digest(folder)
    assert told(capsys, *training("--members", "2"))["sha256"] == made["sha256"]
    assert tree_digest(folder) == before
    assert "got m.safetensors, of 2 networks, not 1" in told(capsys, *training(), code=2)


def test_what_no_training_has_made_is_refused_and_no_time_lost(folder, capsys):
    model_file("m.safetensors", UNetSettings(dims=2, width=2, depth=1))
    whole = Path("m.safetensors").read_bytes()
    for content, why in ((whole, "which was not trained by haloseg"), (whole[:-9], "which is no model, or damaged")):
        Path("m.safetensors").write_bytes(content)
        before = tree_digest(folder)
        assert f"got m.safetensors, {why}" in told(capsys, *training(), code=2)
        assert tree_digest(folder) == before


@pytest.mark.parametrize("what", ["ensemble", "import"])
def test_models_that_are_made_at_once_are_kept_too(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    one, other, third = (model_file(f"{seed}.safetensors", seed=seed) for seed in range(3))
    if what == "import":
        saved("network.pt2", random_network(Encoder), (1, 1, 32, 32), dynamic=True)
    made = {"ensemble": ["ensemble", one, other], "import": ["import", "network.pt2"]}[what]
    first = told(capsys, *made, "--model", "m.safetensors")
    before = tree_digest(tmp_path)
    assert told(capsys, *made, "--model", "m.safetensors") == first
    assert "got 2.safetensors, which is another model; name" in told(capsys, *made, "--model", third, code=2)
    assert tree_digest(tmp_path) == before
