"""What was under way when: spans of time on rows, recorded while a step is traced.

    step      | 5                                                          |
    compute   | forward                      | backward            | update |
              | [layers.0][layers.1]         | [layers.1][layers.0]         |
    wait              [layers.1]                     [layers.0]
    ssd_read  [layers.1      ]  [layers.2 ]    [layers.0     ]
    ...

A row is a resource of `meter`, or one of those below. Whoever works on a resource or waits for one tells it, if there
is somebody to tell; without, that is one comparison with None. Times are those of a steady clock, which the native
core and `time.monotonic` share on Linux. What a device does asynchronously it notes itself: `transfers.device_spans`.

There are at most so many spans; what comes beyond is counted and left out, so that a trace takes a bounded memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from offload_rt.meter import COMPUTE, DEVICE_UPDATE, WAIT

STEP = "step"
"""From the end of one to the end of the next."""
HOST_WAIT = "host_wait"
"""Beside an asynchronous device, whose own waits are `WAIT`: the host's, which gives it work."""
MOST_SPANS = 1 << 15
"""They take 8 MiB, what the drives' records say of them as much at most, and the file 40 MiB while it is written."""


Resource = str | Callable[[float, float], str]
"""That was waited for: known before, or by begin and end of the wait, when it is over."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took its time."""

    row: str
    name: str
    """What it was done for: a block, as far as it is known."""
    begin_seconds: float
    end_seconds: float
    num_bytes: int = 0
    of: str = ""
    """Of a wait: the resource that was waited for."""
    is_over: bool = True
    """Otherwise it went on when the recording ended."""


class Spans:
    """Collects spans of all threads. Thread-safe."""

    def __init__(self, clock: Callable[[], float], *, most: int = MOST_SPANS, emulated: Collection[str] = ()) -> None:
        """`clock` is in seconds. Rows in `emulated` are those of links and drives of another machine."""
        self.clock = clock
        self.most = most
        self.found: list[Span] = []
        self.steps: list[tuple[int, float, float]] = []
        """Number, begin and end of each that is over."""
        self.num_left_out = 0
        self.places: dict[tuple[str, int], str] = {}
        """What lies in a file at an offset, of what was read or written."""
        self._emulated = frozenset(emulated)
        self._lock = threading.Lock()
        self._begin = clock()

    def add(
        self,
        row: str,
        name: str,
        begin_seconds: float,
        end_seconds: float,
        num_bytes: int = 0,
        *,
        of: str = "",
        is_over: bool = True,
        is_emulated: bool = False,
    ) -> None:
        """A span that has ended. On rows of another machine only its own links and drives, `is_emulated`, count."""
        if row in self._emulated and not is_emulated:
            return
        with self._lock:
            if len(self.found) < self.most:
                self.found.append(Span(row, name, begin_seconds, end_seconds, num_bytes, of, is_over))
            else:
                self.num_left_out += 1

    def note_place(self, path: str, offset_bytes: int, name: str) -> None:
        """What is read or written there is `name`."""
        with self._lock:
            if len(self.places) < self.most:
                self.places[path, offset_bytes] = name

    def computing(self, name: str) -> Callable[[], None]:
        """Begins a span of computing, which ends when what is returned is called."""
        return self._begun(COMPUTE, name)

    def updating(self) -> Callable[[], None]:
        """Begins that of the update between backward and the next forward, likewise."""
        return self._begun(DEVICE_UPDATE, "update")

    @contextmanager
    def waiting(self, name: str, of: Resource = "") -> Iterator[None]:
        """The thread that computes waits inside for `name`, on the resource `of`."""
        begin = self.clock()
        try:
            yield
        finally:
            end = self.clock()
            self.add(WAIT, name, begin, end, of=of if isinstance(of, str) else of(begin, end))

    def copying(self, row: str, stream: object, name: str, num_bytes: int) -> AbstractContextManager[None]:
        """`stream`, of an asynchronous device, is given a copy or a kernel inside."""
        return nullcontext()

    def step_is_over(self, number: int) -> None:
        """Step `number` ends here, and the next begins. Does not block."""
        now = self.clock()
        self.steps.append((number, self._begin, now))
        self._begin = now

    @property
    def num_steps(self) -> int:
        """That are over."""
        return len(self.steps)

    def settle(self) -> None:
        """Blocks until all times are known. Nothing is added any more."""

    def _begun(self, row: str, name: str) -> Callable[[], None]:
        begin = self.clock()
        return lambda: self.add(row, name, begin, self.clock())
