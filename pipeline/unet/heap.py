"""Heap: how far memory grows while tensors of many sizes come and go; plain integers."""

from __future__ import annotations

from collections.abc import Hashable


class Heap:
    """Places one after another; a freed one is used again, whole or its first part, but never grows together again.

    That is how the C library's heap fares under activations: the small objects that come with every tensor settle
    between the large ones, and stay.
    """

    def __init__(self) -> None:
        self.end = self.most = 0
        self._free: list[tuple[int, int]] = []
        self._taken: dict[Hashable, tuple[int, int]] = {}

    def take(self, name: Hashable, size: int) -> None:
        """Put a tensor where it fits best: in the smallest free place, else at the end."""
        place = min((each for each in self._free if each[1] >= size), key=lambda each: (each[1], each[0]), default=None)
        if place is not None:
            self._free.remove(place)
            start, was = place
            if was > size:
                self._free.append((start + size, was - size))
        else:
            start = next((at for at, n in self._free if at + n == self.end), self.end)
            self._free = [each for each in self._free if sum(each) != self.end]
            self.end = start + size
            self.most = max(self.most, self.end)
        self._taken[name] = start, size

    def free(self, name: Hashable) -> None:
        """Let go of a tensor."""
        self._free.append(self._taken.pop(name))
