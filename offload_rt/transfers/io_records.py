"""When reads and writes were under way: what the native ring records itself, and what its plain twin does here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Recorded:
    """When an operation that was started while operations were recorded was under way, by a steady clock."""

    kind: str
    """"read", "write" or "fdatasync"."""
    path: str
    offset_bytes: int
    num_bytes: int
    begin_seconds: float
    """Its first request was made; before that, it stood in line behind others, as it may still do."""
    end_seconds: float | None
    """None: not yet over."""


class Records:
    """Of the plain twin, whose operations do not stand in line. Thread-safe. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._most = 0
        self._found: list[Recorded] = []
        self._num_left_out = 0
        self._lock = threading.Lock()

    def begin_anew(self, most: int) -> None:
        """See `FileIO.record`."""
        with self._lock:
            self._most, self._found, self._num_left_out = most, [], 0

    def all(self) -> tuple[list[Recorded], int]:
        """See `FileIO.records`."""
        with self._lock:
            return self._found.copy(), self._num_left_out

    def noting(self, kind: str, path: str, offset_bytes: int, num_bytes: int) -> Callable[[], None]:
        """Notes that an operation begins, if that is recorded; returns what notes that it is over."""
        with self._lock:
            if len(self._found) >= self._most:
                self._num_left_out += self._most > 0
                return lambda: None
            begun = Recorded(
                "fdatasync" if kind == "sync" else kind, path, offset_bytes, num_bytes, self._clock(), None
            )
            found, number = self._found, len(self._found)
            found.append(begun)

        def over() -> None:
            with self._lock:
                found[number] = replace(begun, end_seconds=self._clock())  # of what was forgotten, nobody looks at it

        return over
