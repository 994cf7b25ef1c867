"""Learning: what people see on a terminal while a network learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.unet.training.course import Step, Validation

_KEPT = 0.95  # of the loss and the speed that are shown, from step to step


class Learning:
    """A bar of the steps with loss, best validation, patches per second and time left; a line per validation."""

    def __init__(self, progress: Progress, *, n_steps: int, minutes: float | None) -> None:
        self._progress, self._n_steps, self._minutes = progress, n_steps, minutes
        self._bar = progress.add_task("train", total=n_steps, loss="", best="", speed="", left="")
        self._begin_s, self._first = monotonic(), 0
        self._loss, self._speed = 0.0, 0.0
        self._best: Validation | None = None

    def begins(self, network: str) -> None:
        """Write which network is to learn, the one before being done, and begin anew."""
        self._first, self._best = 0, None
        self._progress.reset(self._bar, loss="", best="", speed="", left="")
        self._progress.console.print(network, markup=False, highlight=False, soft_wrap=True)

    def took(self, step: Step) -> None:
        """Move the bar."""
        if not self._first:
            self._begin_s, self._first = monotonic(), step.step
            self._loss, self._speed = step.loss, step.patches_per_s
        self._loss += (1 - _KEPT) * (step.loss - self._loss)
        self._speed += (1 - _KEPT) * (step.patches_per_s - self._speed)
        self._progress.update(
            self._bar, completed=step.step, loss=f"loss {self._loss:.4f}", speed=f"{self._speed:.3g} patches/s",
            left=self._left(step.step),
        )  # fmt: skip

    def validated(self, now: Validation) -> None:
        """Write a line, and show the validation if it is the best so far."""
        if self._best is None or now.loss < self._best.loss:
            self._best = now
            self._progress.update(self._bar, best=f"best {now.loss:.4f}, {_in_short(now)}")
        line = f"step {now.step}: loss {now.train_loss:.4f}, held out {now.loss:.4f}, {now.told}"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        """Return how long it takes until the steps or the minutes are over, whichever comes first."""
        spent, done = monotonic() - self._begin_s, step - self._first
        times = [spent / done * (self._n_steps - step)] if done else []
        times += [max(0.0, 60 * self._minutes - spent)] if self._minutes else []
        if not times:
            return ""
        left = round(min(times))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


@contextmanager
def learning(console: Console, *, n_steps: int, minutes: float | None) -> Iterator[Learning]:
    """Show how a training goes while the block runs; where the console is no terminal, the lines alone."""
    columns = (
        BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[best]}"), TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Learning(progress, n_steps=n_steps, minutes=minutes)


def _in_short(now: Validation) -> str:
    """Return the mean of Dice, or PSNR."""
    known = [dice for dice in now.dice if dice is not None]
    if known:
        return f"Dice {sum(known) / len(known):.3f}"
    return "Dice -" if now.psnr is None else f"{now.psnr:.1f} dB"
