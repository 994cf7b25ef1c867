import pytest


@pytest.fixture(autouse=True, scope="module")
def all_in_one_thread(one_thread):
    """The networks here are tiny."""
