"""Team: processes that learn one network together, each from its share of every batch.

Together they take the very steps that one process would take with the whole batch, up to the rounding of sums:

- what a loss is made of, sums over voxels, is added over the processes before it is divided (``total``), so that
  Dice over a batch, weights of classes and voxels that are ignored count as they would in one process; every process
  then has the same loss;
- batch normalisation and dropout see the whole batch (``batchwide``);
- gradients are averaged by DistributedDataParallel. Each process differentiates the sum of the equal losses of all
  ``n``: the mean of its gradients over the processes is the gradient of one loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # while the first process validates; those who watch the processes see one that dies
_adding: ContextVar[bool] = ContextVar("adding", default=False)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that learn together, as one of them sees them.

    Attributes
    ----------
    rank : which of them this is; the first, 0, validates and writes
    n : how many there are
    words : torch's group in which they tell each other what is no tensor
    """

    rank: int = 0
    n: int = 1
    words: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process validates and writes."""
        return self.rank == 0

    def share(self, n_patches: int) -> slice:
        """Return which patches of a batch are this process's; the shares differ by one at most."""
        return slice(self.rank * n_patches // self.n, (self.rank + 1) * n_patches // self.n)

    def first(self, make: Callable[[], T]) -> T:
        """Return to every process what the first one makes; the others make nothing, and wait."""
        if self.n == 1:
            return make()
        said = [make() if self.leads else None]
        distributed.broadcast_object_list(said, src=0, group=self.words)
        return said[0]  # type: ignore[return-value]

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return the network with its weights those of the first process, its gradients averaged over all."""
        if self.n == 1:
            return network
        return DistributedDataParallel(network, gradient_as_bucket_view=True)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Let ``total`` add over the processes, all of which must come here."""
        before = _adding.set(self.n > 1)
        try:
            yield
        finally:
            _adding.reset(before)


ALONE = Team()


@contextmanager
def joined(rank: int, n: int, *, folder: Path, device: str) -> Iterator[Team]:
    """Join the other processes, which find each other by a file in a folder on this machine."""
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder / 'team'}", rank=rank, world_size=n,
        timeout=_PATIENCE,
    )  # fmt: skip
    try:
        yield Team(rank, n, distributed.new_group(backend="gloo", timeout=_PATIENCE))
    finally:
        distributed.destroy_process_group()


def total(sums: Tensor) -> Tensor:
    """Return sums over this process's voxels with those of the other processes, where a team learns; else as they are.

    Its gradient is the sum of the gradients that all processes have of it.
    """
    if not _adding.get():
        return sums
    added: Tensor = _Total.apply(sums)  # type: ignore[no-untyped-call]
    return added


def added(sums: Tensor) -> Tensor:
    """Return the sum over all processes, without a gradient."""
    sums = sums.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(sums)
    return sums


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, sums: Tensor) -> Tensor:  # noqa: ANN401 torch's context
        return added(sums)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return added(gradient)
