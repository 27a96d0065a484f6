"""Starts and waits for the only asynchronous copies there are: drive to memory, memory to drive, memory to memory.

Start and wait are two calls; the `Transfer` between them owns both ends. Reads and writes go through `file_io`. Copies
between HOST and DEVICE are the device's own, see `device_copies`; where both are RAM, a thread of their own runs them.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from offload_rt.errors import OffloadError, StorageTimeout
from offload_rt.memory.arena import WAIT_SECONDS, Slot
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, SSD_READ, SSD_WRITE, Meter, Reading
from offload_rt.spans import Resource, Spans
from offload_rt.transfers.device_copies import DeviceCopies
from offload_rt.transfers.device_streams import Device, Stream
from offload_rt.transfers.device_times import DeviceTimes
from offload_rt.transfers.file_io import FileIO, OpenFile, file_io, wait_future
from offload_rt.transfers.recording import RETURNED, Recorder
from offload_rt.transfers.streams import Copier, Place
from offload_rt.transfers.throttle import IN, OUT, Throttle
from offload_rt.transfers.transfer import Leg, Transfer, TransferCounters


class Links:
    """All connections between the tiers. One per engine; `close` waits for what is under way.

    `device` is what DEVICE memory belongs to, where its work is asynchronous; None where DEVICE is RAM.
    `delay_seconds` (the stress mode) starts every operation late by a random time up to that, so that a use that does
    not wait for its arrival meets poisoned memory. `throttle` makes transfers take the time of another machine's.
    """

    def __init__(
        self,
        *,
        io: FileIO | None = None,
        recorder: Recorder | None = None,
        device: Device | None = None,
        delay_seconds: float = 0.0,
        seed: int = 0,
        throttle: Throttle | None = None,
        meter: Meter | None = None,
        counters: TransferCounters | None = None,
        times: DeviceTimes | None = None,
    ) -> None:
        """`meter` and `counters`: those to count on with. `times`: of `device`, where its copies are to be timed."""
        self.throttle = throttle
        self.meter = Meter() if meter is None else meter
        self._paced = None if throttle is None else ThreadPoolExecutor(1, thread_name_prefix="offload_rt-link")
        self.io = io if io is not None else file_io()
        self.counters = TransferCounters() if counters is None else counters
        self.recorder = recorder
        self._delay_seconds = delay_seconds
        self._random = random.Random(seed)
        self.times = times
        self.spans: Spans | None = None
        """Who is told what was under way when, while a step is traced. A thread looks once: it may end at any time."""
        self.device = None
        if device is not None:
            self.device = Copier(device, recorder, pause=self._sleep, timed=self._timed)
        self._device_copies = None if self.device is None else DeviceCopies(self.device, self.meter, self.counters)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="offload_rt-copy")
        self._delayer = ThreadPoolExecutor(8, thread_name_prefix="offload_rt-delay") if delay_seconds else None
        self.is_stuck = False
        """`close` has given up on a drive: no file may be closed, nor its lock given back, any more."""

    def read(self, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        """Starts filling `slot` from `file`. Does not block."""
        self.counters.bytes_read += slot.num_bytes
        self.meter.moved(SSD_READ, slot.num_bytes)
        return self._file("read", file, offset_bytes, slot)

    def write(self, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        """Starts writing `slot` to `file`. Does not block; durable only after the store's barrier."""
        self.counters.bytes_written += slot.num_bytes
        self.meter.moved(SSD_WRITE, slot.num_bytes)
        return self._file("write", file, offset_bytes, slot)

    def sync(self, file: OpenFile) -> Transfer:
        """Starts fdatasync: when it has been waited for, every write that was waited for before it is durable."""
        wait, legs = self._arriving(SSD_WRITE, self._start("sync", file, 0, memoryview(b"")))
        transfer = Transfer(f"sync {file.path}", 0, wait, ())
        transfer.legs, transfer.moves = legs, "sync"
        return transfer

    def copy(
        self,
        source: Slot,
        destination: Slot,
        *,
        after: Transfer | None = None,
        check: Callable[[], None] | None = None,
        inward: bool = False,
        places: Sequence[Place] | None = None,
    ) -> Transfer:
        """Starts copying `source` to `destination` (equal sizes), once `after` has arrived. Does not block.

        `inward` says that it goes from HOST to DEVICE, where both are RAM: it is metered so, and an emulated link takes
        its time.
        `check` looks at the source when `after` has arrived; what it raises, the transfer raises. `places`: see
        `Copier.start`; for a device with streams. What is in HOST at both ends goes as where there is no device.
        """
        if source.num_bytes != destination.num_bytes:
            raise ValueError(f"copy: {source.num_bytes} bytes into {destination.num_bytes}")
        if self._device_copies is not None and (source.on_device or destination.on_device):
            return self._device_copies.copy(source, destination, after=after, check=check, places=places)

        self.counters.bytes_copied += source.num_bytes
        link = self.throttle.link if self.throttle is not None and inward else None
        moves = source.owner
        told = self._told(HOST_TO_DEVICE, moves, source.num_bytes) if link is not None else None
        ends = [(source.buffer(), destination.buffer(), check)]

        def run() -> None:
            try:
                if after is not None:
                    after.wait()
                self._sleep()
                origin, target, look = ends.pop()
            finally:
                ends.clear()
            try:
                if look is not None:
                    look()
                num_bytes = len(origin)
                with self.meter.busy(HOST_TO_DEVICE, moves, num_bytes) if inward else nullcontext():
                    ctypes.memmove(
                        (ctypes.c_char * num_bytes).from_buffer(target),
                        (ctypes.c_char * num_bytes).from_buffer(origin),
                        num_bytes,
                    )
            finally:
                del origin, target, look  # so that neither this thread nor an error holds a lease afterwards
            if link is not None:
                link.wait(link.submit(IN, num_bytes, told))

        # What waits for its link must not keep other copies waiting.
        future = (self._copier if link is None or self._paced is None else self._paced).submit(run)

        wait: Callable[[float], None] = partial(wait_future, future, outstanding=lambda: "a copy")
        legs: tuple[Leg, ...] = ()
        if inward:
            self.meter.moved(HOST_TO_DEVICE, source.num_bytes)
            wait, legs = self._arriving(HOST_TO_DEVICE, wait)
        transfer = Transfer("copy", source.num_bytes, wait, (source, destination))
        transfer.legs = legs if after is None else after.legs + legs
        transfer.moves = moves
        return self._recorded(transfer, reads=source, writes=destination, after=after)

    @property
    def device_copies(self) -> DeviceCopies:
        """The device's own copies, of tensors too."""
        if self._device_copies is None:
            raise RuntimeError("a device's own copies are for a device with streams; here DEVICE is RAM")
        return self._device_copies

    def join(self, name: str, transfers: Sequence[Transfer]) -> Transfer:
        """Several transfers as one, which has arrived when all have. If some fail, the first error is told when none is
        under way any more: their memory is then free. Each is waited for as long as one alone: what arrives meanwhile
        shows that nothing is stuck, and a process that is stopped in between has waited for nothing.
        """

        def wait(timeout_seconds: float) -> None:
            failure: OffloadError | None = None
            for transfer in transfers:
                try:
                    transfer.wait(timeout_seconds)
                except StorageTimeout:
                    raise
                except OffloadError as error:
                    failure = failure or error
            try:
                if failure is not None:
                    raise failure
            finally:
                del failure  # an error that its own frames hold lives on, with all of them

        joined = Transfer(name, sum(transfer.num_bytes for transfer in transfers), wait, tuple(transfers))
        joined.legs = tuple(leg for transfer in transfers for leg in transfer.legs)
        joined.moves = transfers[0].moves if transfers else name
        if self.recorder is not None:
            before = [transfer.operation for transfer in transfers if transfer.operation is not None]
            joined.operation = self.recorder.submit(name, after=before)
        return joined

    def pace(self, name: str, num_bytes: int, *, inward: bool) -> Transfer | None:
        """The way of bytes over the emulated link between HOST and DEVICE, begun now; both ends are the caller's.

        For what has no copy to be waited for where both are RAM. None where no link is emulated. Does not block.
        """
        link = None if self.throttle is None else self.throttle.link
        if link is None:
            return None
        row = HOST_TO_DEVICE if inward else DEVICE_TO_HOST
        ticket = link.submit(IN if inward else OUT, num_bytes, self._told(row, name, num_bytes))
        self.counters.num_transfers += 1
        return Transfer(name, num_bytes, lambda seconds: link.wait(ticket), ())

    def wait(self, transfer: Transfer) -> None:
        """Blocks until `transfer` has arrived, counts the stall, and orders the caller after it.

        What arrives on an asynchronous device is waited for by its compute stream, not by the caller.
        """
        start = self.meter.clock()
        copy = transfer.copy
        with self.stalled(transfer.moves, transfer.waited_for):
            if self.device is not None and copy is not None and copy.inward:
                self.device.order(copy, WAIT_SECONDS)  # and the recorder's compute lane
            else:
                self.finish(transfer)
        end = self.meter.clock()
        self.counters.stall_seconds += end - start
        for resource, seconds in transfer.stalls(start, end):
            self.meter.stalled(resource, seconds)

    def stalled(self, name: str, of: Resource) -> AbstractContextManager[None]:
        """Inside, the caller waits for `name`, on the resource `of`, which is no computing of its own: a device that is
        timed is told, and a trace.
        """
        times = nullcontext() if self.times is None else self.times.stalled()
        spans = self.spans
        return times if spans is None else _both(times, spans.waiting(name, of))

    def reading(self) -> Reading:
        """What drives and links did since the start; of an emulated machine's, what those did.

        A device's own copies are counted in bytes alone: only the device knows when they were under way (`times`).
        """
        found = self.meter.reading()
        read_seconds, write_seconds = self.io.busy_seconds()
        busy = {**found.busy_seconds, SSD_READ: read_seconds, SSD_WRITE: write_seconds}
        moved = dict(found.moved_bytes)
        if self.throttle is not None:
            busy.update(self.throttle.busy_seconds())
            moved.update(self.throttle.moved_bytes())
        return replace(found, busy_seconds=busy, moved_bytes=moved)

    def finish(self, transfer: Transfer) -> None:
        """Blocks until `transfer` is over, also where a device does it, so that the host may change what it reads."""
        transfer.wait()
        if self.recorder is not None and transfer.operation is not None:
            self.recorder.join(transfer.operation)

    def close(self) -> None:
        """Waits for what is under way, and raises what is left of errors: `StorageTimeout` where a drive hangs."""
        if self._delayer is not None:
            self._delayer.shutdown()
        self._copier.shutdown()
        if self._paced is not None:
            self._paced.shutdown()
        if self.device is not None:
            self.device.close()
        try:
            self.io.close()
        except StorageTimeout:
            self.is_stuck = True
            raise

    def _file(self, kind: str, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        self.io.adopt(slot.region)
        buffer = slot.buffer()
        resource = SSD_READ if kind == "read" else SSD_WRITE
        told = self._told(resource, slot.owner, slot.num_bytes)
        if (spans := self.spans) is not None:
            spans.note_place(file.path, offset_bytes, slot.owner)
        arrived = self._paced_wait(kind, slot.num_bytes, self._start(kind, file, offset_bytes, buffer), told)
        wait, legs = self._arriving(resource, arrived)
        transfer = Transfer(f"{kind} {file.path}", slot.num_bytes, wait, (slot, buffer))
        transfer.moves = slot.owner
        transfer.legs = legs
        if kind == "read":
            return self._recorded(transfer, writes=slot)
        return self._recorded(transfer, reads=slot)

    def _arriving(
        self, resource: str, wait: Callable[[float], None]
    ) -> tuple[Callable[[float], None], tuple[Leg, ...]]:
        """`wait`, which notes when it has returned, and where it does."""
        leg = Leg(resource)

        def noting(timeout_seconds: float) -> None:
            wait(timeout_seconds)
            leg.arrived_at = self.meter.clock()

        return noting, (leg,)

    def _told(self, row: str, name: str, num_bytes: int) -> Callable[[float, float], None] | None:
        """What an emulated link tells when it moved `name`; None where nobody wants to know."""
        spans = self.spans
        if spans is None:
            return None
        return lambda begin, end: spans.add(row, name, begin, end, num_bytes, is_emulated=True)

    def _timed(self, kind: str, stream: Stream, num_bytes: int, name: str) -> AbstractContextManager[object]:
        """What a copier has the device note: for `times`, and for a trace."""
        times = nullcontext() if self.times is None else self.times.timed(kind, stream, num_bytes)
        spans = self.spans
        return times if spans is None else _both(times, spans.copying(kind, stream, name, num_bytes))

    def _paced_wait(
        self,
        kind: str,
        num_bytes: int,
        wait: Callable[[float], None],
        told: Callable[[float, float], None] | None,
    ) -> Callable[[float], None]:
        """What waits for the transfer, and for the emulated drives, which begin with it now.

        A slow machine is no stuck one: no timeout ends the emulated wait, but one of 0, which asks and does not wait.
        """
        drives = None if self.throttle is None else self.throttle.drives
        if drives is None:
            return wait
        ticket = drives.submit(IN if kind == "read" else OUT, num_bytes, told)
        arriving = [wait]  # what can be waited for once

        def both(timeout_seconds: float) -> None:
            if arriving:
                arriving[0](timeout_seconds)
                arriving.clear()
            if not timeout_seconds and not drives.is_through(ticket):
                raise StorageTimeout(f"a {kind} of {num_bytes} bytes is under way at the emulated drives")
            drives.wait(ticket)

        return both

    def _start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        if self._delayer is None:
            return self.io.start(kind, file, offset_bytes, buffer)
        late = self._delayer.submit(self._start_late, kind, file, offset_bytes, [buffer])

        def wait(timeout_seconds: float) -> None:
            try:
                started = late.result(timeout_seconds)
            except FutureTimeout:
                raise StorageTimeout(f"{kind} {file.path}: not begun after {timeout_seconds:g} s") from None
            started(timeout_seconds)

        return wait

    def _start_late(
        self, kind: str, file: OpenFile, offset_bytes: int, buffers: list[memoryview]
    ) -> Callable[[float], None]:
        """Takes the only one of `buffers`, so that this thread holds no lease when the operation is over."""
        self._sleep()
        return self.io.start(kind, file, offset_bytes, buffers.pop())

    def _sleep(self) -> None:
        if self._delay_seconds:
            time.sleep(self._random.uniform(0, self._delay_seconds))

    def _recorded(
        self,
        transfer: Transfer,
        *,
        reads: Slot | None = None,
        writes: Slot | None = None,
        after: Transfer | None = None,
    ) -> Transfer:
        self.counters.num_transfers += 1
        if self.recorder is not None:
            before = [after.operation] if after is not None and after.operation is not None else []
            transfer.operation = self.recorder.submit(
                transfer.name,
                reads=[reads.range] if reads is not None else [],
                writes=[writes.range] if writes is not None else [],
                after=before,
                lane=RETURNED,
            )
        return transfer


@contextmanager
def _both(one: AbstractContextManager[object], other: AbstractContextManager[object]) -> Iterator[None]:
    with one, other:
        yield
