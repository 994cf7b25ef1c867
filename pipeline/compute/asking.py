"""Asking: the workers of a cluster are asked, or given, something by all that they have; one that is mute holds nobody.

Dask sends to all workers and waits for each: for ever for one that is frozen, even when the scheduler has dropped it
(distributed 2026.8), as it does after five minutes without a sign of life.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Client

log = logging.getLogger("haloseg")

ANSWER_TIMEOUT_S = 30.0
_MUTE = object()


@dataclass(frozen=True, slots=True)
class Answers:
    """What workers told, an exception too, and those that were mute; one that died or left meanwhile is neither."""

    told: dict[str, Any]
    mute: frozenset[str]


def ask(
    client: Client, function: Callable[..., Any], *, workers: Iterable[str] | None = None,
    timeout_s: float | None = None,
) -> Answers:
    """Return what a function returns on each worker, all by default, within the time limit."""
    limit_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s

    async def one(worker: str) -> Any:  # noqa: ANN401
        try:
            found = await asyncio.wait_for(client.run(function, workers=[worker], on_error="return"), limit_s)
        except TimeoutError:
            return _MUTE
        return found.get(worker)

    async def every(asked: list[str]) -> list[Any]:
        return await asyncio.gather(*map(one, asked))

    asked = sorted(client.scheduler_info(n_workers=-1)["workers"] if workers is None else workers)
    answers = dict(zip(asked, client.sync(every, asked), strict=True))
    mute = frozenset(worker for worker, told in answers.items() if told is _MUTE)
    return Answers({worker: told for worker, told in answers.items() if told is not None and told is not _MUTE}, mute)


def warn_of_mute(mute: frozenset[str], *, what: str, timeout_s: float | None = None) -> None:
    """Say which workers were mute, if there are any, and what that means for the run."""
    if mute:
        log.warning(
            "workers must answer within %g s, got none from %s (frozen, or too busy?): %s; restart them",
            ANSWER_TIMEOUT_S if timeout_s is None else timeout_s, " and ".join(sorted(mute)), what,
        )  # fmt: skip


def tell_all(client: Client, call: Callable[..., Any], *args: object, **named: object) -> None:
    """Make a call of a client that sends to every worker; one that is mute takes it when it wakes up."""
    try:
        client.sync(partial(call, *args, **named), callback_timeout=ANSWER_TIMEOUT_S)
    except TimeoutError:
        log.warning("not every worker took what the run sends it within %g s: the others go on", ANSWER_TIMEOUT_S)
