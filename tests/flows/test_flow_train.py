"""The flow that trains, as the Prefect UI shows it."""

import base64
import json
from dataclasses import replace

import psutil
import pytest

pytest.importorskip("prefect")

from prefect.artifacts import Artifact
from test_train import image_of, textures
from volumes import tree_digest

from flows import train as train_flow
from flows.train import Course, train_model
from pipeline.unet.model import load_model
from pipeline.unet.training.course import Validation
from pipeline.unet.training.loading import Loading


def test_a_training_shows_its_course_and_makes_a_model(server, tmp_path, monkeypatch):
    monkeypatch.setattr(train_flow, "SECONDS_BETWEEN_UPDATES", 0.0)
    image = image_of(tmp_path, "a", *textures((96, 96)))
    (tmp_path / "r.toml").write_text("width = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 6\nvalidate_every = 2\n")
    model = str(tmp_path / "flow.safetensors")
    result = train_model([image], "truth", model, recipe=str(tmp_path / "r.toml"))
    assert result["steps"] == 6
    progress, table = Artifact.get(key="flow-train"), Artifact.get(key="flow-curve")
    assert progress.data == 100.0
    best = load_model(model).training["best"]
    assert progress.description.startswith("step 6 of 6, ")
    assert f"best so far at step {best['step']}: loss held out {best['loss']:.4f}, Dice" in progress.description
    rows = json.loads(table.data)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["step"] for row in rows if row["best so far"]] == [best["step"]]
    before = tree_digest(tmp_path)
    assert train_model([image], "truth", model, recipe=str(tmp_path / "r.toml"))["sha256"] == result["sha256"]
    state = train_model([image], "truth", model, 5.0, recipe=str(tmp_path / "r.toml"), return_state=True)
    assert "a model must not replace another file, got " in state.message
    assert tree_digest(tmp_path) == before
    for kind in ("curves", "sample"):
        picture = base64.b64encode((tmp_path / f"flow.safetensors.{kind}.png").read_bytes()).decode()
        assert f"(data:image/png;base64,{picture})" in Artifact.get(key="flow-curves").data


def test_a_named_model_that_makes_images_is_trained_and_shown_by_its_name(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HALOSEG_MODELS", str(tmp_path / "models"))
    images = [image_of(tmp_path, name, *textures((64, 64), seed=seed)) for seed, name in enumerate("ab")]
    (tmp_path / "r.toml").write_text(
        'loss = "l1"\nwidth = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 2\nvalidate_every = 2\n'
    )
    recipe = str(tmp_path / "r.toml")
    result = train_model(images[:1], None, "clean", recipe=recipe, held_out=images[1:], targets=images)
    assert result["model"] == str(tmp_path / "models/clean/1.safetensors")
    assert [each["held_out"] is None for each in load_model(result["model"]).training["images"]] == [True, False]
    assert Artifact.get(key="clean-1-train").data == 100.0


def test_a_process_that_reads_for_a_flow_is_gone_afterwards_and_when_it_is_cancelled(server, tmp_path, monkeypatch):
    image = image_of(tmp_path, "a", *textures((96, 96)))
    (tmp_path / "r.toml").write_text("width = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 6\nvalidate_every = 2\n")
    about, children = {"recipe": str(tmp_path / "r.toml")}, set(psutil.Process().children())
    monkeypatch.setattr("pipeline.unet.training.fit.loading_for", lambda _: Loading.PROCESS)
    assert train_model([image], "truth", str(tmp_path / "m"), **about)["steps"] == 6
    assert set(psutil.Process().children()) == children

    class Cancelled:
        def is_set(self):
            (reader,) = set(psutil.Process().children()) - children
            assert reader.is_running()
            return True

    monkeypatch.setattr(train_flow, "given_up", Cancelled)
    assert train_model([image], "truth", str(tmp_path / "cancelled"), **about, return_state=True).is_cancelled()
    assert set(psutil.Process().children()) == children


def test_a_training_that_fails_says_why_in_one_line(server, tmp_path):
    state = train_model([str(tmp_path / "none.zarr")], "truth", str(tmp_path / "m"), return_state=True)
    assert state.is_failed()
    assert "must be made by haloseg" in state.message


def test_a_course_is_shown_by_steps_or_by_time(monkeypatch):
    shown = []
    monkeypatch.setattr(Course, "write", lambda _, percent: shown.append(percent))
    course, now = Course("m", n_steps=200, minutes=60), Validation(50, 1.0, 0.5, (0.9, None))
    course.put(now)
    assert shown == [pytest.approx(25, abs=0.1)]
    course.put(replace(now, step=100, loss=0.6))
    assert course.summary.startswith("step 100 of 200, ")
    assert course.summary.endswith("best so far at step 50: loss held out 0.5000, Dice 0.900, -")
