"""Taking things apart, whatever becomes of single steps: what stays open is locked as long as its process lives.

[Note: steps that a loop has not finished]
What follows a step in a loop, its schedulers first of all, belongs to the step's commit, and is not done where the loop
has failed before. Who closes does not say so; but it is closed while callers handle an exception (in `finally`, or by a
context manager) that they did not handle when the step was taken. Such a step stays uncommitted, and is taken again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from offload_rt.errors import OffloadError

logger = logging.getLogger("offload_rt")


class Unfinished:
    """Whether a loop has failed between a step and what begins the next one. Keeps no exception."""

    def __init__(self) -> None:
        self._handled: int | None = None

    def step_taken(self) -> None:
        """What belongs to it may follow."""
        self._handled = id(sys.exc_info()[1])

    def next_begins(self) -> None:
        """All of it was done."""
        self._handled = None

    def has_failed(self, step: int) -> bool:
        """Whether callers handle an exception that has come since `step` was taken; says what that means for it."""
        exception = sys.exc_info()[1]
        if self._handled is None or exception is None or id(exception) == self._handled:
            return False
        logger.warning(
            "step %d is not committed: %s was raised before the next forward began, and what follows a step may not "
            "have been done; a run that goes on does so from the commit before", step, type(exception).__name__,
        )  # fmt: skip
        return True


def all_close(*steps: Callable[[], object]) -> None:
    """Takes each of these steps, whatever becomes of those before it; the last error is raised, behind the others.

    Ctrl-C interrupts a wait, which is taken up again: it is raised when all is closed. A second one in the same wait
    has its way.
    """
    if not steps:
        return
    try:
        _insist(steps[0])
    finally:
        all_close(*steps[1:])


def _insist(step: Callable[[], object]) -> None:
    try:
        step()
    except KeyboardInterrupt as interrupt:
        try:
            step()
        except OffloadError as error:
            raise interrupt from error
        raise
