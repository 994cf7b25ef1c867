"""Learner: a network with what takes its steps, whose whole state can be put down and taken up again."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import Precision
from pipeline.geometry.tiles import TileRule
from pipeline.unet.layers import Conv, Stride
from pipeline.unet.network import UNet, channels_last
from pipeline.unet.numbers import widened
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule
from pipeline.unet.training.batchwide import widen
from pipeline.unet.training.losses import Objective
from pipeline.unet.training.recipe import Optimiser, Recipe
from pipeline.unet.training.team import ALONE, Team
from pipeline.unet.training.warp import Batch


def training_rule(settings: UNetSettings) -> TileRule:
    """Return the rule of patches: valid networks need their halo, the others learn from whole patches without one."""
    rule = closed_form_rule(settings)
    if settings.padding is Padding.VALID:
        return rule
    return TileRule(rule.stride, (0,) * rule.ndim, (0,) * rule.ndim)


def core_of(logits: Tensor, settings: UNetSettings) -> Tensor:
    """Return the logits of the core, without what the rule of patches trims."""
    for axis, trim in enumerate(training_rule(settings).trim, start=2):
        logits = logits.narrow(axis, trim, logits.shape[axis] - 2 * trim)
    return logits


class _Supervised(nn.Module):
    """A network whose ``forward``, the one method that torch's hooks of gradients know, gives all that is compared."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.supervised(x)


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """A network that learns.

    Attributes
    ----------
    network : what takes the steps
    kept : what is validated, and kept if it is good: the network itself, or the moving average of its weights
    called : gives the logits of every head of the network; in a team it averages their gradients over the processes
    """

    network: UNet
    kept: UNet
    optimizer: torch.optim.Optimizer
    objective: Objective
    recipe: Recipe
    called: nn.Module
    team: Team = ALONE

    @classmethod
    def new(
        cls, settings: UNetSettings, *, objective: Objective, recipe: Recipe, device: str, team: Team = ALONE
    ) -> Learner:
        """Return a learner with random weights, drawn from torch's generator."""
        network = UNet(settings).to(device)
        network.to(memory_format=channels_last(settings.dims))  # type: ignore[call-overload]
        _hold_idle_biases(network)
        kept = deepcopy(network) if recipe.ema else network
        widen(network, n_patches=recipe.batch_size(settings.dims), team=team)
        called = team.parallel(_Supervised(network))
        return cls(network, kept, _optimizer(network, recipe), objective, recipe, called, team)

    def learn(self, batch: Batch, *, step: int, rate: float) -> Tensor:
        """Take a step, the first being one, with this process's share of a batch.

        Returns the batch's loss, on the device: a GPU is still at work on it.
        """
        self.optimizer.param_groups[0]["lr"] = rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        images = batch.images.contiguous(memory_format=channels_last(self.network.settings.dims))
        halved = self.recipe.precision is Precision.BF16
        with torch.autocast(images.device.type, torch.bfloat16, enabled=halved):
            every = [core_of(logits, self.network.settings) for logits in self.called(images)]
        with self.team.adding():
            losses = [self.objective(widened(logits), batch.classes, batch.borders, batch.target) for logits in every]
            loss = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.kept is not self.network:
            follow(self.kept, self.network, decay=average_decay(self.recipe.ema, step=step))
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights to keep, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.kept.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps follow from, on the CPU: weights, their average, the optimiser's memory."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.kept is not self.network:
            tensors |= {f"average.{name}": tensor for name, tensor in self.kept.state_dict().items()}
        for number, memory in self.optimizer.state_dict()["state"].items():
            held = {name: tensor for name, tensor in memory.items() if isinstance(tensor, Tensor)}
            tensors |= {f"optimiser.{number}.{name}": tensor for name, tensor in held.items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state.

        Raises
        ------
        RuntimeError, ValueError, KeyError : it is not one of a network and optimiser like these.
        """
        self.network.load_state_dict(below("network.", state))
        if self.kept is not self.network:
            self.kept.load_state_dict(below("average.", state))
        memory: dict[int, dict[str, Tensor]] = {}
        weights = dict(enumerate(self.optimizer.param_groups[0]["params"]))
        for name, tensor in below("optimiser.", state).items():
            number, _, part = name.partition(".")
            memory.setdefault(int(number), {})[part] = _remembered(tensor, of=weights[int(number)])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": memory, "param_groups": groups})


def average_decay(decay: float, *, step: int) -> float:
    """Return what the average keeps of itself at a step: less at first, or the random weights would stay in it long."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def follow(average: UNet, network: UNet, *, decay: float) -> None:
    """Move the average towards the network by ``1 - decay``; counts of batches, which are no real numbers, are copied.

    Statistics of batch normalisation are averaged as well: the average is validated and used as it is. All in a few
    calls instead of one for each tensor, which a GPU would wait for.
    """
    (mine, counts), (theirs, others) = _numbers(average), _numbers(network)
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    if counts:
        torch._foreach_copy_(counts, others)


def _numbers(network: UNet) -> tuple[list[Tensor], list[Tensor]]:
    """Return the very tensors of a network: its real numbers, weights and statistics, and its counts."""
    buffers = list(network.buffers())
    reals = [*network.parameters(), *(each for each in buffers if each.is_floating_point())]
    return reals, [each for each in buffers if not each.is_floating_point()]


def _hold_idle_biases(network: UNet) -> None:
    """Let the biases in front of a normalisation, which takes away whatever they add, stay zero as they begin.

    Their gradient is the rounding of zero, and AdamW makes whole steps of it, which the running means lag behind: signs
    of the rounding alone changed the loss of what is held out by 0.2 % (deviation, measured after three steps).
    """
    for layer in network.program.layers:
        if isinstance(layer, Conv | Stride) and layer.norm:
            network.get_parameter(f"{layer.name}.bias").requires_grad_(False)


def _remembered(tensor: Tensor, *, of: Tensor) -> Tensor:
    """Return an optimiser's memory of a weight as it makes it: of the weight's device, type and strides.

    Fused steps go through both in the order of memory: other strides are an error on a GPU, and wrong weights on a CPU.
    A checkpoint has numbers in the order of axes, whatever the strides were. A count of steps is a scalar.
    """
    if not tensor.ndim:
        return tensor.clone()
    if tensor.shape != of.shape:
        raise ValueError(f"memory of shape {tuple(tensor.shape)} for a weight of shape {tuple(of.shape)}")
    return torch.empty_like(of, requires_grad=False).copy_(tensor)


def _optimizer(network: UNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Return what takes the steps; AdamW in one call, of half the time on a CPU, too, and of one launch on a GPU."""
    weights, rate, decay = network.parameters(), recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser is Optimiser.SGD:
        return torch.optim.SGD(weights, lr=rate, momentum=recipe.momentum, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay, fused=True)


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
