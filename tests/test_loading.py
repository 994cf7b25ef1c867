"""Trainings whose patches a process apart reads, from the command line and from members of a team: nobody is left."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest
import torch
from odd_arrays import Odd
from test_train import RECIPE, image_of, textures

from pipeline.errors import RunError
from pipeline.lesson import open_lesson
from pipeline.unet.training.fit import fit
from pipeline.unet.training.launch import launch
from pipeline.unet.training.loading import _MAIN as READER
from pipeline.unet.training.loading import Loading

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
QUICK = replace(RECIPE, steps=4, validate_every=2, batch=3)
TOML = "width = 2\ndepth = 1\npatch = 16\nbatch = 4\nvalidate_every = 5\n"
CODE = """
import os, sys, time
from pipeline import cli
from pipeline.unet.training import fit
from pipeline.unet.training.loading import Loading

fit.loading_for = lambda _: Loading.PROCESS
if "forked" in sys.argv:
    seed = fit.network_seed
    fit.network_seed = lambda *args: (args[1] == 4 and not os.fork() and time.sleep(600), seed(*args))[1]
if __name__ == "__main__":
    sys.exit(cli.main([each for each in sys.argv[1:] if each != "forked"]))
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return image_of(tmp_path_factory.mktemp("slide"), "a", *textures((160, 144)), size=(0.5, 0.5))


def command(slide, folder, *, steps):
    (folder / "r.toml").write_text(f"steps = {steps}\n{TOML}")
    return ["train", slide, "--labels", "truth", "--recipe", str(folder / "r.toml"), "--model", str(folder / "m"),
            "--device", "cpu", "--json"]  # fmt: skip


def started(slide, folder, *, steps, more=()):
    """Return a training in a process group of its own, as of a terminal, that has validated once, and its reader."""
    run = subprocess.Popen(
        [sys.executable, "-c", CODE, *more, *command(slide, folder, steps=steps)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "held out" in run.stderr.readline()
    (reader,) = (each for each in psutil.Process(run.pid).children() if READER in each.cmdline())
    return run, reader


WITH_A_FORK = pytest.param(("forked",), id="with a fork that has the pipe", marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [pytest.param((), id="alone"), WITH_A_FORK])
def test_the_reader_of_a_training_that_is_killed_ends(slide, tmp_path, more):
    run, reader = started(slide, tmp_path, steps=10**6, more=more)
    others = [each for each in psutil.Process(run.pid).children() if each != reader]
    assert len(others) == len(more)
    with run:
        run.kill()
        try:
            assert psutil.wait_procs([reader], timeout=30)[1] == []
        finally:
            for each in others:
                each.kill()


def test_ctrl_c_ends_a_training_and_its_reader_in_one_line(slide, tmp_path):
    run, reader = started(slide, tmp_path, steps=10**6)
    os.killpg(run.pid, signal.SIGINT)
    printed, told = run.communicate(timeout=60)
    assert (run.returncode, printed) == (130, "")
    assert [line for line in told.splitlines() if "held out" not in line] == [
        "haloseg: interrupted; what is done is kept: the same command goes on"
    ]
    assert psutil.wait_procs([reader], timeout=10)[1] == []


def test_a_reader_that_is_killed_ends_the_run_in_one_line_and_the_next_run_goes_on(slide, tmp_path):
    run, reader = started(slide, tmp_path, steps=10**6)
    reader.kill()
    printed, told = run.communicate(timeout=60)
    assert (run.returncode, printed) == (1, "")
    (line,) = (line for line in told.splitlines() if "held out" not in line)
    assert line.startswith("haloseg: the process that reads patches must live until the end, got its end by signal 9")
    assert (tmp_path / "m.checkpoint").exists()


def both(lesson, *, team, say):
    """Train by either way of loading, each member its share of the patches."""
    about = {"validation": lesson.check, "recipe": QUICK, "device": "cpu", "seed": 1, "team": team}
    return [fit(lesson.settings, lesson.learn, loading=loading, **about) for loading in Loading]


def killed(lesson, *, team, say):
    """Train from what kills the process that reads it."""
    about = {"validation": lesson.check, "recipe": QUICK, "device": "cpu", "seed": 1, "team": team}
    odd = replace(lesson.learn.sources[0], image=Odd((1, 160, 144), "killed"))
    fit(lesson.settings, replace(lesson.learn, sources=(odd,)), loading=Loading.PROCESS, **about)


def test_members_of_a_team_have_readers_of_their_own(slide):
    lesson = open_lesson([slide], labels="truth", recipe=QUICK)
    threads, process = launch(partial(both, lesson), 2, device="cpu", on_word=print)
    assert process.curve == threads.curve
    assert all(torch.equal(tensor, process.weights[name]) for name, tensor in threads.weights.items())
    assert active_children() == []


@pytest.mark.slow
def test_a_member_whose_reader_dies_says_so(slide):
    lesson = open_lesson([slide], labels="truth", recipe=QUICK)
    with pytest.raises(RunError, match="process that reads patches must live until the end, got its end by signal 9"):
        launch(partial(killed, lesson), 2, device="cpu", on_word=print)
    assert not [each for each in psutil.Process().children(recursive=True) if READER in each.cmdline()]
