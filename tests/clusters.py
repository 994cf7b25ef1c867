"""Real Dask schedulers and workers on the loopback device, for the tests that need them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil


class Processes:
    """A real scheduler and its workers on the loopback device."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "scheduler.json"
        self._all: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", self._file)
        until = time.monotonic() + 30
        while not self._file.exists() or not self._file.read_text():
            assert time.monotonic() < until, "no scheduler"
            time.sleep(0.05)
        self.address = json.loads(self._file.read_text())["address"]

    def worker(self, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        where = ("--local-directory", self._folder, "--no-dashboard", "--memory-limit", "0")
        return self._start("worker", self.address, *where, *options, **environment)

    def _start(self, what: str, *options: object, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--host", "127.0.0.1", *map(str, options)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=os.environ | environment, **quiet)
        self._all.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self._all):
            for each in (*children(process), process):
                each.kill()
            process.wait(30)


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


@contextmanager
def processes(folder: Path):
    started = Processes(folder)
    try:
        yield started
    finally:
        started.close()
