"""Board: the log of a training that TensorBoard shows, for those who ask for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ArgumentError
from pipeline.store.location import Location
from pipeline.unet.training.course import Step, Validation


class Board:
    """Writes losses, rate, patches/s, Dice or PSNR as events; a training that goes on goes on in the same curves.

    Validations that a checkpoint remembers are told again before the first step: they are in the log already, unless
    it is new. What a killed run has logged after its checkpoint is left out once this run comes there.
    """

    def __init__(self, folder: Path, *, classes: tuple[str, ...]) -> None:
        self._folder, self._classes = folder, classes
        self._writer: Any = None
        self._told_before: list[Validation] = []

    def took(self, step: Step) -> None:
        """Log a step."""
        if self._writer is None:
            self._open(step.step)
        for name, value in (("loss/step", step.loss), ("rate", step.rate), ("patches_per_s", step.patches_per_s)):
            self._writer.add_scalar(name, value, step.step)

    def validated(self, now: Validation) -> None:
        """Log a validation."""
        if self._writer is None:
            self._told_before.append(now)
        else:
            self._write(now)

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, first: int) -> None:
        """Go on with the log before a step, the first one of this run."""
        is_new = not any(self._folder.glob("events.out.tfevents.*"))
        self._writer = _writer_class()(str(self._folder), purge_step=first)
        for each in self._told_before if is_new else ():
            self._write(each)

    def _write(self, now: Validation) -> None:
        self._writer.add_scalar("loss/training", now.train_loss, now.step)
        self._writer.add_scalar("loss/held_out", now.loss, now.step)
        for name, dice in zip(self._classes, now.dice, strict=True):
            if dice is not None:
                self._writer.add_scalar(f"dice/{name}", dice, now.step)
        if now.psnr is not None:
            self._writer.add_scalar("psnr_db", now.psnr, now.step)
        self._writer.flush()


class _Unlogged:
    """Nobody asked for a log."""

    def took(self, step: Step) -> None:
        """Do nothing."""

    def validated(self, now: Validation) -> None:
        """Do nothing."""


@contextmanager
def board(folder: str | None, *, classes: tuple[str, ...]) -> Iterator[Board | _Unlogged]:
    """Log in a folder while the block runs; None logs nothing.

    Raises
    ------
    ArgumentError : TensorBoard is not there, or the folder is no local path.
    """
    if folder is None:
        yield _Unlogged()
        return
    if not Location(folder).is_local:
        raise ArgumentError(f"a TensorBoard log must be a local folder, got {folder}; copy it there afterwards")
    _writer_class()
    log = Board(Path(Location(folder).url), classes=classes)
    try:
        yield log
    finally:
        log.close()


def _writer_class() -> Any:  # noqa: ANN401 torch's class has no types
    """Return what writes events; it is imported by those alone who ask for a log."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise ArgumentError(
            'a TensorBoard log needs the package tensorboard, which is missing; pip install "haloseg[tensorboard]"'
        ) from missing
    return SummaryWriter
