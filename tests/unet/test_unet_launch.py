"""Processes that fail: the others end, and one line says why."""

import os
import signal
from multiprocessing import active_children

import nccl
import pytest
import torch
from torch import distributed

from pipeline.errors import ArgumentError, RunError
from pipeline.unet.training.launch import launch


def failing(*, team, say):
    """Add a number in all processes, in vain where the second one does not come, nor can leave the others."""
    if not team.leads:
        distributed.destroy_process_group = signal.pause  # as NCCL's may wait for what will not end
        raise ArgumentError("one line")
    distributed.all_reduce(torch.ones(1))


def dying(*, team, say):
    if not team.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (failing, ArgumentError, "^one line$"),
        (dying, RunError, "all 2 processes must live until the end, got process 1 ended by signal 9; the same command"),
    ],
)
def test_a_process_that_fails_ends_the_others_and_says_why(work, error, message):
    with pytest.raises(error, match=message) as caught:
        launch(work, 2, device="cpu", on_word=print)
    assert "\n" not in str(caught.value)
    assert active_children() == []


class StoppedError(Exception):
    """Stands for what ends a run from outside."""


def talking(*, team, say):
    say(team.rank)
    distributed.barrier()
    say("never heard")
    signal.pause()


@pytest.mark.slow
def test_who_hears_a_word_can_end_it_all():
    heard = []

    def on_word(word):
        heard.append(word)
        raise StoppedError

    with pytest.raises(StoppedError):
        launch(talking, 2, device="cpu", on_word=on_word)
    assert heard == [0]
    assert active_children() == []


def test_each_process_sees_a_gpu_of_its_own_of_those_that_the_user_shows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f, GPU-1a,GPU-77")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert launch(nccl.seen, 2, device="cuda", on_word=print) == (["GPU-8f", "GPU-1a"], 2, "nccl")
    assert active_children() == []
