from __future__ import annotations

import os
from pathlib import Path

import pytest

import pipeline.unet  # noqa: F401 settles how torch's threads wait, before a test module imports torch


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real scans with their truth; see HALOSEG_DATA in the README."""
    folder = os.environ.get("HALOSEG_DATA")
    if not folder:
        pytest.skip("needs real scans: set HALOSEG_DATA to their folder")
    path = Path(folder)
    assert path.is_dir(), f"HALOSEG_DATA must be a folder, got {folder}"
    return path
