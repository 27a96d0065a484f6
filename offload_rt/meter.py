"""In how many seconds each resource of a machine was busy, what it moved, and how long computing waited for it.

[Note: busy seconds]
A resource is busy from when something is under way on it until nothing is: what overlaps counts once, so that a second
is never counted twice and none has more than one. Computing waits for a resource when the thread that computes blocks
until something of it is over; such waits do not overlap, since one thread computes at a time. What that thread does
itself for another resource (a copy made in place, an update without a thread of its own) is both: the resource is busy,
and computing waits for it.

Resources are named as the planners' simulator names them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

COMPUTE = "compute"
HOST_TO_DEVICE = "host_to_device"
DEVICE_TO_HOST = "device_to_host"
SSD_READ = "ssd_read"
SSD_WRITE = "ssd_write"
CPU = "cpu"
"""Optimizer steps on the processor, behind the computation."""
DEVICE_UPDATE = "device_update"
"""Optimizer steps between backward and the next forward, where parameters lie."""
WAIT, UPDATES_WAIT = "wait", "updates_wait"
"""Rows beside the resources, of a trace: computing waits; the thread that steps blocks does."""
RESOURCES = (COMPUTE, HOST_TO_DEVICE, DEVICE_TO_HOST, SSD_READ, SSD_WRITE, CPU, DEVICE_UPDATE)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a meter shows: since the start or, as the difference of two readings, between them. By resource."""

    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    moved_bytes: Mapping[str, int] = field(default_factory=dict)
    stall_seconds: Mapping[str, float] = field(default_factory=dict)
    """How long computing waited for it."""

    def since(self, before: Reading) -> Reading:
        """What has come between `before` and this one."""
        return Reading(
            busy_seconds=_less(self.busy_seconds, before.busy_seconds),
            moved_bytes={name: size - before.moved_bytes.get(name, 0) for name, size in self.moved_bytes.items()},
            stall_seconds=_less(self.stall_seconds, before.stall_seconds),
        )


class Traced(Protocol):
    """Who is told what was done when, while a step is traced: `spans.Spans`."""

    def add(
        self,
        row: str,
        name: str,
        begin_seconds: float,
        end_seconds: float,
        num_bytes: int = 0,
        *,
        of: str = "",
        is_emulated: bool = False,
    ) -> None: ...


class Meter:
    """Thread-safe. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._num_under_way: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._moved: Counter[str] = Counter()
        self._stalls: dict[str, float] = {}
        self.traced: Traced | None = None
        """Who is told of `busy` and `inline`, too; None: nobody."""

    def begin(self, resource: str) -> None:
        """Something is under way on `resource` from now on. Each needs an `end`, from any thread."""
        with self._lock:
            if not self._num_under_way[resource]:
                self._since[resource] = self.clock()
            self._num_under_way[resource] += 1

    def end(self, resource: str) -> None:
        with self._lock:
            self._num_under_way[resource] -= 1
            if not self._num_under_way[resource]:
                passed = self.clock() - self._since[resource]
                self._busy[resource] = self._busy.get(resource, 0.0) + passed

    @contextmanager
    def busy(self, resource: str, name: str = "", num_bytes: int = 0) -> Iterator[None]:
        """What is done inside keeps `resource` busy: with `name`, of so many bytes, as a trace says."""
        traced = self.traced
        start = 0.0 if traced is None else self.clock()
        self.begin(resource)
        try:
            yield
        finally:
            self.end(resource)
            if traced is not None:
                traced.add(resource, name or resource, start, self.clock(), num_bytes)

    @contextmanager
    def inline(self, resource: str, name: str = "", num_bytes: int = 0) -> Iterator[None]:
        """The thread that computes does the work of `resource` itself. See [Note: busy seconds]."""
        start = self.clock()
        try:
            with self.busy(resource, name, num_bytes):
                yield
        finally:
            end = self.clock()
            self.stalled(resource, end - start)
            if self.traced is not None:
                self.traced.add(WAIT, name or resource, start, end, of=resource)

    def moved(self, resource: str, num_bytes: int) -> None:
        with self._lock:
            self._moved[resource] += num_bytes

    def stalled(self, resource: str, seconds: float) -> None:
        """Computing waited for `resource`."""
        with self._lock:
            self._stalls[resource] = self._stalls.get(resource, 0.0) + seconds

    def reading(self) -> Reading:
        """As of now, what is under way included."""
        with self._lock:
            now = self.clock()
            busy = dict(self._busy)
            for resource, count in self._num_under_way.items():
                if count:
                    busy[resource] = busy.get(resource, 0.0) + now - self._since[resource]
            return Reading(busy_seconds=busy, moved_bytes=dict(self._moved), stall_seconds=dict(self._stalls))


def _less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
