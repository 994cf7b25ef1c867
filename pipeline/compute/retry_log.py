"""RetryLog: tells of a run's attempts that came to nothing, the first ones word for word, then how many there were.

A mount that is gone for an hour fails every block of every worker in turn: a line for each would bury what matters, and
a Prefect server keeps every line of a flow run in its database.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

log = logging.getLogger("haloseg")

FIRST_LINES = 10
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0


class RetryLog:
    """The lines of one run: ten, then one a minute, then ever fewer, to one an hour; at the end, those not yet told.

        ten lines  | 1 min | 2 min |  4 min  | ... | 1 h | ... | the end
                   each: how many since the last, and the last of them

    Parameters
    ----------
    clock : tells the time in seconds
    """

    def __init__(self, *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._n_lines = self._n_untold = 0
        self._last, self._pause_s, self._told_s = "", FIRST_PAUSE_S, 0.0

    def warn(self, line: str) -> None:
        """Log the line, or count it."""
        if self._n_lines < FIRST_LINES:
            self._n_lines += 1
            self._told_s = self._clock()
            log.warning("%s", line)
            return
        self._n_untold, self._last = self._n_untold + 1, line
        if self._clock() - self._told_s >= self._pause_s:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self.close()

    def close(self) -> None:
        """Tell of what was not told yet; lines may still come."""
        if self._n_untold:
            log.warning("more attempts that came to nothing since: %d, the last: %s", self._n_untold, self._last)
        self._n_untold, self._told_s = 0, self._clock()
