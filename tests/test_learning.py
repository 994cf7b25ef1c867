"""Progress of a training, on a terminal and elsewhere."""

import io

from rich.console import Console

from pipeline.learning import learning
from pipeline.unet.training.course import Step, Validation


def shown(*, terminal, minutes=None):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    with learning(console, n_steps=400, minutes=minutes) as watch:
        for step in range(1, 101):
            watch.took(Step(step, 0.25, 1e-3, 412.0))
            if step % 50 == 0:
                watch.validated(Validation(step, 0.25, 0.5 - step / 1000, (0.9, None, 0.7)))
        watch.validated(Validation(100, 0.25, 0.9, (0.1, None, 0.1)))  # no better
    return file.getvalue()


def test_elsewhere_there_is_a_line_per_validation_alone():
    assert shown(terminal=False).splitlines() == [
        "step 50: loss 0.2500, held out 0.4500, Dice 0.900, -, 0.700",
        "step 100: loss 0.2500, held out 0.4000, Dice 0.900, -, 0.700",
        "step 100: loss 0.2500, held out 0.9000, Dice 0.100, -, 0.100",
    ]


def test_a_terminal_shows_a_bar_that_fits_it():
    printed = shown(terminal=True)
    assert printed.count("held out") == 3
    last = printed.rstrip().rsplit("\r", 1)[-1].rsplit("\x1b[2K", 1)[-1].split("\x1b")[0].strip()
    assert last.endswith("100/400 loss 0.2500 best 0.4000, Dice 0.800 412 patches/s 0:00:00")
    assert len(last) <= 80


def test_time_left_is_that_of_steps_or_of_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.learning.monotonic", lambda: clock[0])
    for minutes, left in ((None, "1:30:00"), (10, "0:08:20")):
        clock[0], file = 0.0, io.StringIO()
        console = Console(file=file, force_terminal=True, width=80, color_system=None)
        with learning(console, n_steps=5501, minutes=minutes) as watch:
            watch.took(Step(1, 1.0, 1e-3, 8.0))
            clock[0] = 100.0
            watch.took(Step(101, 1.0, 1e-3, 8.0))
        assert left in file.getvalue()
