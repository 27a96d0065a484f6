"""Taking things apart, whatever becomes of single steps: what stays open is locked as long as its process lives."""

from __future__ import annotations

from collections.abc import Callable

from offload_rt.errors import OffloadError


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
