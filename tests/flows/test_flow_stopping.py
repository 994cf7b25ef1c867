from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.runtime import flow_run
from prefect.states import Cancelled, Suspended

from flows import stopping
from flows.stopping import given_up, pausable
from pipeline.errors import GivenUpError

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
def whole(*, pause):
    seen["whole"] = flow_run.get_id()
    with pausable():
        if pause:
            with get_client(sync_client=True) as client:  # as the UI's button does
                state = Suspended(timeout_seconds=timedelta(hours=1).seconds)
                client.set_flow_run_state(UUID(flow_run.get_id()), state, force=True)
            part()
            assert given_up().is_set()
        return "done"


def state_of(name):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(seen[name])).state


def test_a_run_that_is_paused_gives_up_and_waits_and_its_parts_are_over(server, monkeypatch):
    monkeypatch.setattr(stopping, "SECONDS_BETWEEN_LOOKS", 0.1)
    with pytest.raises(Pause):
        whole(pause=True)
    assert state_of("whole").name == "Suspended"
    assert state_of("whole").state_details.pause_reschedule
    assert state_of("part").is_cancelled()


def test_a_run_that_is_not_paused_ends_as_it_would(server):
    assert whole(pause=False) == "done"
    assert not given_up().is_set()
