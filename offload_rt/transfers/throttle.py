"""Links and drives as slow as a profile says: transfers between tiers of one machine's RAM that take another's time.

[Note: emulated time]
A transfer really happens, as fast as it can; then whoever waits for it sleeps until the emulated link would have been
done with it. A `Pipe` has two directions. Each serves one transfer at a time, in the order in which they were given to
it, at its rate; while both are busy, each runs at (1 + share) / 2 of it, as the simulator assumes. When a transfer is
done depends on what comes the other way meanwhile, so a waiter looks again when it wakes. Nobody spins, and the
processor is free for what computes. Gradients and new weights of layers that train are where they go at once; the one
that wants them waits for the link (`Links.pace`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, SSD_READ, SSD_WRITE
from planners.problems.hardware import Hardware

IN, OUT = 0, 1
"""Directions of a link seen from DEVICE memory, of a drive from HOST memory."""
SHORTEST_SLEEP_SECONDS = 5e-5


@dataclass
class Ticket:
    """One transfer on its way through a pipe."""

    way: int
    left_bytes: float
    told: Callable[[float, float], None] | None = None
    """Is told when it began and when it was through."""
    begin_seconds: float | None = None
    """When its turn came."""

    @property
    def is_through(self) -> bool:
        return self.left_bytes <= 0.0


class Pipe:
    """Two directions that share what there is. Thread-safe. `clock` and `sleep` are in seconds."""

    def __init__(
        self,
        bytes_per_second: tuple[float, float],
        share: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rates = bytes_per_second
        self._together = (1 + share) / 2
        self._clock, self._sleep = clock, sleep
        self._queues: tuple[deque[Ticket], deque[Ticket]] = (deque(), deque())
        self._now = clock()
        self._lock = threading.Lock()
        self._busy = [0.0, 0.0]
        self.moved_bytes = [0, 0]
        """By direction: what was given to it."""

    def submit(self, way: int, num_bytes: int, told: Callable[[float, float], None] | None = None) -> Ticket:
        """Puts a transfer behind those of its direction. Does not block. `told`: see `Ticket`; not of no bytes."""
        with self._lock:
            self._advance()
            ticket = Ticket(way, float(num_bytes), told)
            self.moved_bytes[way] += num_bytes
            if num_bytes:
                self._queues[way].append(ticket)
            return ticket

    @property
    def busy_seconds(self) -> tuple[float, float]:
        """By direction: what it worked until now, as long as that takes at its full rate. So the simulator counts."""
        with self._lock:
            self._advance()
            return self._busy[IN], self._busy[OUT]

    def is_through(self, ticket: Ticket) -> bool:
        """Whether `ticket` is through by now. Does not block."""
        with self._lock:
            self._advance()
            return ticket.is_through

    def wait(self, ticket: Ticket) -> None:
        """Sleeps until `ticket` is through."""
        while True:
            with self._lock:
                self._advance()
                if ticket.is_through:
                    return
                ahead = 0.0
                for other in self._queues[ticket.way]:
                    ahead += other.left_bytes
                    if other is ticket:
                        break
            self._sleep(max(ahead / self._rates[ticket.way], SHORTEST_SLEEP_SECONDS))  # at least so long

    def _advance(self) -> None:
        """Brings both directions to the present."""
        now = self._clock()
        while self._now < now:
            active = [way for way in (IN, OUT) if self._queues[way]]
            if not active:
                self._now = now
                return
            share = self._together if len(active) == 2 else 1.0
            ends = {way: self._queues[way][0].left_bytes / (self._rates[way] * share) for way in active}
            passed = min(now - self._now, *ends.values())
            for way in active:
                self._busy[way] += passed * share
                head = self._queues[way][0]
                if head.begin_seconds is None:
                    head.begin_seconds = self._now
                if ends[way] <= passed:
                    head.left_bytes = 0.0
                    self._queues[way].popleft()
                    if head.told is not None:
                        head.told(head.begin_seconds, self._now + passed)
                else:
                    head.left_bytes -= passed * self._rates[way] * share
            self._now += passed


class Throttle:
    """The link between HOST and DEVICE, and all drives together, of an emulated machine."""

    def __init__(
        self,
        hardware: Hardware,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        links = hardware.links
        self.link: Pipe | None = None
        """None where DEVICE and HOST are one."""
        if not hardware.unified:
            rates = (links.host_to_device_bytes_per_second, links.device_to_host_bytes_per_second)
            self.link = Pipe(rates, links.duplex, clock=clock, sleep=sleep)
        self.drives: Pipe | None = None
        """None where there are none."""
        if hardware.drives:
            rates = (hardware.read_bytes_per_second, hardware.write_bytes_per_second)
            self.drives = Pipe(rates, hardware.drive_mix, clock=clock, sleep=sleep)

    def rows(self) -> tuple[str, ...]:
        """Resources that are emulated."""
        return tuple(name for names, _ in self._pipes() for name in names)

    def busy_seconds(self) -> dict[str, float]:
        """What each direction worked since the start, by resource."""
        return {
            name: seconds
            for names, pipe in self._pipes()
            for name, seconds in zip(names, pipe.busy_seconds, strict=True)
        }

    def moved_bytes(self) -> dict[str, int]:
        """What each direction was given since the start, by resource."""
        return {name: size for names, pipe in self._pipes() for name, size in zip(names, pipe.moved_bytes, strict=True)}

    def _pipes(self) -> Iterator[tuple[tuple[str, str], Pipe]]:
        if self.link is not None:
            yield (HOST_TO_DEVICE, DEVICE_TO_HOST), self.link
        if self.drives is not None:
            yield (SSD_READ, SSD_WRITE), self.drives
