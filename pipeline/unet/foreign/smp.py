"""Networks of segmentation-models-pytorch, with weights that its users have trained; an extra, ``haloseg[smp]``."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from pipeline.errors import ArgumentError, ModelError
from pipeline.unet.foreign.exporting import exported
from pipeline.unet.foreign.pt2 import Exported

_EXAMPLE = (128, 128)  # every encoder's stride of at most 32 divides it


def smp_program(
    architecture: str, *, encoder: str, in_channels: int, n_classes: int, weights: bytes | None
) -> Exported:
    """Return a network of segmentation-models-pytorch as a program.

    Parameters
    ----------
    architecture : a class of the library, such as "Unet" or "UnetPlusPlus"
    encoder : such as "resnet34"
    weights : a state dict of the whole network, as ``torch.save`` or safetensors wrote it; None leaves random ones

    Raises
    ------
    ArgumentError : the library is not installed, or has no such network.
    ModelError : the weights are those of another network.
    """
    network = _network(architecture, encoder=encoder, in_channels=in_channels, n_classes=n_classes)
    if weights is not None:
        try:
            network.load_state_dict(_state(weights))
        except RuntimeError as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(
                f"weights must be those of smp:{architecture} with {encoder}, got {cause}; name the network they are of"
            ) from error
    return exported(network, (1, in_channels, *_EXAMPLE))


def _network(architecture: str, *, encoder: str, in_channels: int, n_classes: int) -> nn.Module:
    try:
        library: Any = import_module("segmentation_models_pytorch")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails with the latter
        cause = " ".join(str(error).split())[:100]
        raise ArgumentError(
            f"networks of smp need segmentation-models-pytorch, got {cause}; pip install 'haloseg[smp]'"
        ) from error
    maker = getattr(library, architecture, None)
    if not isinstance(maker, type) or not issubclass(maker, nn.Module):
        raise ArgumentError(f"smp must have the network, got {architecture}; use Unet, UnetPlusPlus or Linknet, say")
    try:
        network: nn.Module = maker(
            encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=n_classes
        )
    except (KeyError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"smp must be able to make {architecture} with {encoder}, got {cause}; use another --encoder, resnet34 say"
        ) from error
    return network.eval()


def _state(content: bytes) -> dict[str, Tensor]:
    """Return a state dict; of a pickle only tensors are loaded."""
    try:
        return load_tensors(content)
    except SafetensorError:
        pass
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch refuses a file by whatever error it likes
        raise ModelError(
            "weights must be a state dict of torch.save or safetensors, got another file; save network.state_dict()"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ModelError("weights must be a state dict, got something else; save network.state_dict()")
    return state
