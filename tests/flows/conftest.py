from __future__ import annotations

import pytest

pytest.importorskip("prefect")

from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="package")
def server():
    with prefect_test_harness(server_startup_timeout=600):
        yield
