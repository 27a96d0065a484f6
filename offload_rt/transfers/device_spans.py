"""Spans by the times that an asynchronous device notes itself, while a step is traced.

The host is ahead of the device: when it gives a copy or a layer says nothing of when that ran. So each is put between
two marks (see `device_times`), made before the first traced step, and read when the device has passed the last one,
behind the last traced step. In a traced step nobody waits for a mark. The device is waited for before the first one,
for a place that both clocks know, and behind the last.

    host       | steps 4 | wait |b| give step 5 | wait, read | give step 6
    device              ... done |b| [copy][layers.0] ...    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offload_rt.meter import COMPUTE, WAIT
from offload_rt.spans import HOST_WAIT, Resource, Spans
from offload_rt.transfers.device_streams import Device, Mark, Stream

MAX_PAIRS = 1 << 13
"""Of marks, each two events of the driver's: as many spans of the device at most."""


@dataclass(eq=False)
class _Noted:
    """What is known of a span but its times."""

    row: str
    name: str
    num_bytes: int
    begin: Mark
    end: Mark
    of: str = ""
    has_ended: bool = False


class DeviceSpans(Spans):
    """Spans of one device, and of the host beside it."""

    def __init__(self, clock: Callable[[], float], device: Device, *, num_pairs: int = MAX_PAIRS) -> None:
        """Blocks until the device is through with what it was given."""
        self._device = device
        self._pool = [(device.mark(), device.mark()) for _ in range(num_pairs)]
        self._noted: list[_Noted] = []
        self._base = device.mark()
        self._places: list[tuple[int, Mark]] = []
        self._wait_for_device()
        self._base.record(device.compute)
        device.compute.record().wait()
        super().__init__(clock)
        self._base_seconds = self._begin

    def computing(self, name: str) -> Callable[[], None]:
        return self._note(COMPUTE, self._device.compute, name)

    def updating(self) -> Callable[[], None]:
        return self.computing("update")

    @contextmanager
    def waiting(self, name: str, of: Resource = "") -> Iterator[None]:
        """The host waits inside, or `compute` is made to: what that takes is the device's to note."""
        begin, end = self.clock(), self._note(WAIT, self._device.compute, name)
        try:
            yield
        finally:
            now = self.clock()
            resource = of if isinstance(of, str) else of(begin, now)
            end(resource)
            self.add(HOST_WAIT, name, begin, now, of=resource)

    @contextmanager
    def copying(self, row: str, stream: object, name: str, num_bytes: int) -> Iterator[None]:
        end = self._note(row, stream, name, num_bytes)  # type: ignore[arg-type]
        try:
            yield
        finally:
            end()

    def step_is_over(self, number: int) -> None:
        mark = self._device.mark()
        mark.record(self._device.compute)
        self._places.append((number, mark))

    @property
    def num_steps(self) -> int:
        return len(self._places)

    def settle(self) -> None:
        self._wait_for_device()
        for number, mark in self._places:
            at = self._at(mark)
            self.steps.append((number, self._begin, at))
            self._begin = at
        for each in self._noted:
            if each.has_ended and each.end.has_passed():
                self.add(each.row, each.name, self._at(each.begin), self._at(each.end), each.num_bytes, of=each.of)
        self._places.clear()
        self._noted.clear()
        self._pool.clear()

    def _note(self, row: str, stream: Stream, name: str, num_bytes: int = 0) -> Callable[..., None]:
        """Begins a span, which ends when what is returned is called: with the resource that was waited for, if any."""
        with self._lock:
            if not self._pool:
                self.num_left_out += 1
                return lambda of="": None
            noted = _Noted(row, name, num_bytes, *self._pool.pop())
            self._noted.append(noted)
        noted.begin.record(stream)

        def end(of: str = "") -> None:
            noted.end.record(stream)
            noted.of, noted.has_ended = of, True

        return end

    def _at(self, mark: Mark) -> float:
        return self._base_seconds + mark.seconds_since(self._base)

    def _wait_for_device(self) -> None:
        device = self._device
        for stream in (device.to_device, device.compute, device.updates, device.to_host):
            stream.record().wait()
