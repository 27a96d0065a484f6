"""Which arenas the process has mapped, as it changes: for whoever counts the most that there was.

[Note: every arena]
Memory that nobody has reserved is what a report is to find. So it is not left to whoever makes an arena to say so: each
arena tells every watch when its memory is mapped and when that is given back, which is when nothing sees it any more.
The latter may be told from inside any allocation, of any thread, with any lock held: it appends to a deque, and whoever
looks next does the work. Changes are kept in their order, so that peaks are those that there were, however late
somebody looks.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_watches: list[weakref.ref[Watch]] = []
_thread = threading.local()


@dataclass(frozen=True, eq=False)
class Mapping:
    """The memory of one arena."""

    name: str
    num_bytes: int
    account: object | None
    """What it is reserved from; None where nobody has reserved it."""


class Watch:
    """What is mapped, and given back, from now on until `close`."""

    def __init__(self) -> None:
        self.changes: deque[tuple[Mapping, bool]] = deque()
        """In their order: what was mapped (True), or given back. What was mapped before it began is given back too."""
        self._place = weakref.ref(self, _forget)
        _watches.append(self._place)

    def close(self) -> None:
        """Hears of nothing any more. May be called twice."""
        _forget(self._place)


def _forget(place: weakref.ref[Watch]) -> None:
    if place in _watches:
        _watches.remove(place)


@contextmanager
def reserved_from(account: object) -> Iterator[None]:
    """Arenas that this thread makes inside are reserved from `account`."""
    _thread.account = account
    try:
        yield
    finally:
        _thread.account = None


def tell(region: Any, name: str, num_bytes: int) -> Callable[[], None]:
    """`region` was mapped, and is given back when nothing sees it any more, or by who calls what this returns."""
    mapping = Mapping(name, num_bytes, getattr(_thread, "account", None))
    _change(mapping, is_mapped=True)
    gone = weakref.finalize(region, _change, mapping, is_mapped=False)
    gone.atexit = False
    return gone


def _change(mapping: Mapping, *, is_mapped: bool) -> None:
    for place in tuple(_watches):
        watch = place()
        if watch is not None:
            watch.changes.append((mapping, is_mapped))
