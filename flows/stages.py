"""Stages: verbs as Prefect tasks whose errors are one line, as on the command line, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.client.schemas.objects import State
from prefect.states import Failed

from pipeline.errors import ClusterError, PipelineError, StorageError

P = ParamSpec("P")
R = TypeVar("R")

RETRY_AFTER_S: list[float] = [10, 60]


def stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a task; what may pass in a minute, storage or a cluster that does not answer, is tried again.

    An error of ours becomes the task run's message, and is raised for whoever called the stage.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except PipelineError as error:
                return cast("R", failed(error))

        run = task(name=name, retries=len(RETRY_AFTER_S), retry_delay_seconds=RETRY_AFTER_S,
                   retry_condition_fn=_may_pass)(told)  # fmt: skip

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result = run(*args, **kwargs)
            if isinstance(result, State):
                raise cast("PipelineError", result.result(raise_on_failure=False))
            return result

        return call

    return decorate


def failed(error: PipelineError) -> State[Any]:
    """Return the state of a run that ended with an error of ours; a function that returns it gives it to its run."""
    return Failed(message=str(error), data=error)


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:  # noqa: ANN401 Prefect's own objects
    return isinstance(state.result(raise_on_failure=False), StorageError | ClusterError)
