"""Busy seconds by a clock that only the test moves, and how a wait divides into what it waited for.

read     |=====|            busy  |-----------|      overlaps count once
read        |========|
copy                 |===|  a wait from here  ^ on is first the read's, then the copy's
"""

import asyncio
import threading
import time

import pytest
import torch

from offload_rt.memory.arena import Arena
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, SSD_READ, SSD_WRITE, Meter
from offload_rt.transfers.file_io import AiofilesIO, open_file
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Leg, Transfer

PAGE = 4096


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return Meter(clock)


def test_what_overlaps_counts_once_and_idle_time_is_nobodys(meter, clock):
    for now, change in ((0, meter.begin), (2, meter.begin), (3, meter.end), (5, meter.end), (9, meter.begin)):
        clock.now = float(now)
        change(SSD_READ)
    assert meter.reading().busy_seconds == {SSD_READ: 5.0}
    clock.now = 10.0
    assert meter.reading().busy_seconds == {SSD_READ: 6.0}, "what is under way counts as far as it is"


def test_resources_are_apart_and_readings_subtract(meter, clock):
    with meter.busy(SSD_READ):
        clock.now = 1.0
        before = meter.reading()
        with meter.busy(SSD_WRITE):
            clock.now = 3.0
    meter.moved(SSD_READ, 7)
    meter.stalled(SSD_READ, 0.5)
    between = meter.reading().since(before)
    assert between.busy_seconds == {SSD_READ: 2.0, SSD_WRITE: 2.0}
    assert between.moved_bytes == {SSD_READ: 7} and between.stall_seconds == {SSD_READ: 0.5}


def test_what_computing_does_itself_is_work_and_a_wait(meter, clock):
    with pytest.raises(KeyError), meter.inline(DEVICE_TO_HOST):
        clock.now = 2.0
        raise KeyError
    assert meter.reading().busy_seconds == meter.reading().stall_seconds == {DEVICE_TO_HOST: 2.0}


@pytest.mark.parametrize(
    ("arrived_at", "expected"),
    [
        (4.0, [(SSD_READ, 1.0), (HOST_TO_DEVICE, 2.0)]),
        (2.0, [(SSD_READ, 0.0), (HOST_TO_DEVICE, 3.0)]),  # before anybody waited
        (9.0, [(SSD_READ, 3.0), (HOST_TO_DEVICE, 0.0)]),
    ],
)
def test_a_wait_divides_into_the_legs_that_it_waited_for(arrived_at, expected):
    transfer = Transfer("copy", 1, lambda seconds: None, ())
    transfer.legs = (Leg(SSD_READ, arrived_at), Leg(HOST_TO_DEVICE, 6.0))
    assert list(transfer.stalls(3.0, 6.0)) == expected


class LateIO:
    """Reads that are over when the test says so, on a clock that shows that."""

    name, direct, refusal = "late", True, ""

    def __init__(self, clock):
        self.clock = clock

    def start(self, kind, file, offset_bytes, buffer):
        def wait(timeout_seconds):
            self.clock.now += {"read": 2.0, "write": 3.0, "sync": 5.0}[kind]

        return wait

    def adopt(self, region):
        pass

    def busy_seconds(self):
        return 1.5, 2.5

    def close(self):
        pass


def test_links_say_which_resource_a_wait_was_for(meter, clock, tmp_path):
    links = Links(io=LateIO(clock), meter=meter)
    file = open_file(tmp_path / "f", writable=True)
    slots = Arena("a", 4 * PAGE)
    slot, target = slots.acquire(PAGE, "s"), slots.acquire(PAGE, "t")
    links.wait(links.join("both", [links.read(file, 0, slot), links.read(file, 0, target)]))
    assert meter.reading().stall_seconds == {SSD_READ: 4.0}
    links.wait(links.write(file, 0, slot))
    links.wait(links.sync(file))
    copy = links.copy(slot, target, after=links.read(file, 0, slot), inward=True)
    links.wait(copy)
    assert [leg.resource for leg in copy.legs] == [SSD_READ, HOST_TO_DEVICE]
    assert all(leg.arrived_at is not None for leg in copy.legs)
    reading = links.reading()
    assert reading.stall_seconds[SSD_WRITE] == 8.0
    assert links.counters.stall_seconds == sum(reading.stall_seconds.values())
    assert reading.moved_bytes == {SSD_READ: 3 * PAGE, SSD_WRITE: PAGE, HOST_TO_DEVICE: PAGE}
    assert (reading.busy_seconds[SSD_READ], reading.busy_seconds[SSD_WRITE]) == (1.5, 2.5), "the drives' own"
    links.wait(links.copy(slot, target))  # within HOST
    assert links.reading().moved_bytes == reading.moved_bytes
    links.close()


def test_the_plain_twin_of_the_ring_counts_what_overlaps_once(tmp_path, monkeypatch):
    io = AiofilesIO()
    go = threading.Event()

    async def held(kind, file, offset_bytes, buffer):
        await asyncio.to_thread(go.wait)

    monkeypatch.setattr(io, "_run", held)
    file = open_file(tmp_path / "f", writable=True)
    begin = time.perf_counter()
    waits = [io.start("read", file, 0, memoryview(bytearray(8))) for _ in range(2)]
    time.sleep(0.01)
    assert io.busy_seconds()[0] >= 0.01
    go.set()
    for wait in waits:
        wait(60.0)
    io.close()
    reading, writing = io.busy_seconds()
    assert 0.01 <= reading <= time.perf_counter() - begin and writing == 0.0
    assert io.busy_seconds() == (reading, writing), "nothing is under way any more"


@pytest.mark.parametrize("backend", ["auto", "aiofiles"])
def test_drives_are_busy_while_they_work(backend, tmp_path):
    from offload_rt.transfers.file_io import file_io

    links = Links(io=file_io(backend))
    file = open_file(tmp_path / "f", writable=True)
    slot = Arena("a", 64 * PAGE).acquire(64 * PAGE, "s")
    slot.tensor(torch.uint8, (64 * PAGE,)).fill_(1)
    links.wait(links.write(file, 0, slot))
    written = links.reading().busy_seconds
    assert written[SSD_WRITE] > 0 == written[SSD_READ]
    links.wait(links.read(file, 0, slot))
    assert links.reading().busy_seconds[SSD_READ] > 0
    links.close()
