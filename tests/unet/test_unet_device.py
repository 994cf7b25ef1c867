"""Which GPUs of this machine are there to be shared out: those that torch counts, by the names that the user gave."""

import pytest
import torch

from pipeline.errors import ArgumentError
from pipeline.unet.device import gpus_for, visible_gpus, workers_here


@pytest.mark.parametrize(("named", "n_torch", "expected"), [
    (None, 3, ("0", "1", "2")), (None, 0, ()),
    ("2,0", 2, ("2", "0")), (" 3, 1", 2, ("3", "1")), ("1,-1,0", 1, ("1",)), ("", 0, ()), ("-1", 0, ()), ("7", 0, ()),
    ("GPU-8f,GPU-1a", 2, ("GPU-8f", "GPU-1a")),
    ("MIG-GPU-8f/1/0,MIG-GPU-8f/2/0", 1, ("MIG-GPU-8f/1/0", "MIG-GPU-8f/2/0")),  # torch counts the first alone
    ("MIG-8f", 0, ()),
])  # fmt: skip
def test_gpus_are_those_that_the_user_shows_by_their_names_in_his_order(monkeypatch, named, n_torch, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_torch)
    assert visible_gpus() == gpus_for(None) == expected
    assert gpus_for(min(1, len(expected))) == expected[:1]
    rule = rf"^each worker needs a GPU of its own, got 9 and {len(expected)} GPUs; use {len(expected)} or fewer$"
    with pytest.raises(ArgumentError, match=rule):
        gpus_for(9)


def test_a_run_here_has_a_process_for_each_gpu_or_as_many_as_told(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert workers_here("cuda", asked=None, usual=8) == (3, ("0", "1", "2"))
    assert workers_here("cuda", asked=2, usual=8) == (2, ("0", "1"))
    assert workers_here("cpu", asked=None, usual=8) == (8, ())
    assert workers_here("cpu", asked=5, usual=8) == (5, ())
