"""Devices: on what the workers of a cluster compute, which the machine that plans a run need not have itself."""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from distributed import Client

from pipeline.compute.asking import ask, warn_of_mute
from pipeline.errors import ClusterError

log = logging.getLogger("haloseg")

DEVICE_TIMEOUT_S = 120.0  # a worker may have to import torch first, from a slow disk


def gpu_workers(workers: Mapping[str, Any]) -> frozenset[str]:
    """Return the addresses of those whose resources name a GPU: where there are any, they alone get blocks."""
    return frozenset(address for address, each in workers.items() if each["resources"].get("GPU", 0) >= 1)


def device_of(client: Client) -> str:
    """Return the device of the workers that blocks go to: "cuda" where every one has a GPU that torch can use.

    Those that are mute are told of; the others decide.

    Raises
    ------
    ClusterError : all are mute.
    """
    every: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    claimed = gpu_workers(every)
    answers = ask(client, _device, workers=claimed or frozenset(every), timeout_s=DEVICE_TIMEOUT_S)
    if answers.mute and not answers.told:
        raise ClusterError(f"no answer of {len(answers.mute)} within {DEVICE_TIMEOUT_S:g} s")
    warn_of_mute(answers.mute, what="the others tell what all compute on", timeout_s=DEVICE_TIMEOUT_S)
    asked, n_gpus = answers.told, sum(each == "cuda" for each in answers.told.values())
    if n_gpus == len(asked) > 0:
        return "cuda"
    if claimed:
        log.warning(
            "all compute on the CPU, since torch can use a GPU on %d of the %d workers whose resources name one: "
            "mend the others, or start them without --resources GPU=1", n_gpus, len(asked),
        )  # fmt: skip
    elif n_gpus:
        log.warning(
            "all compute on the CPU, since %d of %d workers have a GPU: start these with --resources GPU=1, and the "
            "others get no blocks", n_gpus, len(asked),
        )  # fmt: skip
    return "cpu"


def _device() -> str:
    device: str = resolve_name("pipeline.unet.device:pick_device")("auto")
    return device
