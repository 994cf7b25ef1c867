"""A work for processes with a GPU each, in which torch's own processes on the CPU (gloo) stand for NCCL's.

Processes import this module with their work, before they join each other.
"""

import os
from multiprocessing import current_process

import torch
from torch import distributed

asked = []
if current_process().name != "MainProcess":
    join = distributed.init_process_group

    def init_process_group(backend, **settings):
        asked.append(backend)
        join("gloo", **settings)

    distributed.init_process_group = init_process_group


def seen(*, team, say):
    """Return the GPU that each process sees, in order, how many of them have met, and by what."""
    every = [None] * team.n
    distributed.all_gather_object(every, os.environ["CUDA_VISIBLE_DEVICES"], group=team.words)
    met = torch.ones(1)
    distributed.all_reduce(met)
    return every, int(met), *asked
