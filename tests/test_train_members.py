"""Several networks that learn one after another and become one model."""

import json
import math
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from test_train import RECIPE, image_of, textures

from pipeline import cli
from pipeline.errors import ArgumentError
from pipeline.train import train
from pipeline.unet.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = replace(RECIPE, steps=6, validate_every=2)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return image_of(tmp_path_factory.mktemp("slide"), "a", *textures((160, 144)))


def names_in(folder):
    return {each.name for each in folder.iterdir()}


def test_members_are_the_networks_of_seeds_that_follow_each_other(slide, tmp_path):
    told = []
    (tmp_path / "alone").mkdir()
    result = train([slide], labels="truth", model=str(tmp_path / "m"), recipe=SHORT, seed=5, members=2,
                   on_network=told.append)  # fmt: skip
    alone = [train([slide], labels="truth", model=str(tmp_path / "alone" / f"{seed}"), recipe=SHORT, seed=seed)
             for seed in (5, 6)]  # fmt: skip
    model = load_model(tmp_path / "m")
    assert (model.digest, model.n_networks) == (result.model.digest, 2)
    for member, record, one in zip(model.members, model.training["members"], alone, strict=True):
        assert all(torch.equal(tensor, member.weights[name]) for name, tensor in one.model.weights.items())
        assert record["sha256"] == one.model.digest
        assert record["training"] == json.loads(json.dumps(one.model.training))
    assert told == [record["model"] for record in model.training["members"]] == ["m, member 1 of 2", "m, member 2 of 2"]
    assert (result.n_steps, result.n_before) == (12, 0)
    assert result.best == min((one.best for one in alone), key=lambda best: best.loss)
    curves = {f"m.member-{at}.curves.png" for at in (1, 2)}
    assert names_in(tmp_path) == {"alone", "m", "m.sample.png"} | curves
    sample, *others = (imagecodecs.png_decode(path.read_bytes()) for path in (
        tmp_path / "m.sample.png", tmp_path / "alone" / "5.sample.png", tmp_path / "alone" / "6.sample.png"
    ))  # fmt: skip
    assert all(sample.shape == other.shape for other in others)


def test_one_member_is_a_model_as_ever(slide, tmp_path):
    short = replace(SHORT, steps=2)
    for name, about in (("a", {}), ("b", {"members": 1})):
        train([slide], labels="truth", model=str(tmp_path / name), recipe=short, **about)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert names_in(tmp_path) == {f"{name}{kind}" for name in "ab" for kind in ("", ".curves.png", ".sample.png")}
    with pytest.raises(ArgumentError, match="needs one member or more, got 0; use 1"):
        train([slide], labels="truth", model=str(tmp_path / "c"), recipe=short, members=0)


class KilledError(Exception):
    """Stands for what ends a run."""


def stopping(at):
    """Return what ends a run after so many validations."""
    told = []

    def told_of(now):
        told.append(now)
        if len(told) == at:
            raise KilledError

    return told_of


def test_a_run_that_was_stopped_goes_on_with_the_member_that_it_was_at(slide, tmp_path):
    (tmp_path / "whole").mkdir()
    about = {"labels": "truth", "recipe": SHORT, "members": 3}
    train([slide], model=str(tmp_path / "whole" / "m"), **about)
    with pytest.raises(KilledError):
        train([slide], model=str(tmp_path / "m"), on_progress=stopping(4), **about)  # of the second member the first
    assert {f"m.member-{at}.checkpoint" for at in (1, 2)} <= names_in(tmp_path)
    assert "m" not in names_in(tmp_path)
    with pytest.raises(ArgumentError, match=r"got seed 1 where .*m.member-1.checkpoint has 0"):
        train([slide], model=str(tmp_path / "m"), seed=1, **about)
    steps = []
    result = train([slide], model=str(tmp_path / "m"), on_step=steps.append, **about)
    assert [each.step for each in steps] == [3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert (result.n_steps, result.n_before) == (18, 8)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "whole" / "m").read_bytes()
    assert (tmp_path / "m.sample.png").read_bytes() == (tmp_path / "whole" / "m.sample.png").read_bytes()
    assert names_in(tmp_path) - {"whole"} == names_in(tmp_path / "whole")


def test_of_a_run_that_was_stopped_with_more_members_no_checkpoint_is_left(slide, tmp_path):
    about = {"labels": "truth", "recipe": SHORT, "model": str(tmp_path / "m")}
    with pytest.raises(KilledError):
        train([slide], members=3, on_progress=stopping(7), **about)  # of the third member the first
    for name in (".m.checkpoint.1.partial", ".m.member-4.checkpoint.1.partial"):  # killed as it wrote
        (tmp_path / name).write_bytes(b"half")
    others = {"m.member-1.checkpoint.txt", "other.member-1.checkpoint", "mm.checkpoint", "a.m.checkpoint"}
    for name in others:
        (tmp_path / name).write_bytes(b"of somebody else")
    assert "m.member-3.checkpoint" in names_in(tmp_path)
    steps = []
    train([slide], members=2, on_step=steps.append, **about)
    assert steps == []
    curves = {f"m.member-{at}.curves.png" for at in (1, 2, 3)}
    assert names_in(tmp_path) == {"m", "m.sample.png"} | curves | others


def test_all_members_together_take_the_minutes(slide, tmp_path):
    with pytest.raises(KilledError):
        train([slide], labels="truth", model=str(tmp_path / "m"), recipe=SHORT, members=2, minutes=4,
              on_progress=stopping(1))  # fmt: skip
    with pytest.raises(ArgumentError, match=r"got minutes 2.5 where .*m.member-1.checkpoint has 2.0"):
        train([slide], labels="truth", model=str(tmp_path / "m"), recipe=SHORT, members=2, minutes=5)


def test_the_command_tells_of_each_member_and_the_labels_are_their_mean(slide, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text("width = 4\ndepth = 1\npatch = 32\nbatch = 4\nsteps = 8\nvalidate_every = 4\n")
    command = ["train", slide, "--labels", "truth", "--model", "grain", "--recipe", "r.toml", "--members", "2",
               "--seed", "3", "--device", "cpu"]  # fmt: skip
    assert cli.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["model"], document["networks"], document["steps"]) == ("models/grain/1.safetensors", 2, 16)
    assert [(each["seed"], each["steps"]) for each in document["members"]] == [(3, 8), (4, 8)]
    assert all(len(each["validation_dice"]) == 2 and math.isfinite(each["validation_loss"])
               for each in document["members"])  # fmt: skip
    lines = printed.err.splitlines()
    assert [line for line in lines if "member" in line] == [f"grain-1, member {at} of 2" for at in (1, 2)]
    assert sum("held out" in line for line in lines) == 4
    assert cli.main(["segment", slide, "--model", "grain", "--name", "grain", "--probabilities", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["n_flipped_decided"] == 0
    assert cli.main(["inspect", "grain", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    figures = ("validation_loss", "validation_dice")
    assert [[each[name] for name in figures] for each in told["members"]] == [
        [each[name] for name in figures] for each in document["members"]
    ]
    assert np.isfinite([each["validation_loss"] for each in told["members"]]).all()
    assert cli.main(command) == 0
    assert "models/grain/2.safetensors" in capsys.readouterr().out
