"""From a program of another library to a model of ours: its tile rule is measured, what cannot be tiled is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.store.scaling import Limits
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.network import GRAPH, WEIGHTS, ForeignNetwork, ForeignSettings, graph_tensor, shapes_of
from pipeline.unet.foreign.onesize import measure_one_size
from pipeline.unet.foreign.pt2 import Exported
from pipeline.unet.model import Model
from pipeline.unet.receptive import measure_tile_rule
from pipeline.unet.settings import Head

# Arguments, by position, that say that a layer learns: of a network that was not in eval mode.
_LEARNS = {"aten.batch_norm.default": 5, "aten.native_batch_norm.default": 5, "aten.dropout.default": 2}
_TOGETHER = 1e-4


@dataclass(frozen=True, slots=True)
class Description:
    """What a file does not tell of its network.

    Attributes
    ----------
    source : where it comes from, in words
    classes, class_values, channels : names and values; empty for numbers
    normalisation : how intensities are brought to the network's scale; None for z-scores
    limits : of the normalisation, where it has some; see ``Scaling``
    mean, std : of each channel, subtracted and divided by after that; empty for neither
    voxel_size_um : of the images that it learned from, or None
    output_mean, output_std : of each channel of a linear head: its values times std, plus mean, are intensities; empty
        for 0 and 1
    head : how its output becomes probabilities; None takes what it ends in, else softmax, or sigmoid for one channel;
        linear where it is no probabilities but intensities, say, of an image without noise
    record : kept as the model's training record
    """

    source: str
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    channels: tuple[str, ...] = ()
    normalisation: Normalisation | None = None
    limits: Limits = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    output_mean: tuple[float, ...] = ()
    output_std: tuple[float, ...] = ()
    voxel_size_um: tuple[float, ...] | None = None
    head: Head | None = None
    record: tuple[tuple[str, str], ...] = ()


def adopt(exported: Exported, about: Description) -> Model:
    """Return the model of a program, with its tile rule measured.

    Raises
    ------
    ModelError : the program learns, is no network of one image, or cannot be tiled.
    ArgumentError : the description does not fit it.
    """
    _check_eval(exported)
    settings, weights = _settings(exported, about)
    network = ForeignNetwork(settings, weights).eval()
    x = torch.randn((2, *exported.input_shape[1:]), generator=torch.Generator().manual_seed(0))
    out = _first_pass(network, x[:1], settings.dims)
    settings = replace(settings, n_classes=out.shape[1], head=_head(settings.head, about.head, out.shape[1]))
    model = Model(  # checks the names before it is measured, which may take minutes
        settings, about.classes or _numbered(settings), about.class_values or tuple(range(settings.n_labels)),
        about.normalisation or Normalisation.ZSCORE, about.channels or tuple(map(str, range(settings.in_channels))),
        about.voxel_size_um, settings.rule, {"imported": dict(about.record)}, weights, limits=about.limits,
        target_windows=_target_windows(settings, about),
    )  # fmt: skip
    rule, tile = _measured(network, exported.input_shape[2:], tuple(out.shape[2:]), settings.in_channels)
    together = _runs_together(network, x)
    return replace(model, settings=replace(settings, rule=rule, tile=tile, together=together), rule=rule)


def measured_again(network: ForeignNetwork) -> TileRule:
    """Return the tile rule of a network that was adopted, measured anew."""
    settings = network.settings
    if settings.tile:
        return measure_one_size(network, settings.tile, in_channels=settings.in_channels)
    return measure_tile_rule(network, dims=settings.dims, in_channels=settings.in_channels)


def _settings(exported: Exported, about: Description) -> tuple[ForeignSettings, dict[str, Tensor]]:
    """Return settings of which classes, head and rule are not known yet, and the weights of the model file."""
    if len(exported.input_shape) not in (4, 5):
        raise ModelError(
            f"a program must take (batch, channels, *spatial) of 2 or 3 axes, got an example of shape "
            f"{exported.input_shape}; export it with such an example"
        )
    dims, n_channels = len(exported.input_shape) - 2, exported.input_shape[1]
    program, activation = exported.program, None
    if about.head is not Head.LINEAR:  # of values an activation is the network's own affair
        program, activation = program.without_activation(dims)
    tensors = dict(exported.tensors)
    if about.mean or about.std:
        pairs = _pairs("", about.mean, about.std, n=n_channels)
        for name, each in zip(("haloseg.mean", "haloseg.std"), zip(*pairs, strict=True), strict=True):
            tensors[name] = torch.tensor(each, dtype=torch.float32).reshape(-1, *(1,) * dims)
        program = program.scaled("haloseg.mean", "haloseg.std")
    if activation is not None and about.head is not None and about.head.value != activation:
        raise ArgumentError(f"the head must be the program's own, {activation}, got {about.head}; leave --head out")
    weights = {WEIGHTS + name: tensor for name, tensor in tensors.items()} | {GRAPH: graph_tensor(program)}
    unknown = TileRule((1,) * dims, (0,) * dims, (0,) * dims)
    head = Head(activation) if activation else about.head or Head.SOFTMAX
    return ForeignSettings(
        dims, n_channels, 2, head, about.source, (), True, unknown, program, shapes_of(weights)
    ), weights


def _pairs(what: str, mean: tuple[float, ...], std: tuple[float, ...], *, n: int) -> tuple[tuple[float, float], ...]:
    """Return mean and deviation of each of n channels; 0 and 1 where they were left out."""
    mean, std = mean or (0.0,) * n, std or (1.0,) * n
    if not len(mean) == len(std) == n or min(std) <= 0:
        raise ArgumentError(
            f"--{what}mean and --{what}std need {n} numbers, deviations above 0, got {mean} and {std}; give one per "
            "channel"
        )
    return tuple(zip(mean, std, strict=True))


def _target_windows(settings: ForeignSettings, about: Description) -> tuple[tuple[float, float], ...]:
    """Return offset and scale of each channel of a linear head; none of others."""
    if settings.head is Head.LINEAR:
        pairs = _pairs("output-", about.output_mean, about.output_std, n=settings.n_classes)
        return tuple((mean, 1 / std) for mean, std in pairs)
    if about.output_mean or about.output_std:
        raise ArgumentError(f"--output-mean and --output-std need --head linear, got {settings.head}; leave them out")
    return ()


def _head(given: Head, asked: Head | None, n_classes: int) -> Head:
    return Head.SIGMOID if n_classes == 1 and asked is None else given


def _check_eval(exported: Exported) -> None:
    for call in exported.program.calls:
        at, arguments = _LEARNS.get(call.operator), json.loads(call.arguments)
        if at is not None and len(arguments) > at and arguments[at] is True:
            raise ModelError(
                f"a program must be of a network in eval mode, got {call.operator} as in training; call eval() before "
                "torch.export.export"
            )


def _first_pass(network: ForeignNetwork, x: Tensor, dims: int) -> Tensor:
    """Return the output for the example's size; refuse one that is no image, or another one each time."""
    with torch.no_grad():
        try:
            out, again = network(x), network(x)
        except Exception as error:  # operators refuse an input by whatever error they like
            cause = " ".join(str(error).split())[:200]
            raise ModelError(f"a program must run on its own example's size, got {cause}; export it anew") from error
    if not isinstance(out, Tensor) or out.ndim != dims + 2 or not out.is_floating_point() or out.shape[0] != 1:
        raise ModelError(
            f"a program must return logits of shape (batch, classes, *spatial), got "
            f"{tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}; export the network without argmax"
        )
    if not torch.equal(out, again):
        raise ModelError("a program must give the same numbers each time, got others; call eval() before torch.export")
    if not bool(out.isfinite().all()):
        raise ModelError("a program must give finite numbers for noise, got NaN or infinity; look at its weights")
    return out


def _measured(
    network: ForeignNetwork, shape: tuple[int, ...], out_shape: tuple[int, ...], in_channels: int
) -> tuple[TileRule, tuple[int, ...]]:
    """Return the tile rule, and the only size that the network takes; empty where it takes others, too."""
    dims = len(shape)
    for axis in range(dims):
        other = tuple(n * (2 if at == axis else 1) for at, n in enumerate(shape))
        grown = tuple(n + (shape[at] if at == axis else 0) for at, n in enumerate(out_shape))
        if _out_shape(network, (in_channels, *other)) != grown:
            return measure_one_size(network, shape, in_channels=in_channels), shape
    return measure_tile_rule(network, dims=dims, in_channels=in_channels), ()


def _out_shape(network: ForeignNetwork, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the output's spatial shape for an input (channels, *spatial), or None where it is refused."""
    empty = {name: tensor.to("meta") for name, tensor in network.named_buffers()}
    try:
        out: Tensor = torch.func.functional_call(network, empty, (torch.empty((1, *shape), device="meta"),))
    except Exception:  # noqa: BLE001 operators refuse a size by whatever error they like
        return None
    return tuple(out.shape[2:])


def _runs_together(network: ForeignNetwork, x: Tensor) -> bool:
    """Whether two tiles at once give what each gives alone."""
    with torch.no_grad():
        apart = torch.cat([network(one[None]) for one in x])
        try:
            at_once = network.run(x)
        except Exception:  # noqa: BLE001 operators refuse a batch by whatever error they like
            return False
    scale = float(apart.abs().max())
    return at_once.shape == apart.shape and bool(((at_once - apart).abs() <= _TOGETHER * scale).all())


def _numbered(settings: ForeignSettings) -> tuple[str, ...]:
    if settings.head is Head.SIGMOID:
        return ("none", *(str(n) for n in range(1, settings.n_labels)))
    return tuple(str(n) for n in range(settings.n_labels))
