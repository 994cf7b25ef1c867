from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time

import pytest
from volumes import model_file, scan_file

from flows.archive import segment_archive

SHAPE = (40, 120, 120)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a small disk"),
]  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """Make a disk of 1 MiB."""
    (tmp_path / "disk").mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "haloseg-test", tmp_path / "disk"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"needs a mount: {made.stderr.strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def shards(image):
    return {str(each.relative_to(image)): each.read_bytes() for each in image.rglob("c/**/*") if each.is_file()}


def test_a_disk_that_fills_up_and_is_freed_ends_in_the_same_bytes(server, disk, tmp_path):
    (tmp_path / "scans").mkdir()
    scan_file(tmp_path / "scans" / "scan.tif", SHAPE)
    os.utime(tmp_path / "scans" / "scan.tif", (time.time() - 600,) * 2)
    model = str(model_file(tmp_path / "model.safetensors"))
    (disk / "others").write_bytes(b"x" * 700_000)

    def free():
        while shutil.disk_usage(disk).free > 20_000 and time.monotonic() < begin + 60:
            time.sleep(0.05)
        time.sleep(2)
        (disk / "others").unlink()

    begin = time.monotonic()
    thread = threading.Thread(target=free)
    thread.start()
    state = segment_archive(str(tmp_path / "scans"), model, images=str(disk / "images"), return_state=True)
    thread.join()
    assert state.message.startswith("1 scans: 1 published")
    assert time.monotonic() - begin > 10  # it was tried again, after a while
    again = segment_archive(str(tmp_path / "scans"), model, images=str(tmp_path / "roomy"), return_state=True)
    assert again.message.startswith("1 scans: 1 published")
    assert shards(disk / "images" / "scan.zarr") == shards(tmp_path / "roomy" / "scan.zarr")
