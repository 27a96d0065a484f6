"""A device whose streams are threads: late, torn and in no order that was not asked for.

Its DEVICE memory is RAM, so that tensors in it can be computed with. A copy goes in two halves with a pause between.
`hold` stops a stream where it is, so that what must not overtake it has all the time in the world to do so; or it stops
the device's reports, so that the host does not get to know what is over.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from offload_rt.memory.allocations import AllocationMeter
from offload_rt.memory.arena import POISON, Arena, Region, Slot
from offload_rt.transfers.locked_ring import LockedRing

WAIT_SECONDS = 20.0


class Reports:
    """How host threads learn that an event was passed: one time in eight up to `late_seconds` late."""

    def __init__(self, late_seconds: float, seed: int) -> None:
        self._late_seconds = late_seconds
        self._random = random.Random(seed)
        self._going = threading.Event()
        self._going.set()

    def hold(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    def arrive(self) -> None:
        self._going.wait()
        if self._late_seconds and self._random.random() < 1 / 8:
            time.sleep(self._random.uniform(0, self._late_seconds))


class FakeEvent:
    def __init__(self, reports: Reports) -> None:
        self.passed = threading.Event()
        self.at = 0.0
        """By the clock of the stream, when it passed."""
        self.error: BaseException | None = None
        self._reports = reports

    def wait(self) -> None:
        self.pass_by()
        self._reports.arrive()
        if self.error is not None:
            raise self.error

    def pass_by(self) -> None:
        """As `wait`, for a stream: the device needs no report of itself."""
        if not self.passed.wait(WAIT_SECONDS):
            raise TimeoutError("the event was never passed")
        if self.error is not None:
            raise self.error


class FakeMark:
    """Notes what the clock of a stream says: nobody's, but for what copies take by `FakeDevice.bytes_per_second`."""

    def __init__(self) -> None:
        self.passed, self.at = True, 0.0

    def record(self, stream: FakeStream | HostStream) -> None:
        self.passed = False

        def passed() -> None:
            self.at, self.passed = stream.seconds, True

        passed() if isinstance(stream, HostStream) else stream.give(passed)

    def has_passed(self) -> bool:
        return self.passed

    def seconds_since(self, other: FakeMark) -> float:
        assert self.passed and other.passed
        return self.at - other.at


class FakeStream:
    """Runs what it is given on a thread of its own, each thing up to `late_seconds` late."""

    bytes_per_second = float("inf")
    """Of copies, by its clock."""

    def __init__(self, name: str, late_seconds: float, seed: int, reports: Reports) -> None:
        self.name = name
        self._reports = reports
        self.num_copies = 0
        self.num_records = 0
        self.num_launches = 0
        self.seconds = 0.0
        """Its clock: what it was busy for, and what it waited for."""
        self.error: BaseException | None = None
        """What broke the stream: as on a GPU, nothing runs on it any more and every event after it says so."""
        self._late_seconds = late_seconds
        self._random = random.Random(seed)
        self._going = threading.Event()
        self._going.set()
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"fake-{name}", daemon=True)
        self._thread.start()

    def give(self, kernel: Callable[[], object]) -> None:
        """A kernel: runs when everything given before is over."""
        self._work.put(kernel)

    def hold(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    def record(self) -> FakeEvent:
        self.num_records += 1
        event = FakeEvent(self._reports)

        def passed() -> None:
            event.error, event.at = self.error, self.seconds
            event.passed.set()

        self._work.put(passed)
        return event

    def wait(self, event: FakeEvent) -> None:
        def wait() -> None:
            event.pass_by()
            self.seconds = max(self.seconds, event.at)

        self.give(wait)

    def copy(self, ends: Sequence[tuple[Tensor, Tensor]]) -> None:
        for source, destination in ends:
            self._copy(source, destination)

    def _copy(self, source: Tensor, destination: Tensor) -> None:
        self.num_copies += 1
        num_bytes = source.numel()
        assert num_bytes == destination.numel()
        origin, target = source.data_ptr(), destination.data_ptr()  # as a GPU: addresses, and no lease

        def move() -> None:
            half = num_bytes // 2
            ctypes.memmove(target, origin, half)
            self._pause()
            ctypes.memmove(target + half, origin + half, num_bytes - half)
            self.seconds += num_bytes / self.bytes_per_second

        self.give(move)

    def run(self, launch: Callable[[], None]) -> None:
        self.num_launches += 1
        self.give(launch)

    def close(self) -> None:
        self._going.set()
        self._work.put(None)
        self._thread.join()

    def _pause(self) -> None:
        if self._late_seconds:
            time.sleep(self._random.uniform(0, self._late_seconds))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._going.wait()
            is_event = work.__name__ == "passed"
            if self.error is not None and not is_event:
                continue
            try:
                if not is_event:
                    self._pause()
                work()
            except BaseException as error:  # noqa: BLE001 - told by every event from now on
                self.error = error


class HostStream:
    """A compute stream that is the calling thread: for models, whose kernels torch runs there."""

    name = "compute"

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self.seconds = 0.0
        """Its clock, which tests advance."""

    def record(self) -> FakeEvent:
        event = FakeEvent(self._reports)
        event.at = self.seconds
        event.passed.set()
        return event

    def wait(self, event: FakeEvent) -> None:
        event.pass_by()
        self.seconds = max(self.seconds, event.at)

    def close(self) -> None:
        pass


class FakeSlot(Slot):
    on_device = True


class FakeDeviceArena(Arena):
    """RAM that is leased as DEVICE memory is, and poisoned by the compute stream."""

    slot_type = FakeSlot

    def __init__(self, name: str, num_bytes: int, compute: FakeStream | HostStream, *, poison: bool) -> None:
        self._compute = compute
        super().__init__(name, num_bytes, poison=poison)

    def _fill(self, start: int, num_bytes: int) -> None:
        def poison(address: int = self.region.address + start, region: object = self.region) -> None:
            ctypes.memset(address, POISON, num_bytes)

        poison() if isinstance(self._compute, HostStream) else self._compute.give(poison)


class FakeDevice:
    """`kernels_are_late` gives compute a thread too; otherwise it is whoever calls. Updates are always late."""

    device = torch.device("cpu")
    """Where torch computes."""
    pageable_bytes = 0
    rings: tuple[LockedRing, LockedRing] | None = None

    def __init__(
        self,
        *,
        late_seconds: float = 0.0,
        kernels_are_late: bool = True,
        reports_late_seconds: float = 0.02,
        seed: int = 0,
    ) -> None:
        self.reports = Reports(reports_late_seconds, seed + 4)
        self.compute = (
            FakeStream("compute", late_seconds, seed, self.reports) if kernels_are_late else HostStream(self.reports)
        )
        self.to_device = FakeStream("to_device", late_seconds, seed + 1, self.reports)
        self.to_host = FakeStream("to_host", late_seconds, seed + 2, self.reports)
        self.updates = FakeStream("updates", late_seconds, seed + 3, self.reports)
        self.arenas: list[str] = []
        self.locked: list[str] = []
        self.num_meters = 0
        self.num_marks = 0
        self.kept_within: list[int] = []
        self.threads_on_compute: set[int] = set()

    def arena(self, name: str, num_bytes: int, *, poison: bool) -> Arena:
        self.arenas.append(name)
        return FakeDeviceArena(name, num_bytes, self.compute, poison=poison)

    def meter(self) -> AllocationMeter:
        """Of the calling thread, where torch's kernels run."""
        self.num_meters += 1
        return AllocationMeter()

    def keep_within(self, budget_bytes: int) -> None:
        self.kept_within.append(budget_bytes)

    def mark(self) -> FakeMark:
        self.num_marks += 1
        return FakeMark()

    def check_stream(self) -> None:
        pass

    @contextlib.contextmanager
    def on_compute(self) -> Iterator[None]:
        self.threads_on_compute.add(threading.get_ident())
        yield

    def lock(self, name: str, region: Region) -> None:
        self.locked.append(name)
        region.is_pageable = self.rings is not None

    def pass_through(self, memory: Slot | None) -> None:
        self.rings = None
        if memory is not None:
            half = memory.num_bytes // 2
            self.rings = LockedRing(memory.part(0, half)), LockedRing(memory.part(half, half))

    def close(self) -> None:
        self.reports.resume()
        for stream in (self.compute, self.to_device, self.to_host, self.updates):
            stream.close()
