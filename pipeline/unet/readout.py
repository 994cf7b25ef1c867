"""Readout: what is read off a network's logits: classes, probabilities, or the values of a linear head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.errors import ArgumentError
from pipeline.unet.network import classes_of, probabilities_of
from pipeline.unet.numbers import Pairs, restored, widened
from pipeline.unet.settings import Head


@dataclass(frozen=True, slots=True)
class Readout:
    """What is read off logits.

    Attributes
    ----------
    target_windows : (offset, scale) of each channel of a linear head; see ``Model``
    """

    head: Head
    target_windows: Pairs = ()

    def __post_init__(self) -> None:
        if (self.head is Head.LINEAR) != bool(self.target_windows):
            raise ArgumentError(
                f"a linear head needs the windows of its target, and others none, got {self.target_windows} for a "
                f"{self.head} head; give the model's own"
            )

    @property
    def has_classes(self) -> bool:
        """Whether there are classes to be told."""
        return self.head is not Head.LINEAR

    def classes(self, logits: Tensor) -> Tensor:
        """Return the class of each voxel, uint8 (batch, *spatial), of logits (batch, channels, *spatial)."""
        return classes_of(logits, self.head)

    def reals(self, logits: Tensor) -> Tensor:
        """Return probabilities, or a linear head's values in the target's intensities; float32, shape as the logits."""
        if self.has_classes:
            return probabilities_of(widened(logits), self.head)
        return restored(widened(logits), self.target_windows)


def mean(every: Iterator[Tensor], head: Head) -> Tensor | None:
    """Return the logits of the mean of several probabilities; of one alone its logits as they are, None of none.

    The mean is taken in their order, in float32 at least; of a linear head it is that of the values.

    Parameters
    ----------
    every : logits (batch, channels, *spatial), each let go of before the next one is asked for
    """
    first = next(every, None)
    second = None if first is None else next(every, None)
    if first is None or second is None:
        return first
    total, n = probabilities_of(widened(first), head) + probabilities_of(widened(second), head), 2
    del first, second
    for logits in every:
        total += probabilities_of(widened(logits), head)
        n += 1
    match head:
        case Head.SOFTMAX:
            return total.div_(n).log_()
        case Head.SIGMOID:
            return total.div_(n).logit_()
        case Head.LINEAR:
            return total.div_(n)
