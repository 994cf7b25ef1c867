from __future__ import annotations

import threading
from contextvars import copy_context

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows import slots
from flows.slots import LIMITS, limits_of, slot
from flows.stopping import given_up, pausable
from pipeline.errors import GivenUpError


def held(*names):
    """Return how many slots of each limit are taken."""
    with get_client(sync_client=True) as client:
        return [client.read_global_concurrency_limit_by_name(name).active_slots for name in names]


@pytest.fixture
def limits(server):
    """Have one slot of all GPUs, and two of one archive."""
    made = {"haloseg-gpu": 1, "haloseg-archive-data-a": 2}
    with get_client(sync_client=True) as client:
        for name, n in made.items():
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=n))
        yield
        for name in made:
            client.delete_global_concurrency_limit_by_name(name)


def test_scans_of_two_archives_share_the_slots_and_one_that_is_given_up_waits_no_longer(limits, monkeypatch, caplog):
    monkeypatch.setattr(slots, "SECONDS_BETWEEN_TRIES", 0.5)
    a, b = limits_of("/data/a"), limits_of("/data/b")  # the other archive has no limit of its own
    assert a == ("haloseg-gpu", "haloseg-archive-data-a")
    holds, goes, seen = threading.Event(), threading.Event(), []

    def first():
        LIMITS.set(a)
        with slot():
            holds.set()
            assert goes.wait(600)

    @flow
    def scans():
        with pausable():
            thread = threading.Thread(target=copy_context().run, args=(first,))
            thread.start()
            assert holds.wait(600)
            seen.append(held("haloseg-gpu", a[1]))
            token = LIMITS.set(b)
            threading.Timer(1.0, given_up().set).start()
            with pytest.raises(GivenUpError), slot():
                pytest.fail("a second slot of one")
            given_up().clear()
            goes.set()
            with slot():
                seen.append(held("haloseg-gpu", a[1]))
            LIMITS.reset(token)
            thread.join()

    scans()
    assert seen == [[1, 1], [1, 0]]
    told = [each.getMessage() for each in caplog.records if "waits for a slot" in each.getMessage()]
    assert told in (["waits for a slot of haloseg-gpu: other scans compute"] * n for n in (1, 2))  # once a wait
    assert not [each for each in caplog.records if each.name.startswith("prefect._internal")]
    assert held("haloseg-gpu", a[1]) == [0, 0]


def test_without_a_limit_nothing_waits(server):
    @flow
    def scan():
        LIMITS.set(("haloseg-none",))
        with slot(), slot(), slot():
            return "done"

    assert scan() == "done"
