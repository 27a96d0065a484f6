"""How long somebody waits for what is under way, before it is called an error.

A process that is stopped (SIGSTOP, a frozen cgroup, a machine that sleeps) waits for nothing meanwhile, and nobody of
it looks at what has arrived. When it goes on, no wait may be found over that had not been: so what counts is time in
which it ran, by slices. Of a slice that took longer than it was to, whoever waits was not running.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLICE_SECONDS = 1.0
"""That much at most is waited at once."""


class Patience:
    """So many seconds of waiting, from now on. `clock` is in seconds."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._left_seconds, self._clock = seconds, clock
        self._last = clock()

    def slice_seconds(self) -> float:
        """How long to wait now, before it is asked again; 0 when there is no patience left."""
        now = self._clock()
        self._left_seconds -= min(now - self._last, SLICE_SECONDS)
        self._last = now
        return min(max(0.0, self._left_seconds), SLICE_SECONDS)
