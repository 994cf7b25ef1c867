"""Stopping: a flow run that an operator cancels or pauses ends soon, and so that its work can be taken up again.

    cancelled   the state on the server becomes "Cancelling"; Prefect's runner raises TerminationSignal in the main
                thread, late if the server was started again since: so the process asks, too, now and then
    paused      the state becomes "Suspended", of which nobody tells the process but itself

A run that is resumed begins again at the top, in a new process, and takes up what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event, Thread
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows.showing import shown
from pipeline.errors import GivenUpError

SECONDS_BETWEEN_LOOKS = 3.0
_LONGEST_WAIT_S = 1.0

_GIVEN_UP: ContextVar[Event | None] = ContextVar("given_up", default=None)


def given_up() -> Event:
    """Return what is set once the flow run that this code belongs to is to end; outside of one it never is."""
    return _GIVEN_UP.get() or Event()


@contextmanager
def pausable() -> Iterator[None]:
    """Have the outermost flow run give up its work when it is cancelled or paused.

    Raises
    ------
    GivenUpError : it is cancelled.
    Pause : it is paused; Prefect's own, by which it ends the process and keeps the run to be resumed.
    """
    run_id = flow_run.get_id()
    if _GIVEN_UP.get() is not None or run_id is None:
        yield
        return
    event, over, seen, log = Event(), Event(), list[State](), get_run_logger()
    token = _GIVEN_UP.set(event)

    def look() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            state = shown(lambda: _ending(UUID(run_id)))
            if state is not None:
                log.info("%s: what is at work stops, and what is missing is taken up later", state.name)
                seen.append(state)
                event.set()
                return

    thread = Thread(target=copy_context().run, args=(look,), name="haloseg-pause", daemon=True)
    thread.start()
    try:
        yield
    except GivenUpError:
        if not seen or not seen[0].is_paused():
            raise
    except Pause:  # Prefect has seen it first, between two stages
        shown(lambda: _end_children(UUID(run_id)))
        raise
    finally:
        over.set()
        thread.join(_LONGEST_WAIT_S)  # it may be asking a server that does not answer
        _GIVEN_UP.reset(token)
    if seen and not seen[0].is_paused():
        raise GivenUpError
    if seen:
        shown(lambda: _end_children(UUID(run_id)))
        raise Pause(state=seen[0])


def _ending(run_id: UUID) -> State | None:
    """Return the state of a run that is being cancelled, or paused so that it can be resumed; None of any other."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    if state is None or not (state.is_cancelling() or (state.is_paused() and state.state_details.pause_reschedule)):
        return None
    return state


def _end_children(run_id: UUID) -> None:
    """Cancel the runs that Prefect leaves "Running" when their parent is paused; the resumed parent makes new ones."""
    ours = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        for child in client.read_flow_runs(flow_run_filter=ours):
            if child.state is not None and not child.state.is_final():
                ended: State = Cancelled(message="paused with the run it is part of, which goes on when it is resumed")
                client.set_flow_run_state(child.id, ended, force=True)
