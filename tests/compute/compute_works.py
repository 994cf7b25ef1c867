"""Works for the tests of runners; sent to worker processes by value, since those do not see the tests' folder."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import cloudpickle

from pipeline.compute.pulse import beat
from pipeline.compute.runner import BlockRecord
from pipeline.errors import ModelError, StorageError


@dataclass(frozen=True, slots=True)
class Scripted:
    """Writes one file per block, and on some blocks does what a script says.

    Under ``folder``: ``blocks/INDEX`` what a block wrote, ``attempts/INDEX-*`` the process of each attempt,
    ``setups/*`` the process of each state, ``spans/PID-*`` when a process was busy.

    acts : (index, act) with act one of fail, fail twice, die, die once, die thrice, disk full
    """

    folder: str
    acts: tuple[tuple[int, str], ...] = ()
    sleep_s: float = 0.0
    setup_fails_with: str = ""

    def setup(self) -> int:
        """Return the process that the state was made in."""
        if self.setup_fails_with == "ours":
            raise ModelError("a model must be readable, got none; give another")
        if self.setup_fails_with:
            raise ValueError(self.setup_fails_with)
        self._leave("setups", uuid4().hex, str(os.getpid()))
        return os.getpid()

    def run(self, state: int, index: int) -> BlockRecord:
        """Do one block."""
        assert state == os.getpid()
        begin = time.time()
        n_before = len(list(Path(self.folder, "attempts").glob(f"{index}-*")))
        self._leave("attempts", f"{index}-{n_before}-{uuid4().hex}", str(os.getpid()))
        self._act(dict(self.acts).get(index, ""), n_before)
        time.sleep(self.sleep_s)
        self._leave("blocks", str(index), f"block {index} is {index * index}")
        self._leave("spans", f"{os.getpid()}-{index}", f"{begin} {time.time()}")
        return BlockRecord(index, index * index, 0.0, 0.0, 0.0)

    def _act(self, act: str, n_before: int) -> None:
        if n_before < {"die": inf, "die once": 1, "die thrice": 3}.get(act, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "fail" or (act == "fail twice" and n_before < 2):
            raise ValueError("this block\nfails")
        if act == "disk full":
            raise StorageError("the disk must have room, got none; free some")

    def _leave(self, kind: str, name: str, text: str) -> None:
        folder = Path(self.folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@dataclass(frozen=True, slots=True)
class Copying(Scripted):
    """The same without a device, as copying is."""

    uses_device: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Environment:
    """Leaves a worker's environment variable in a file."""

    path: str
    name: str

    def setup(self) -> None:
        """Need no state."""

    def run(self, state: Any, index: int) -> BlockRecord:
        """Write the variable."""
        del state
        Path(self.path).write_text(os.environ.get(self.name, ""))
        return BlockRecord(index, 1, 0.0, 0.0, 0.0)


cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])


@dataclass(frozen=True, slots=True)
class Beating:
    """Goes on for a minute, block after block, and gives a sign of life all the time, or none."""

    folder: str
    beats: bool = True

    def setup(self) -> None:
        return None

    def run(self, state: None, index: int) -> BlockRecord:
        """Do one block; block 0 is short."""
        del state
        Path(self.folder, f"begun-{index}-{uuid4().hex}").touch()
        end = time.monotonic() + (0 if index == 0 else 60)
        while time.monotonic() < end:
            time.sleep(0.05)
            if self.beats:
                beat()
        return BlockRecord(index, 1, 0.0, 0.0, 0.0)
