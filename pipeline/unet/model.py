"""The model file: .safetensors whose metadata holds one JSON document under ``haloseg``. No pickle is ever loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.config import Passes, Tta
from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.store.location import Location
from pipeline.store.scaling import Limits, Measured, Scaling, Window, Windows
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.network import ForeignNetwork, ForeignSettings
from pipeline.unet.members import apart
from pipeline.unet.network import UNet, channels_last
from pipeline.unet.settings import Head, UNetSettings, closed_form_rule

FORMAT = 5
_FORMAT_OF_UNETS, _FORMAT_OF_OTHERS, _FORMAT_OF_SLICES, _FORMAT_OF_ENSEMBLES = 1, 2, 3, 4  # for an older haloseg, too
_FIELDS = {
    "format", "network", "classes", "class_values", "normalisation", "channels", "voxel_size_um", "rule", "training",
}  # fmt: skip
_OPTIONAL_FIELDS = ("limits", "target_windows", "input_windows")  # where there are any, pairs of numbers
_NUMBER = "n_networks"  # where there are several


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A trained network and all that is needed to use it rightly.

    Attributes
    ----------
    classes : name of each class, in the order of the values in a segmented volume
    class_values : what each class is called in the labels that the network learned from
    normalisation : how intensities are brought to the network's scale
    channels : names of the image's channels
    voxel_size_um : of the images that it learned from, along their spatial axes; None where they told none
    rule : along the network's spatial axes
    training : record of the training, a JSON object
    weights : tensors by name, as in ``UNet.state_dict``; those of an ensemble as ``members.together`` has them
    digest : SHA-256 of the file; empty before it is saved
    limits : of the normalisation, where it has some; see ``Scaling``
    target_windows : (offset, scale) of each channel of a linear head, whose values times ``1 / scale`` plus offset are
        intensities of the target; empty for other heads
    input_windows : (offset, scale) of each of the image's channels, the same for every image, so that intensities that
        mean the same stay the same; empty: those of each image follow from its own statistics
    n_networks : more than one of an ensemble, whose probabilities, or values, are the mean of theirs
    """

    settings: UNetSettings | ForeignSettings
    classes: tuple[str, ...]
    class_values: tuple[int, ...]
    normalisation: Normalisation
    channels: tuple[str, ...]
    voxel_size_um: tuple[float, ...] | None
    rule: TileRule
    training: dict[str, Any]
    weights: dict[str, Tensor]
    digest: str = ""
    limits: Limits = ()
    target_windows: tuple[tuple[float, float], ...] = ()
    input_windows: tuple[tuple[float, float], ...] = ()
    n_networks: int = 1

    @property
    def scaling(self) -> Scaling:
        """How intensities are brought to the network's scale, with its limits."""
        return Scaling(self.normalisation, self.limits)

    def __post_init__(self) -> None:
        n = self.settings.n_labels
        if not len(self.classes) == len(self.class_values) == n:
            raise ArgumentError(
                f"a model needs {n} class names and values, got {self.classes} and {self.class_values}; "
                "give one per class"
            )
        self._check_target()
        if len(set(self.class_values)) != n or len(self.channels) != self.settings.image_channels:
            raise ArgumentError(
                f"class values must differ, and channels be {self.settings.image_channels}, got {self.class_values} "
                f"and {self.channels}; name each once"
            )
        expected = _rule_of(self.settings)
        if self.rule != expected:
            raise ArgumentError(
                f"the tile rule must follow from the network, {expected}, got {self.rule}; save the model anew"
            )
        if self.n_networks != 1 and isinstance(self.settings, ForeignSettings):
            raise ArgumentError(f"an ensemble must be of networks of ours, got {self.settings.source}; run it alone")
        for each in apart(self.weights, self.n_networks):
            _check_weights(self.settings, each)
        self.scaling.check_dims(self.settings.dims)

    @property
    def unet(self) -> UNetSettings:
        """The settings of a network of ours, which can be streamed."""
        if isinstance(self.settings, ForeignSettings):
            raise ModelError("a network from elsewhere runs by tiles, got one to be streamed; leave --slab out")
        return self.settings

    @property
    def members(self) -> tuple[Model, ...]:
        """The networks of an ensemble, each as a model of its own; the model itself where it is none."""
        if self.n_networks == 1:
            return (self,)
        parts = apart(self.weights, self.n_networks)
        return tuple(replace(self, weights=each, n_networks=1, digest="") for each in parts)

    def passes(self, tta: Tta) -> Passes:
        """Return what is averaged with this test-time augmentation."""
        return Passes(self.n_networks, tta.n_turns(self.settings.dims))

    def windows(self, image: Measured) -> Windows:
        """Return what the network sees of each channel of an image."""
        return tuple(Window(*each) for each in self.input_windows) or image.windows(self.scaling)

    def _check_target(self) -> None:
        n, scales = len(self.target_windows), [scale for _, scale in (*self.target_windows, *self.input_windows)]
        linear = self.settings.head is Head.LINEAR
        n_seen = len(self.input_windows) or self.settings.image_channels
        fits = n == (self.settings.n_classes if linear else 0) and n_seen == self.settings.image_channels
        if not fits or not all(0 < scale < math.inf for scale in scales):
            raise ArgumentError(
                f"a linear head needs an offset and a scale above 0 for each of its channels, and others none, got "
                f"{self.target_windows} for a {self.settings.head} head and {self.input_windows} for images; save the "
                "model anew"
            )


def save_model(model: Model, path: str | os.PathLike[str]) -> Model:
    """Write the model at a path or URL, at once or not at all; returns it with the digest of its file."""
    content = _content(model)
    Location(os.fspath(path)).write_bytes(content)
    return replace(model, digest=hashlib.sha256(content).hexdigest())


def as_saved(model: Model) -> Model:
    """Return the model with the digest that its file would have."""
    return replace(model, digest=hashlib.sha256(_content(model)).hexdigest())


def load_model(path: str | os.PathLike[str]) -> Model:
    """Return the model in the file at a path or URL.

    Raises
    ------
    ModelError : there is no file, it is damaged, no model of ours, of a newer format, or its parts do not fit.
    """
    try:
        content = Location(os.fspath(path)).read_bytes()
    except (OSError, ImportError, ValueError) as error:
        cause = type(error).__name__
        raise ModelError(f"a model must be a readable file, got {path} ({cause}); check the path") from error
    try:
        document = _document(content)
        weights = load_tensors(content)
        return _from_json(document, weights=weights, digest=hashlib.sha256(content).hexdigest())
    except (SafetensorError, KeyError, TypeError, ValueError, ModelError) as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"a model must be an undamaged .safetensors file written by haloseg, got {path}: {cause}; "
            "copy it anew, or train one with haloseg train"
        ) from error


def networks_of(model: Model, device: str) -> tuple[UNet | ForeignNetwork, ...]:
    """Return the model's networks, one but of an ensemble; see ``build``."""
    return tuple(build(each, device) for each in model.members)


def unets_of(model: Model, device: str) -> tuple[UNet, ...]:
    """Return the model's networks, which are ours, for engines to be made of: on a CPU with the model's own tensors."""
    return tuple(_unet(each).to(device) for each in model.members)


def build(model: Model, device: str) -> UNet | ForeignNetwork:
    """Return the network of a model, which is no ensemble, on a device, in eval mode and without gradients."""
    if not isinstance(model.settings, ForeignSettings):
        return build_unet(model, device)
    network = ForeignNetwork(model.settings, model.weights)
    network.to(memory_format=channels_last(model.settings.dims))  # type: ignore[call-overload]
    return network.to(device).eval()


def build_unet(model: Model, device: str) -> UNet:
    """Return the network of a model, which is ours and no ensemble, on a device, in eval mode and without gradients."""
    network = _unet(model)
    network.to(memory_format=channels_last(model.unet.dims))  # type: ignore[call-overload]
    return network.to(device)


def _unet(model: Model) -> UNet:
    with torch.device("meta"):
        network = UNet(model.unet)
    network.load_state_dict(model.weights, assign=True)
    return network.eval().requires_grad_(False)


def _content(model: Model) -> bytes:
    """Return the bytes of a model's file."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.weights.items()}
    return save_tensors(tensors, {"haloseg": json.dumps(_to_json(model), sort_keys=True, allow_nan=False)})


def _document(content: bytes) -> dict[str, Any]:
    """Return our JSON document out of a safetensors header: a length, then a JSON object with ``__metadata__``."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ModelError("it is truncated or of another kind")
    header = json.loads(content[8 : 8 + length])
    about = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if "haloseg" not in about:
        raise ModelError("it has no haloseg entry")
    document = json.loads(about["haloseg"])
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ModelError("its haloseg entry has no format number")
    if document["format"] > FORMAT:
        raise ModelError(f"its format {document['format']} is newer than {FORMAT}, the newest known: update haloseg")
    if set(document) - {*_OPTIONAL_FIELDS, _NUMBER} != _FIELDS:
        raise ModelError(f"its haloseg entry must have {sorted(_FIELDS)}, has {sorted(document)}")
    return document


def _to_json(model: Model) -> dict[str, Any]:
    optional = {name: getattr(model, name) for name in _OPTIONAL_FIELDS if getattr(model, name)}
    several = {_NUMBER: model.n_networks} if model.n_networks > 1 else {}
    return optional | several | {
        "format": _format_of(model), "network": model.settings.to_json(), "classes": model.classes,
        "class_values": model.class_values, "normalisation": model.normalisation.value, "channels": model.channels,
        "voxel_size_um": model.voxel_size_um, "training": model.training,
        "rule": {"stride": model.rule.stride, "halo": model.rule.halo, "trim": model.rule.trim},
    }  # fmt: skip


def _format_of(model: Model) -> int:
    """Return the oldest format that has words for a model, so that an older haloseg refuses it as too new at most."""
    if model.settings.neighbours:
        return FORMAT
    if model.n_networks > 1:
        return _FORMAT_OF_ENSEMBLES
    if model.scaling.is_slicewise:
        return _FORMAT_OF_SLICES
    other = model.target_windows or isinstance(model.settings, ForeignSettings)
    return _FORMAT_OF_OTHERS if other else _FORMAT_OF_UNETS


def _from_json(document: dict[str, Any], *, weights: dict[str, Tensor], digest: str) -> Model:
    rule, size, n = document["rule"], document["voxel_size_um"], document.get(_NUMBER, 1)
    if type(n) is not int:
        raise ModelError(f"its number of networks is {n!r}, no whole number")
    if not isinstance(document["training"], dict):
        raise ModelError("its training record is no JSON object")
    tile_rule = TileRule(*(tuple(map(int, rule[name])) for name in ("stride", "halo", "trim")))
    limits, target_windows, input_windows = (
        tuple((float(a), float(b)) for a, b in document.get(name, ())) for name in _OPTIONAL_FIELDS
    )
    network = document["network"]
    foreign = isinstance(network, dict) and network.get("kind") == "program"
    settings = ForeignSettings.from_json(network, tile_rule, weights) if foreign else UNetSettings.from_json(network)
    return Model(
        settings, tuple(map(str, document["classes"])), tuple(map(int, document["class_values"])),
        Normalisation(document["normalisation"]), tuple(map(str, document["channels"])),
        None if size is None else tuple(map(float, size)), tile_rule, document["training"], weights, digest, limits,
        target_windows, input_windows, n,
    )  # fmt: skip


def _rule_of(settings: UNetSettings | ForeignSettings) -> TileRule:
    return settings.rule if isinstance(settings, ForeignSettings) else closed_form_rule(settings)


def _check_weights(settings: UNetSettings | ForeignSettings, weights: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of the network, or not finite."""
    if isinstance(settings, ForeignSettings):
        settings.check_weights(weights)
        return
    with torch.device("meta"):
        expected = UNet(settings).state_dict()
    if odd := sorted(set(expected) ^ set(weights)):
        raise ModelError(f"tensors must be those of the network, got {len(odd)} too many or missing, such as {odd[0]}")
    for name, tensor in weights.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ModelError(
                f"tensor {name} must be {like.dtype} of shape {tuple(like.shape)}, got {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"tensor {name} must be finite, got NaN or infinity")
