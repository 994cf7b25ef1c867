"""The flow that trains, as the Prefect UI shows it."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytest.importorskip("prefect")

from prefect.artifacts import Artifact
from prefect.exceptions import ParameterTypeError
from test_train import image_of, textures
from volumes import tree_digest

from flows import train as train_flow
from flows.train import Course, train_model
from pipeline.config import Tta
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


class StoppedAt:
    """Stands for a flow that is cancelled at so many validations."""

    def __init__(self, at):
        self.left = at

    def is_set(self):
        self.left -= 1
        return not self.left


def test_members_are_shown_one_by_one_and_a_cancelled_run_goes_on_with_the_one_that_it_was_at(
    server, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train_flow, "SECONDS_BETWEEN_UPDATES", 0.0)
    image, model = image_of(tmp_path, "a", *textures((96, 96))), str(tmp_path / "both.safetensors")
    (tmp_path / "r.toml").write_text("width = 2\ndepth = 1\npatch = 16\nbatch = 2\nsteps = 6\nvalidate_every = 2\n")
    about = {"recipe": str(tmp_path / "r.toml"), "members": 3}
    monkeypatch.setattr(train_flow, "given_up", lambda: StoppedAt(5))  # of the second member the second
    assert train_model([image], "truth", model, **about, return_state=True).is_cancelled()
    progress, rows = (Artifact.get(key=f"both-{kind}") for kind in ("train", "curve"))
    assert progress.data == pytest.approx(100 * (1 + 4 / 6) / 3)
    assert progress.description.startswith("member 2 of 3, step 4 of 6, ")
    assert [(row["member"], row["step"]) for row in json.loads(rows.data)] == [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4)]
    assert not Path(model).exists()

    monkeypatch.undo()
    monkeypatch.setattr(train_flow, "SECONDS_BETWEEN_UPDATES", 0.0)
    result = train_model([image], "truth", model, **about)
    assert (result["networks"], result["steps"], result["steps_before"]) == (3, 18, 6 + 4)
    assert load_model(model).passes(Tta.NONE).n_networks == 3
    progress, table = Artifact.get(key="both-train"), Artifact.get(key="both-curve")
    best = [each["best_step"] for each in result["members"]]
    assert progress.data == 100.0
    assert progress.description.startswith("member 3 of 3, step 6 of 6, ")
    rows = json.loads(table.data)
    assert [(row["member"], row["step"]) for row in rows] == [(at, step) for at in (1, 2, 3) for step in (2, 4, 6)]
    assert [(row["member"], row["step"]) for row in rows if row["best so far"]] == list(enumerate(best, start=1))
    page = Artifact.get(key="both-curves").data
    for at in (1, 2, 3):
        picture = base64.b64encode((tmp_path / f"both.safetensors.member-{at}.curves.png").read_bytes()).decode()
        assert f"## Member {at}\n\n![learning curves](data:image/png;base64,{picture})\n" in page
        assert f"both, member {at} of 3" in caplog.text
    picture = base64.b64encode((tmp_path / "both.safetensors.sample.png").read_bytes()).decode()
    assert "and what the 3 networks make, on average, of it." in page
    assert f"![image, truth, prediction](data:image/png;base64,{picture})" in page


@pytest.mark.parametrize("members", [0, 17])
def test_members_have_bounds_that_the_form_tells(server, tmp_path, members):
    told = train_model.parameters.properties["members"]
    assert (told["minimum"], told["maximum"], told["default"]) == (1, 16, 1)
    assert "an ensemble" in told["description"]
    with pytest.raises(ParameterTypeError, match="members"):
        train_model(["a.zarr"], "truth", str(tmp_path / "m"), members=members)


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


def test_members_share_the_course_by_steps_and_by_time(monkeypatch):
    shown, now_s = [], 0.0
    monkeypatch.setattr(train_flow, "monotonic", lambda: now_s)
    monkeypatch.setattr(Course, "write", lambda _, percent: shown.append(percent))
    course, now = Course("m", n_steps=200, minutes=60, members=4), Validation(50, 1.0, 0.5, (0.9, None))
    course.begins()
    course.put(now)  # a quarter of the steps of the first of four
    now_s = 7.5 * 60
    course.put(now)  # half of its quarter of an hour
    course.put(replace(now, step=200))
    course.begins()
    course.put(replace(now, loss=0.7))
    now_s = 60 * 60
    course.put(now)  # more than its time
    assert shown == pytest.approx([100 / 16, 100 / 8, 100 / 4, 100 / 4 + 100 / 16, 100 / 2])
    assert course.summary.startswith("member 2 of 4, step 50 of 200, 1 h 0 min of 1 h 0 min; ")
    assert course.summary.endswith("best so far at step 50: loss held out 0.5000, Dice 0.900, -")
