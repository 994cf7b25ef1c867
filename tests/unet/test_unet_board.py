"""The log that TensorBoard shows, read with its own reader."""

import sys

import pytest

from pipeline.errors import ArgumentError
from pipeline.unet.training.board import board
from pipeline.unet.training.course import Step, Validation


def run(folder, steps, *, before=()):
    """Log steps, with a validation each second one, after telling those before."""
    with board(str(folder), classes=("a", "b")) as log:
        for each in before:
            log.validated(each)
        for step in steps:
            log.took(Step(step, 1 / step, 1e-3 * step, 100.0 + step))
            if step % 2 == 0:
                log.validated(validation(step))


def validation(step):
    return Validation(step, 0.5, 1 / step, (0.1 * step, None))


def read(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    found = events.EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_losses_rate_speed_and_dice_are_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    run(tmp_path / "log", [1, 2, 3, 4])
    logged = read(tmp_path / "log")
    assert logged.keys() == {"loss/step", "loss/training", "loss/held_out", "rate", "patches_per_s", "dice/a"}
    assert logged["loss/step"] == [(n, pytest.approx(1 / n)) for n in (1, 2, 3, 4)]
    assert logged["rate"][3] == (4, pytest.approx(4e-3))
    assert logged["patches_per_s"][0] == (1, 101.0)
    assert logged["loss/held_out"] == [(2, 0.5), (4, 0.25)]
    assert logged["dice/a"] == [(2, pytest.approx(0.2)), (4, pytest.approx(0.4))]


def test_a_run_that_goes_on_goes_on_in_the_same_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    run(tmp_path, [1, 2, 3, 4, 5])  # killed here; its checkpoint is of step 2
    run(tmp_path, [3, 4, 5, 6], before=[validation(2)])
    logged = read(tmp_path)
    assert [step for step, _ in logged["loss/step"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged["loss/held_out"]] == [2, 4, 6]
    run(tmp_path / "new", [3], before=[validation(2)])  # the first run had no log
    assert [step for step, _ in read(tmp_path / "new")["loss/held_out"]] == [2]


def test_without_tensorboard_there_is_one_clear_line_and_nobody_else_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"needs the package tensorboard, .* pip install .haloseg\[tensorboard\]"):
        run(tmp_path / "log", [1])
    assert not (tmp_path / "log").exists()
    with board(None, classes=()) as log:
        log.took(Step(1, 1.0, 1.0, 1.0))
        log.validated(validation(2))


def test_a_log_elsewhere_is_refused():
    with (
        pytest.raises(ArgumentError, match="must be a local folder, got s3://bucket/log"),
        board("s3://bucket/log", classes=()),
    ):
        pass
