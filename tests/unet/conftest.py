import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # The networks here are tiny, and threads that wait for each other on a busy machine take a hundred times longer.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
