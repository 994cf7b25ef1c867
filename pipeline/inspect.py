"""Inspect: what a model file holds, and its tile rule as measured."""

from __future__ import annotations

from typing import Any

from pipeline.ensemble import kind_of, members_told
from pipeline.unet.families import chain_of, why_not_streamed
from pipeline.unet.foreign.adopt import measured_again
from pipeline.unet.foreign.network import ForeignNetwork, ForeignSettings
from pipeline.unet.model import Model, load_model, networks_of
from pipeline.unet.network import UNet
from pipeline.unet.receptive import measured_rule
from pipeline.unet.schedule import lags


def inspect(path: str) -> dict[str, Any]:
    """Return a JSON document of a model: network, classes, parameters, and the tile rule measured by NaN probes.

    Raises
    ------
    ModelError : the file is no model of ours, or damaged.
    """
    model = load_model(path)
    networks = networks_of(model, device="cpu")
    network, *_ = networks
    why, windows = why_not_streamed(model.settings), model.target_windows
    rule = measured_again(network) if isinstance(network, ForeignNetwork) else measured_rule(model.unet)
    tiles = [rule.tile_shape(tuple(s * k for s in rule.stride)) for k in _cores(model)]
    return {
        "model": str(path), "sha256": model.digest, "kind": kind_of(model), "networks": len(networks),
        "network": model.settings.to_json(), "classes": list(model.classes),
        "class_values": list(model.class_values), "parameters": sum(map(_n_parameters, networks)),
        "normalisation": model.normalisation.value, "limits": [list(pair) for pair in model.limits],
        "makes": "labels" if model.classes else "a prediction",
        **({"target_channels": [{"mean": mean, "std": 1 / scale} for mean, scale in windows]} if windows else {}),
        "voxel_size_um": list(model.voxel_size_um) if model.voxel_size_um else None,
        "stride_shape": list(rule.stride), "halo_shape": list(rule.halo), "trim_shape": list(rule.trim),
        "rule_as_recorded": rule == model.rule, "tile_examples": [list(t) for t in tiles], "training": model.training,
        "streams": not why, "runs_by_tiles_because": why or None,
        "lag_rows": None if why else -lags(chain_of(model.unet), 0)[-1],
        **({"members": members_told(model)} if len(networks) > 1 else {}),
    }  # fmt: skip


def _cores(model: Model) -> tuple[int, ...]:
    """Return the cores of the tiles that are named, in strides."""
    return (1,) if isinstance(model.settings, ForeignSettings) and model.settings.tile else (1, 4, 16)


def _n_parameters(network: UNet | ForeignNetwork) -> int:
    if isinstance(network, ForeignNetwork):
        return network.settings.n_parameters
    return sum(p.numel() for p in network.parameters())
