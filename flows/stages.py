"""Stages: verbs as Prefect tasks whose errors are one line, as on the command line, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.stopping import given_up
from pipeline.errors import ClusterError, PipelineError, StorageError

P = ParamSpec("P")
R = TypeVar("R")

RETRY_AFTER_S = (10.0, 60.0)


def stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a task; what may pass in a minute, storage or a cluster that does not answer, is tried again.

    An error of ours becomes the task run's message, and is raised for whoever called the stage. The waiting is ours,
    not Prefect's, so that a flow that is cancelled need not wait for its end.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            for delay_s in (*RETRY_AFTER_S, None):
                try:
                    return function(*args, **kwargs)
                except (StorageError, ClusterError) as error:
                    if delay_s is None or not _waited(delay_s, error):
                        return cast("R", failed(error))
                except PipelineError as error:
                    return cast("R", failed(error))
            raise AssertionError("the last attempt returns")

        run = task(name=name)(told)

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


def _waited(delay_s: float, error: PipelineError) -> bool:
    """Wait before the next attempt; returns False as soon as the flow is to end."""
    get_run_logger().warning("%s; tried again in %g s", error, delay_s)
    return not given_up().wait(delay_s)
