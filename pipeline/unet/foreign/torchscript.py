"""A network as TorchScript: what other programs, ImageJ's and ilastik's among them, can run without haloseg."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.unet.model import Model, networks_of
from pipeline.unet.network import probabilities_of
from pipeline.unet.settings import Head

TOLERANCE = 1e-4


@contextmanager
def deprecated() -> Iterator[None]:
    """Use TorchScript, which torch 2.13 deprecates, and which bioimage.io's packages hold, without its warnings.

    Its text tells this warning, which torch 2.15 makes a FutureWarning. Tracing also warns of every size that is looked
    at; the trace is compared with the network at two sizes instead.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
        warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
        yield


class _Likely(nn.Module):
    """A network that gives probabilities."""

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor) -> Tensor:
        return probabilities_of(self.network(x), self.head)


class _Mean(nn.Module):
    """Several networks as one that gives the mean of their probabilities."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)


def traced(model: Model) -> tuple[bytes, bool]:
    """Return a TorchScript archive that gives a model's probabilities, and whether it takes every size of its rule.

    Raises
    ------
    ModelError : the trace does not give the network's numbers.
    """
    settings, rule = model.settings, model.rule
    networks = [
        _Likely(each.to(memory_format=torch.contiguous_format), settings.head)  # type: ignore[call-overload]
        for each in networks_of(model, "cpu")
    ]
    network = (_Mean(networks) if len(networks) > 1 else networks[0]).eval()
    shapes = [rule.tile_shape(tuple(k * s for s in rule.stride)) for k in (1, 3)]
    examples = [torch.linspace(-2, 2, settings.in_channels * prod(shape)) for shape in shapes]
    small, large = (x.sin().reshape(1, -1, *shape) for x, shape in zip(examples, shapes, strict=True))
    with torch.no_grad(), deprecated():
        script = torch.jit.trace(network, small, check_trace=False)  # type: ignore[no-untyped-call]
        if not _same(script(small), network(small)):
            raise ModelError("a trace must give the network's numbers, got others; import the network anew")
        content = io.BytesIO()
        torch.jit.save(script, content)
        return content.getvalue(), not getattr(settings, "tile", ()) and _takes(script, network, large)


def _takes(script: nn.Module, network: nn.Module, x: Tensor) -> bool:
    try:
        return _same(script(x), network(x))
    except RuntimeError:  # a size that was written down as a number
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE).all())

