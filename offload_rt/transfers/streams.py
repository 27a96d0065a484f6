"""Copies between HOST and a device whose work is asynchronous: four streams, ordered by events alone.

[Note: streams]
A device does its work in streams: what one stream was given runs in that order, what two were given runs in any. The
host only gives; it is ahead of the device by as much as memory lets it. There are four, each made once:

    compute     the stream that was current when the engine was made; all kernels of the model, all decoding
    to_device   copies HOST -> DEVICE
    to_host     copies DEVICE -> HOST
    updates     kernels that step optimizer state, if a plan has any of it stepped there

An event is a place in a stream. A stream can be told to go on only when another has passed an event; that holds up
neither the host nor the rest of the device. Four rules make every copy safe, and nothing else is needed:

1.  A copy begins when `compute` has passed the place where it stood when the copy was asked for. Memory is leased again
    only when no tensor sees it (see [Note: slot lifetime] in arena), so every kernel that used it had been given to
    `compute` by then; and what a copy carries away had been computed there. RELEASE of a block is what starts the next
    FETCH, so this place is right behind the last use of the slot.
2.  Whoever uses what arrived first makes `compute` wait for the copy's own event (`Copier.order`). The host does not
    wait: it goes on to give out the layer. It does wait for a drive, since a copy out of a HOST slot can be given
    only when the slot has been filled; a thread of its own, the feeder, does that.
3.  A copy holds both ends until the device has passed its event, whatever becomes of the transfer. Drives and the host
    know nothing of streams: a staging slot that a copy still reads must not be leased to the next read. A thread for
    each direction, the reaper, waits for one event after the other and lets go. Only the DEVICE end of what arrives
    goes earlier, by rule 2: `compute` is behind the copy then, and by rule 1 so is every later one. Without that, the
    host could not be ahead by more than the slots there are. Whoever needs the memory waits for the reaper, which may
    be late: see [Note: lent memory] in arena.
4.  HOST memory that could not be locked is copied by the CPU, piece by piece, to or from a ring that is
    (`locked_ring`). A thread for each direction does it, as far behind the device as it has to be: the feeder hands on
    what has come from a drive, and what was in HOST waits for none. The event of the copy is that of the last piece.
    Back, the bytes are in HOST only when the copy is done: what comes behind it, a load too, waits for that and for no
    event.

What is stepped by `updates` passes through slots that no kernel of `compute` sees: it need not be behind all that the
host has given to `compute`, and is not (rule 1); each copy and kernel names the places that it comes behind instead.

    host       fetch 3 | give layer 1 | fetch 4 | give layer 2 | ...
    drive      read 3 -> stage a     read 4 -> stage b
    to_device            [wait e1] copy 3          [wait e2] copy 4
    compute    layer 1 --e1           layer 2 --e2    [wait copy 3] layer 3

Never is the whole device waited for, and never a stream by the host; but copies are: for bytes that the host itself
wants (gradients), before it changes bytes that a copy may still read (weights stepped in HOST), and so that what
copies hold of the device's memory is bounded, however far the host is ahead.

The recorder sees the same: `compute` is a lane; a copy is ordered after its head, `order` joins it to the lane, and a
reaper joins it to `RETURNED`, which drives and copies that fill HOST memory are ordered after, kernels not: one that
happens to start late enough is still found to be unordered.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, repeat

from offload_rt.errors import StorageTimeout
from offload_rt.memory.arena import MemoryRange, Slot
from offload_rt.meter import DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE
from offload_rt.transfers.device_streams import Device, Ends, Event, Ring, Stream
from offload_rt.transfers.file_io import wait_future
from offload_rt.transfers.recording import HOST, RETURNED, Recorder

COMPUTE = "compute"
"""The lane of a device's compute stream."""


@dataclass(frozen=True)
class Place:
    """Where a stream stood, and what it had been given by then, as a number of the recorder's if there is one."""

    event: Event
    operation: int | None


Timed = Callable[[str, Stream, int, str], AbstractContextManager[object]]
"""Has the device note how long a resource is busy with what a stream is given inside, with how many bytes, of what."""


def _untimed(*_: object) -> AbstractContextManager[None]:
    return nullcontext()


class Copy:
    """One copy, of one or more tensors, from the call that asked for it until the device has done it. Holds its ends:
    rule 3.
    """

    def __init__(self, name: str, ends: Sequence[Ends], *, inward: bool, slots: Sequence[Slot] = ()) -> None:
        """`slots`: what of the ends is leased, in HOST first."""
        self.name = name
        self.moves = slots[0].owner if slots else name
        """What it moves: whose memory the HOST end is."""
        self.inward = inward
        self.operation: int | None = None
        """Its number in the recorder, if there is one."""
        self.given: Future[Event] = Future()
        self.done: Future[None] = Future()
        self._sources = [source for source, _ in ends]
        self._destinations = [destination for _, destination in ends]
        self._give_back = [slot.lend(name) for slot in slots]

    def give(
        self,
        stream: Stream,
        before: Sequence[Event],
        alone: AbstractContextManager[object],
        timed: Timed,
        ring: Ring | None = None,
    ) -> Event:
        """Gives the copy to `stream`, behind `before`. Through `ring` it blocks, by rule 4: back, until it is done; its
        first piece is timed. Nobody else gives `stream` anything inside of `alone`.
        """
        if not self._sources:
            raise RuntimeError(f"{self.name}: given twice")
        ends = list(zip(self._sources, self._destinations, strict=True))
        kind = HOST_TO_DEVICE if self.inward else DEVICE_TO_HOST

        def copy(ends: Sequence[Ends], timed: Timed) -> None:
            with timed(kind, stream, sum(source.numel() for source, _ in ends), self.moves):
                stream.copy(ends)

        with alone:
            for event in before:
                stream.wait(event)
            if ring is None:
                copy(ends, timed)
                return stream.record()  # before others give the stream more, which this copy need not be behind
        clocks = chain([timed], repeat(_untimed))

        def copy_piece(ends: Sequence[Ends]) -> None:
            with alone:
                copy(ends, next(clocks))

        if self.inward:
            return ring.send(stream, ends, copy_piece)
        ring.receive(stream, ends, copy_piece, self.given.set_result)
        return stream.record()

    def ordered(self) -> None:
        """`compute` is behind the copy."""
        if self.inward:
            self._destinations = []

    def finish(self, error: BaseException | None) -> None:
        """The device is done with both ends, or never began."""
        self._sources, self._destinations = [], []
        while self._give_back:
            self._give_back.pop()()
        for future in (self.given, self.done):
            if error is not None and not future.done():
                future.set_exception(error)
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True)
class _Asked:
    """A copy that was asked for, and how the device is to be given it."""

    copy: Copy
    stream: Stream
    before: Sequence[Event]
    """It comes behind these."""
    reaper: _Reaper
    ring: Ring | None
    """What pageable memory goes through; None where it is locked."""


class Copier:
    """Starts copies and orders them, by the rules of [Note: streams]. One per engine."""

    def __init__(
        self,
        device: Device,
        recorder: Recorder | None = None,
        *,
        pause: Callable[[], None] = lambda: None,
        timed: Timed = _untimed,
    ) -> None:
        """`pause` is called by the feeder before each copy: the stress mode's delay."""
        self.device = device
        self._timed = timed
        self._giving = {True: threading.Lock(), False: threading.Lock()}
        """Of each direction: a copy is given together with the marks of its time."""
        self._recorder = recorder
        self._pause = pause
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="offload_rt-feed")
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="offload_rt-send")
        self._receiver = ThreadPoolExecutor(1, thread_name_prefix="offload_rt-receive")
        """Like the sender, it has no thread until a copy comes through its ring."""
        self._under_way: dict[int, str] = {}
        self._to_device = _Reaper("offload_rt-to-device", self._returned)
        self._to_host = _Reaper("offload_rt-to-host", self._returned)

    def start(
        self,
        name: str,
        ends: Sequence[Ends],
        *,
        inward: bool,
        reads: Sequence[Slot] = (),
        writes: Sequence[Slot] = (),
        after: Callable[[], None] | None = None,
        after_operations: Sequence[int] = (),
        behind: Copy | None = None,
        places: Sequence[Place] | None = None,
    ) -> Copy:
        """Starts copying between `ends`: `inward` from HOST to DEVICE, otherwise back. Does not block.

        What is copied together has one event, one report and one wake-up of whoever waits. `reads` and `writes` are
        what of the ends is leased. `after` blocks until the HOST end may be used, and raises why it never will: the
        feeder calls it. `behind` is a copy back that filled the source: the device orders the two itself. `places` are
        what the copy begins behind in place of rule 1, where no kernel of `compute` uses its end in DEVICE.
        """
        stream, reaper = (
            (self.device.to_device, self._to_device) if inward else (self.device.to_host, self._to_host)
        )  # fmt: skip
        before = [self.device.compute.record()] if places is None else [place.event for place in places]
        is_pageable = any(slot.region.is_pageable for slot in (reads if inward else writes))
        ring = self.device.rings[not inward] if is_pageable and self.device.rings is not None else None
        waits = [] if after is None else [after]
        if behind is not None and ring is None:
            before.append(behind.given.result())
        elif behind is not None:
            waits.append(behind.done.result)
        copy = Copy(name, ends, inward=inward, slots=[*reads, *writes] if inward else [*writes, *reads])
        if self._recorder is not None:
            if behind is not None and behind.operation is not None:
                after_operations = [*after_operations, behind.operation]
            after_operations = [*after_operations, *_operations(places)]
            copy.operation = self._recorder.submit(
                name, reads=[slot.range for slot in reads], writes=[slot.range for slot in writes],
                after=after_operations, lane=COMPUTE if places is None else HOST,
                also=None if inward else RETURNED,  # the HOST memory that it fills came back, as for a drive
            )  # fmt: skip
        self._under_way[id(copy)] = name
        asked = _Asked(copy, stream, before, reaper, ring)
        if ring is None and not waits:
            try:
                self._give(asked)
            except BaseException as error:
                self._drop(copy, error)
                raise
        else:
            # Emptied when they are called: a thread that is late to forget its work must hold no memory by it.
            thread = self._receiver if not inward and ring is not None else self._feeder if waits else self._sender
            thread.submit(self._feed, waits, asked)
        return copy

    def here(self) -> Place:
        """Behind everything that `compute` was given so far."""
        operation = None
        if self._recorder is not None:
            operation = self._recorder.submit("where compute stood", lane=COMPUTE)
        return Place(self.device.compute.record(), operation)

    def run(
        self,
        name: str,
        launch: Callable[[], None],
        places: Sequence[Place],
        *,
        reads: Sequence[MemoryRange] = (),
        writes: Sequence[MemoryRange] = (),
    ) -> Place:
        """Gives `updates` the kernels that `launch` launches, behind `places`. Does not block.

        Whoever copies their results away, behind the place returned, keeps alive what they use.
        """
        operation = None
        if self._recorder is not None:
            operation = self._recorder.submit(name, reads=reads, writes=writes, after=_operations(places))
        for place in places:
            self.device.updates.wait(place.event)
        with self._timed(DEVICE_UPDATE, self.device.updates, 0, name):
            self.device.updates.run(launch)
        return Place(self.device.updates.record(), operation)

    def order(self, copy: Copy, timeout_seconds: float) -> None:
        """What `compute` is given from now on comes after `copy`. Blocks only until the copy has been given.

        Raises why it could not be, and `StorageTimeout` when that is not known in time.
        """
        self.device.compute.wait(self.place(copy, timeout_seconds).event)
        copy.ordered()
        if self._recorder is not None and copy.operation is not None:
            self._recorder.join(copy.operation, lane=COMPUTE)

    def place(self, copy: Copy, timeout_seconds: float) -> Place:
        """Behind `copy`. Blocks only until that has been given; raises as `order` does."""
        return Place(wait_future(copy.given, timeout_seconds, self.outstanding), copy.operation)

    def wait(self, copy: Copy, timeout_seconds: float) -> None:
        """Blocks until the device has done `copy`; raises as `order` does."""
        wait_future(copy.done, timeout_seconds, self.outstanding)

    def outstanding(self) -> str:
        """The copies under way, for the message of a timeout."""
        return "; ".join(list(self._under_way.values())) or "nothing"

    def close(self) -> None:
        """Waits for all copies, then ends the threads."""
        self._feeder.shutdown()
        self._sender.shutdown()
        self._receiver.shutdown()
        self._to_device.close()
        self._to_host.close()

    def _feed(self, waits: list[Callable[[], None]], asked: _Asked) -> None:
        """Gives a copy behind `waits`, which it empties; one into a ring is sent by a thread that waits for nothing."""
        copy = asked.copy
        is_sent = asked.ring is None or not copy.inward or not waits
        try:
            while waits:
                waits.pop(0)()
            if not is_sent:
                self._sender.submit(self._feed, waits, asked)
                return
            self._pause()
            self._give(asked)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the copy raises it
            if self._recorder is not None and copy.operation is not None and not isinstance(error, StorageTimeout):
                self._recorder.join(copy.operation, lane=HOST)  # what came before is over, and it never began
            self._drop(copy, error)

    def _give(self, asked: _Asked) -> None:
        copy, stream = asked.copy, asked.stream
        try:
            event = copy.give(stream, asked.before, self._giving[copy.inward], self._timed, asked.ring)
        except BaseException:
            with suppress(Exception):  # of several tensors the first ones may be under way, and are let go of now
                stream.record().wait()
            raise
        if not copy.given.done():
            copy.given.set_result(event)
        asked.reaper.watch(copy, event)

    def _drop(self, copy: Copy, error: BaseException) -> None:
        """The device was never given `copy`."""
        self._under_way.pop(id(copy), None)
        copy.finish(error.with_traceback(None))  # whoever keeps the error keeps no frames, and no lease with them

    def _returned(self, copy: Copy, error: BaseException | None) -> None:
        """The device has done `copy`: its ends may be leased again, also to a drive."""
        self._under_way.pop(id(copy), None)
        if self._recorder is not None and copy.operation is not None:
            self._recorder.join(copy.operation, lane=RETURNED)
        copy.finish(error)


def _operations(places: Sequence[Place] | None) -> list[int]:
    return [place.operation for place in places or () if place.operation is not None]


Over = Callable[[Copy, BaseException | None], None]


class _Reaper:
    """A thread that waits for the copies of one stream, in their order, and reports each as over. It ends with this,
    too, where nobody closes it.
    """

    def __init__(self, name: str, over: Over) -> None:
        self._over = over
        self._watched: queue.SimpleQueue[tuple[Over, Copy, Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_reap, args=(self._watched,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._watched.put, None).atexit = False

    def watch(self, copy: Copy, event: Event) -> None:
        """Reports `copy` when `event` has passed; events come in the order of the stream."""
        self._watched.put((self._over, copy, event))

    def close(self) -> None:
        """Blocks until everything watched is over."""
        self._watched.put(None)
        self._thread.join()


def _reap(watched: queue.SimpleQueue[tuple[Over, Copy, Event] | None]) -> None:
    while (item := watched.get()) is not None:
        over, copy, event = item
        error: BaseException | None = None
        try:
            event.wait()
        except BaseException as failure:  # noqa: BLE001 - whoever waits for the copy raises it
            error = failure
        over(copy, error)
        del item, over, copy, event, error  # a sleeping thread holds no lease, and no engine
