"""Devices: on what the workers of a cluster compute, which the machine that plans a run need not have itself."""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from distributed import Client

from pipeline.compute.asking import ask, warn_of_mute
from pipeline.errors import ClusterError

log = logging.getLogger("haloseg")

DEVICE_TIMEOUT_S = 120.0  # a worker may have to import torch first, from a slow disk


def gpu_workers(workers: Mapping[str, Any]) -> frozenset[str]:
    """Return the addresses of those whose resources name a GPU: where there are any, they alone compute blocks."""
    return frozenset(address for address, each in workers.items() if each["resources"].get("GPU", 0) >= 1)


def device_of(client: Client) -> str:
    """Return the device of the workers that blocks go to: "cuda" where every one has a GPU that torch can use.

    Those that are mute are told of; the others decide.

    Raises
    ------
    ClusterError : none answers: all are mute, or gone.
    """
    every: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    claimed = gpu_workers(every)
    answers = ask(client, _device, workers=claimed or frozenset(every), timeout_s=DEVICE_TIMEOUT_S)
    if not answers.told:
        raise ClusterError(f"no answer of {len(answers.mute) or 'any'} within {DEVICE_TIMEOUT_S:g} s")
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
            "others only copy", n_gpus, len(asked),
        )  # fmt: skip
    return "cpu"


def can_copy(client: Client, scan: str) -> bool:
    """Return whether there are workers without a GPU and all of them see a scan; of URLs they are taken to."""
    every: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    hosts, path = frozenset(every) - gpu_workers(every), scan.partition("::")[0]
    if not hosts or "://" in path:
        return bool(hosts)
    answers = ask(client, partial(_sees, path), workers=hosts)
    n_blind = len(hosts) - sum(each is True for each in answers.told.values())
    if n_blind:
        log.warning(
            "the flow's or command's own process copies %s, since %d of %d workers do not see it: mount it there, too",
            scan, n_blind, len(hosts),
        )  # fmt: skip
    return not n_blind


def _sees(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path))  # noqa: PTH207 absolute patterns


def _device() -> str:
    device: str = resolve_name("pipeline.unet.device:pick_device")("auto")
    return device
