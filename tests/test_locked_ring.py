"""Copies of pageable memory through a locked ring, on a device of threads that is late and torn.

pageable arena   |....|....|....|....|....|
locked ring           [ 0 ][ 1 ][ 2 ][ 3 ]
device memory            |....|....|....|
"""

import random
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch

from offload_rt.errors import StorageError, StorageTimeout
from offload_rt.memory.arena import Arena
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.tiering.tiers import Tiers
from offload_rt.transfers.device_times import DeviceTimes
from offload_rt.transfers.links import Links
from offload_rt.transfers.locked_ring import NUM_PIECES, LockedRing
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.streams import COMPUTE, Copier, Copy
from planners.plans.placement import Tier
from planners.plans.schedule import walk
from tests.fake_device import FakeDevice
from tests.test_streams import PAGE, Bench
from tests.waiting import Waiting

RING = 2 * NUM_PIECES * PAGE
"""Pieces of a page, both ways."""


def memory(num_bytes, fill=0):
    return torch.full((num_bytes,), fill, dtype=torch.uint8)


@pytest.fixture
def device():
    made = FakeDevice(late_seconds=0.001)
    made.pass_through(Arena("locked ring", RING).acquire(RING, "locked ring"))
    yield made
    made.close()


class Pageable:
    """HOST memory of `device` that could not be locked, and links to copy it by."""

    def __init__(self, device, num_bytes):
        self.recorder = Recorder(compute=COMPUTE)
        self.links = Links(recorder=self.recorder, device=device)
        self.tiers = Tiers(None, None, None, unified=False, poison=True, device=device)
        self.slot = self.tiers.arena(Tier.HOST, "inputs", num_bytes).acquire(num_bytes, "inputs")
        assert self.slot.region.is_pageable


@pytest.mark.parametrize("num_bytes", [0, 1, PAGE - 1, PAGE, PAGE + 1, NUM_PIECES * PAGE, 11 * PAGE + 7])
def test_bytes_go_to_the_device_and_come_back_by_pieces(num_bytes, device):
    inward, back = device.rings
    content = torch.frombuffer(bytearray(random.Random(num_bytes).randbytes(num_bytes + 5)), dtype=torch.uint8)
    ends = [(content[:num_bytes], memory(num_bytes)), (content[num_bytes:], memory(5))]
    inward.send(device.to_device, ends, device.to_device.copy).wait()
    assert [torch.equal(*pair) for pair in ends] == [True, True]
    num_copies = -(-num_bytes // PAGE) + 1
    assert (device.to_device.num_copies, inward.num_bytes) == (num_copies, num_bytes + 5)
    returned, given = memory(num_bytes), []
    back.receive(device.to_host, [(ends[0][1], returned)], device.to_host.copy, given.append)
    assert torch.equal(returned, content[:num_bytes]) and len(given) == 1
    assert (device.to_host.num_copies, back.num_bytes) == (num_copies - 1, num_bytes)


def test_a_piece_is_filled_again_when_the_device_has_read_it(device):
    source, there = memory((NUM_PIECES + 1) * PAGE, 7), memory((NUM_PIECES + 1) * PAGE)
    device.to_device.hold()
    sending = Waiting(lambda: device.rings[0].send(device.to_device, [(source, there)], device.to_device.copy))
    assert sending.still() and device.to_device.num_copies == NUM_PIECES
    device.to_device.resume()
    sending.result().wait()
    assert torch.equal(there, source)


def test_memory_of_less_than_a_page_a_piece_is_no_ring():
    with pytest.raises(ValueError, match="4 pieces of 4096 bytes"):
        LockedRing(Arena("a", PAGE).acquire(PAGE, "a"))


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
def test_late_kernels_see_their_blocks_and_every_use_is_ordered(rest):
    visits = [*walk(4, training=True), *walk(4, training=True)]
    bench = Bench(rest, 4, 2, slot_bytes=3 * PAGE, ring=RING)
    bench.run(visits)
    bench.close()
    bench.check(visits)
    num_fetches = bench.executor.counters.num_fetches
    assert bench.device.to_device.num_copies == 3 * num_fetches, "by pieces"
    assert bench.device.rings[0].num_bytes == 3 * PAGE * num_fetches


def test_whoever_asks_for_a_copy_waits_for_no_piece(device):
    num_bytes = (NUM_PIECES + 2) * PAGE
    host, made = Pageable(device, num_bytes), memory(num_bytes, 3)
    device.to_device.hold(), device.to_host.hold()
    copies = host.links.device_copies
    saved = copies.save((made, host.slot))
    loaded = copies.load(host.slot, there := memory(num_bytes), saved=saved)
    device.to_device.resume(), device.to_host.resume()
    host.links.wait(loaded)
    device.compute.record().wait()
    assert torch.equal(there, made)
    host.links.finish(saved), host.links.finish(loaded)
    host.links.close()
    assert host.recorder.check() == []


def test_a_load_waits_until_what_was_saved_is_in_pageable_memory(device):
    """The device has made its copies, and the last one's report is late: the CPU has not come to that piece."""
    host, made = Pageable(device, PAGE), memory(PAGE, 3)
    device.reports.hold()
    copies = host.links.device_copies
    saved = copies.save((made, host.slot))
    loaded = copies.load(host.slot, there := memory(PAGE), saved=saved)
    place = copies.place(saved)
    place.event.pass_by()
    assert not loaded.copy.given.done() and not saved.copy.done.done()
    device.reports.resume()
    host.links.finish(loaded)
    assert torch.equal(there, made)
    host.links.close()
    assert host.recorder.check() == []


@pytest.mark.parametrize("inward", [True, False])
def test_a_device_that_breaks_is_told_to_whoever_waits_and_the_lease_ends(device, inward):
    num_bytes = (NUM_PIECES + 2) * PAGE
    host = Pageable(device, num_bytes)
    stream = device.to_device if inward else device.to_host
    stream.error = StorageError("gone", path="device")
    copies = host.links.device_copies
    there = memory(num_bytes)
    transfer = copies.load(host.slot, there) if inward else copies.save((there, host.slot))
    with pytest.raises(StorageError, match="gone"):
        host.links.finish(transfer)
    assert host.slot._lease.lent_to == []
    stream.error = None
    host.links.close()


def test_a_device_that_hangs_is_a_timeout_for_whoever_comes_behind_a_copy(device, monkeypatch):
    """Such as kernels of updates: the pieces are not given before the device has read the first ones."""
    monkeypatch.setattr("offload_rt.transfers.device_copies.WAIT_SECONDS", 0.1)
    num_bytes = (NUM_PIECES + 1) * PAGE
    host = Pageable(device, num_bytes)
    device.to_device.hold()
    copies = host.links.device_copies
    loaded = copies.load(host.slot, memory(num_bytes))
    with pytest.raises(StorageTimeout, match="outstanding: load from inputs"):
        copies.place(loaded)
    device.to_device.resume()
    host.links.finish(loaded)
    assert copies.place(loaded).operation == loaded.operation
    host.links.close()


def test_what_is_in_host_memory_does_not_wait_for_what_comes_from_a_drive(device):
    host, read = Pageable(device, 2 * PAGE), threading.Event()
    copier = host.links.device_copies._copier
    of_drive, of_host = ([(host.slot.part(n * PAGE, PAGE).tensor(torch.uint8, (PAGE,)), memory(PAGE))] for n in (0, 1))
    of_drive[0][0].fill_(1), of_host[0][0].fill_(2)
    try:
        late = copier.start("late", of_drive, inward=True, reads=[host.slot], after=read.wait)
        there = copier.start("there", of_host, inward=True, reads=[host.slot])
        copier.wait(there, 20.0)
        assert torch.equal(*of_host[0]) and not late.given.done()
    finally:
        read.set()
    copier.wait(late, 20.0)
    assert torch.equal(*of_drive[0])
    host.links.close()


def test_a_copy_beside_a_ring_is_behind_nothing_that_its_stream_is_given_later(device):
    """Whoever waits for it would wait for a long copy of another thread's."""
    going, copy = threading.Event(), Copy("copy", [(memory(PAGE, 7), memory(PAGE))], inward=True)

    @contextmanager
    def alone():
        yield
        device.to_device.give(going.wait)

    event = copy.give(device.to_device, [], alone(), lambda *_: nullcontext())
    passed = event.passed.wait(20)
    going.set()
    assert passed


def test_copies_through_a_ring_and_beside_it_say_what_a_byte_takes(device):
    """By their first pieces, so that a long one takes no more marks than another."""
    for stream in (device.to_device, device.to_host):
        stream.bytes_per_second = 1.0
    times = DeviceTimes(device, num_layers=1)
    copier = Copier(device, timed=lambda *what: times.timed(*what[:3]))
    host = Pageable(device, 3 * PAGE)
    while times._sample is None:
        times.step_ends()
    num_marks = len(times._moving)
    for slots in ([host.slot], []):
        for inward in (True, False):
            ends = [(memory(3 * PAGE), memory(3 * PAGE))]
            which = {"reads" if inward else "writes": slots}
            copier.wait(copier.start("copy", ends, inward=inward, **which), 20.0)
    assert len(times._moving) == num_marks - 4
    for stream in (device.to_device, device.to_host):
        stream.record().wait()
    assert times.step_ends().seconds_per_byte == {HOST_TO_DEVICE: 1.0, DEVICE_TO_HOST: 1.0}
    copier.close()
    host.links.close()


def test_what_is_locked_goes_by_itself(device):
    host = Pageable(device, PAGE)
    host.slot.region.is_pageable = False
    host.links.finish(host.links.device_copies.load(host.slot, memory(PAGE)))
    assert device.rings[0].num_bytes == 0 and device.to_device.num_copies == 1
    host.links.close()
