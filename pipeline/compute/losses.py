"""Losses: which tasks were on a worker that died or left, as the scheduler tells; it runs them again without a word.

The scheduler tells of a worker that is gone before it runs that worker's tasks elsewhere, on the one stream on which
it tells of tasks that are done: who hears that a task is done has heard of its losses.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client

_TOPIC = "all"
DIED = "its worker died"
LEFT = "its worker left"


class Losses:
    """The causes by which tasks whose keys begin with ``prefix`` were lost; those that are not asked for stay."""

    def __init__(self, *, prefix: str) -> None:
        self._prefix = prefix
        self._causes: dict[str, tuple[str, ...]] = {}

    @contextmanager
    def listening(self, client: Client) -> Iterator[None]:
        """Hear of every worker that is gone while the block runs.

        A client that left without a word would be told of its own leaving: a CRITICAL traceback in the scheduler's log.
        """
        client.subscribe_topic(_TOPIC, self.hear)
        try:
            yield
        finally:
            if client.status == "running":
                with suppress(Exception):  # the scheduler may die in this moment
                    client.unsubscribe_topic(_TOPIC)

    def hear(self, event: tuple[float, Any]) -> None:
        """Take what the scheduler tells, in the client's own thread."""
        told = event[1]
        if not isinstance(told, dict) or told.get("action") != "remove-worker":
            return
        cause = LEFT if told["expected"] else DIED
        for key in {*told["processing-tasks"], *told["lost-computed-tasks"]}:
            if isinstance(key, str) and key.startswith(self._prefix):
                self._causes[key] = (*self._causes.get(key, ()), cause)

    def pop(self, key: str) -> tuple[str, ...]:
        """Return why the task was lost, once for each time, and forget it."""
        return self._causes.pop(key, ())

    def forget(self, prefix: str) -> None:
        """Drop what is known of tasks that nobody waits for any more."""
        for key in [key for key in list(self._causes) if key.startswith(prefix)]:
            self._causes.pop(key, None)
