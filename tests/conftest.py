from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from objects import environment, new_bucket, object_server

import pipeline.unet  # noqa: F401 settles how torch's threads wait, before a test module imports torch

settings.register_profile("haloseg", deadline=None)  # a busy machine is no counterexample
settings.load_profile("haloseg")


@pytest.fixture(scope="module")
def one_thread():
    """Have torch compute in one thread: on tiny networks, and a busy machine, threads wait for each other above all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real scans with their truth; see HALOSEG_DATA in the README."""
    folder = os.environ.get("HALOSEG_DATA")
    if not folder:
        pytest.skip("needs real scans: set HALOSEG_DATA to their folder")
    path = Path(folder)
    assert path.is_dir(), f"HALOSEG_DATA must be a folder, got {folder}"
    return path


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Yield the address of a server that speaks S3."""
    with object_server(tmp_path_factory.mktemp("objects")) as address:
        yield address


@pytest.fixture
def bucket(objects, monkeypatch) -> str:
    """Return the URL of a bucket of this test's own; this process and its children are set up to find it."""
    for name, value in environment(objects).items():
        monkeypatch.setenv(name, value)
    return new_bucket(objects)
