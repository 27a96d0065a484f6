"""Emulated links: what a transfer takes there, counted by a clock that only sleeping moves.

way in    |==== a ====|== b ==|            alone: bytes / rate; while both ways are busy: (1 + share) / 2 of the rate
way out         |====== c ======|
"""

import time

import pytest
import torch

from offload_rt.memory.arena import Arena
from offload_rt.meter import Meter
from offload_rt.storage.drive_files import open_file
from offload_rt.tiering.paced_stash import PacedStash
from offload_rt.tiering.stash import HostStash
from offload_rt.transfers.links import Links
from offload_rt.transfers.throttle import IN, OUT, Pipe, Throttle
from planners.problems.hardware import named_hardware

MIB = 1 << 20


class Clock:
    def __init__(self):
        self.now = 0.0
        self.sleeps = 0

    def sleep(self, seconds):
        self.now += seconds
        self.sleeps += 1


def pipe(rate_in=100.0, rate_out=50.0, share=1.0):
    clock = Clock()
    return Pipe((rate_in, rate_out), share, clock=lambda: clock.now, sleep=clock.sleep), clock


def done(pipe_, clock, *tickets):
    """When each ticket is through."""
    times = []
    for ticket in tickets:
        pipe_.wait(ticket)
        times.append(pytest.approx(clock.now, abs=1e-3))
    return times


def test_a_transfer_takes_its_bytes_over_the_rate_of_its_way():
    ways, clock = pipe()
    assert done(ways, clock, ways.submit(IN, 200)) == [2.0]
    assert done(ways, clock, ways.submit(OUT, 200)) == [6.0]
    assert ways.busy_seconds == pytest.approx([2.0, 4.0])
    assert clock.sleeps < 10


def test_one_way_serves_one_after_the_other_and_may_be_asked_in_any_order():
    ways, clock = pipe()
    first, second = ways.submit(IN, 100), ways.submit(IN, 300)
    assert done(ways, clock, second) == [4.0]
    assert first.is_through
    assert done(ways, clock, first) == [4.0]


@pytest.mark.parametrize(("share", "both"), [(1.0, 2.0), (0.0, 4.0), (0.2, 2.0 / 0.6)])
def test_two_ways_share_what_the_profile_says(share, both):
    ways, clock = pipe(rate_in=100.0, rate_out=100.0, share=share)
    assert done(ways, clock, ways.submit(IN, 200), ways.submit(OUT, 200)) == [both, both]


def test_what_comes_later_the_other_way_slows_what_is_under_way():
    ways, clock = pipe(rate_in=100.0, rate_out=100.0, share=0.0)
    first = ways.submit(IN, 200)
    clock.now = 1.0  # half of it is through
    second = ways.submit(OUT, 50)  # both at half their rate: through at 2.0, when 50 bytes are left of the first
    assert done(ways, clock, second, first) == [2.0, 2.5]


def test_time_without_work_is_nobodys_and_nothing_takes_no_time():
    ways, clock = pipe()
    clock.now = 5.0
    assert done(ways, clock, ways.submit(IN, 0)) == [5.0]
    assert done(ways, clock, ways.submit(IN, 100)) == [6.0]
    assert ways.busy_seconds == pytest.approx([1.0, 0.0])


def test_a_profile_with_one_tier_has_no_link_and_none_without_drives():
    one_tier = Throttle(named_hardware("cpu"))
    assert one_tier.link is None and one_tier.drives is not None
    assert set(one_tier.busy_seconds()) == {"ssd_read", "ssd_write"}
    assert set(Throttle(named_hardware("rtx4090")).busy_seconds()) == {
        "host_to_device", "device_to_host", "ssd_read", "ssd_write",
    }  # fmt: skip


def slow(**changes):
    """Throttled so that a MiB takes 50 ms on each way."""
    throttle = Throttle(named_hardware("rtx4090"))
    throttle.link = Pipe((20.0 * MIB, 20.0 * MIB), 1.0)
    throttle.drives = Pipe((20.0 * MIB, 20.0 * MIB), 1.0)
    return throttle


def test_transfers_arrive_whole_and_no_sooner_than_the_emulated_machine_allows(tmp_path):
    links = Links(throttle=slow())
    arena = Arena("a", 4 * MIB)
    source, target, back = (arena.acquire(MIB, name) for name in "stb")
    source.tensor(torch.uint8, (MIB,)).copy_(torch.arange(MIB) % 251)
    file = open_file(tmp_path / "f", writable=True)
    for start in (
        lambda: links.copy(source, target, inward=True),
        lambda: links.write(file, 0, source),
        lambda: links.read(file, 0, back),
    ):
        begin = time.monotonic()
        transfer = start()
        links.wait(transfer)
        assert time.monotonic() - begin >= 0.05 - 1e-6
    for slot in (target, back):
        assert torch.equal(slot.tensor(torch.uint8, (MIB,)), source.tensor(torch.uint8, (MIB,)))
    inside = links.throttle.busy_seconds()
    links.wait(links.copy(source, target))  # between two places in HOST
    assert links.throttle.busy_seconds() == inside
    assert [inside[name] for name in ("host_to_device", "ssd_read", "ssd_write")] == pytest.approx([0.05] * 3)
    links.close()


def test_a_paced_stash_goes_out_behind_and_comes_back_one_ahead():
    ways, clock = pipe(rate_in=400.0, rate_out=400.0)
    stash = PacedStash(HostStash(Arena("stash", 16 * 4096), Links()), ways, Meter())
    tensors = [torch.full((100,), float(i)) for i in range(3)]  # 400 bytes: a second each
    stashed = [stash.put(tensor) for tensor in tensors]
    assert clock.now == 0.0  # nobody waits for the way out
    assert torch.equal(stashed[2].load(), tensors[2])
    assert clock.now == pytest.approx(4.0, abs=1e-3)  # three out, one back
    stashed[2].release()
    clock.now += 10.0  # the one before is on its way meanwhile
    at = clock.now
    assert torch.equal(stashed[1].load(), tensors[1])
    assert clock.now == at
    assert ways.busy_seconds == pytest.approx([2.0, 3.0])
    assert torch.equal(stashed[1].load(), tensors[1])  # once more: the way takes its time again
    assert clock.now >= at + 1.0


def test_a_window_bounds_what_leaves_and_reaches_as_far_back():
    ways, clock = pipe(rate_in=400.0, rate_out=400.0)
    stash = PacedStash(HostStash(Arena("stash", 16 * 4096), Links()), ways, Meter(), window_bytes=800)
    tensors = [torch.full((100,), float(i)) for i in range(5)]  # 400 bytes: a second each
    held = []
    for number, tensor in enumerate(tensors):
        held.append(stash.put(tensor))
        assert clock.now == pytest.approx(max(0, number - 1), abs=1e-3)  # two are on their way at most
    held[4].load()
    assert clock.now == pytest.approx(6.0, abs=1e-3)
    held[4].release()
    clock.now += 10.0
    at = clock.now
    for number in (3, 2):  # both have come meanwhile
        assert torch.equal(held[number].load(), tensors[number])
        held[number].release()
    assert clock.now == at
    held[1].load(), held[0].load()
    assert ways.busy_seconds == pytest.approx([5.0, 5.0])  # none took its way twice


def test_the_last_ones_come_back_over_a_link_before_the_first_is_asked_for():
    ways, clock = pipe(rate_in=400.0, rate_out=400.0)
    stash = PacedStash(HostStash(Arena("stash", 16 * 4096), Links()), ways, Meter(), window_bytes=800)
    held = [stash.put(torch.full((100,), float(i))) for i in range(4)]  # 400 bytes: a second each
    at = clock.now
    stash.start_from(stash.latest)
    assert ways.moved_bytes == [0, 1600] and clock.now == at, "it still leaves, and nobody waits for that"
    clock.now += 10.0
    stash.start_from(stash.latest)
    assert ways.moved_bytes == [800, 1600]
    clock.now += 10.0
    at = clock.now
    assert float(held[3].load()[0]) == 3.0 and clock.now == at


def test_a_full_stash_stays_full_behind_a_link():
    ways, _ = pipe()
    stash = PacedStash(HostStash(Arena("stash", 4096), Links()), ways, Meter())
    held = stash.put(torch.zeros(4))
    assert held is not None and stash.put(torch.zeros(4)) is None
