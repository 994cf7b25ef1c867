"""Inspect: what a model file holds, and its tile rule as measured."""

from __future__ import annotations

from typing import Any

from pipeline.unet.families import chain_of, name_of, why_not_streamed
from pipeline.unet.layers import lags
from pipeline.unet.model import build, load_model
from pipeline.unet.receptive import measured_rule


def inspect(path: str) -> dict[str, Any]:
    """Return a JSON document of a model: network, classes, parameters, and the tile rule measured by NaN probes.

    Raises
    ------
    ModelError : the file is no model of ours, or damaged.
    """
    model = load_model(path)
    rule = measured_rule(model.settings)
    network = build(model, device="cpu")
    why = why_not_streamed(model.settings)
    tiles = [rule.tile_shape(tuple(s * k for s in rule.stride)) for k in (1, 4, 16)]
    return {
        "model": str(path), "sha256": model.digest, "kind": name_of(model.settings),
        "network": model.settings.to_json(), "classes": list(model.classes),
        "class_values": list(model.class_values), "parameters": sum(p.numel() for p in network.parameters()),
        "normalisation": model.normalisation.value,
        "voxel_size_um": list(model.voxel_size_um) if model.voxel_size_um else None,
        "stride_shape": list(rule.stride), "halo_shape": list(rule.halo), "trim_shape": list(rule.trim),
        "rule_as_recorded": rule == model.rule, "tile_examples": [list(t) for t in tiles], "training": model.training,
        "streams": not why, "runs_by_tiles_because": why or None,
        "lag_rows": None if why else -lags(chain_of(model.settings), 0)[-1],
    }  # fmt: skip
