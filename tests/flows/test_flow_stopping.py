from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Suspended

from flows import stopping
from flows.stopping import given_up, pausable
from pipeline.errors import GivenUpError

ASKED = {"pause": lambda: Suspended(timeout_seconds=timedelta(hours=1).seconds), "cancel": Cancelling}
seen: dict[str, str] = {}


def give_up():
    """End as a stage does."""
    assert given_up().wait(600)
    raise GivenUpError


@flow
def part():
    seen["part"] = flow_run.get_id()
    try:
        with pausable():
            give_up()
    except GivenUpError as error:
        return Cancelled(message=str(error))


@flow
def whole(*, asked):
    seen["whole"] = flow_run.get_id()
    try:
        with pausable():
            if asked is not None:
                with get_client(sync_client=True) as client:  # as the UI's button does
                    client.set_flow_run_state(UUID(flow_run.get_id()), ASKED[asked](), force=True)
                part(return_state=True)
                assert given_up().is_set()
    except GivenUpError as error:
        return Cancelled(message=str(error))
    return "done"


def state_of(name):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(seen[name])).state


def test_a_run_that_is_paused_gives_up_and_waits_and_its_parts_are_over(server, monkeypatch):
    monkeypatch.setattr(stopping, "SECONDS_BETWEEN_LOOKS", 0.1)
    with pytest.raises(Pause):
        whole(asked="pause")
    assert state_of("whole").name == "Suspended"
    assert state_of("whole").state_details.pause_reschedule
    assert state_of("part").is_cancelled()


def test_a_run_that_is_cancelled_gives_up_without_being_told(server, monkeypatch):
    monkeypatch.setattr(stopping, "SECONDS_BETWEEN_LOOKS", 0.1)
    state = whole(asked="cancel", return_state=True)
    assert state.is_cancelled()
    assert state.message.startswith("the run was cancelled; what is done is kept")
    assert (state_of("whole").is_cancelled(), state_of("part").is_cancelled()) == (True, True)


def test_a_run_that_is_not_paused_ends_as_it_would(server):
    assert whole(asked=None) == "done"
    assert not given_up().is_set()
