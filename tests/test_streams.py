"""Copies to and from a device whose work is asynchronous: [Note: streams], on a device made of threads.

    host       fetch 3 | give layer 1 | fetch 4 | give layer 2 | ...
    drive      read 3 -> stage a     read 4 -> stage b
    to_device            [wait e1] copy 3          [wait e2] copy 4
    compute    layer 1 --e1           layer 2 --e2    [wait copy 3] layer 3

Two judges: kernels look at the bytes when they run, which is late; the happens-before checker at what was asked for.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.errors import OffloadError, StorageError, StorageTimeout
from offload_rt.layers.executor import RingExecutor
from offload_rt.memory.arena import Arena
from offload_rt.tiering.tiers import HostResidence, NvmeResidence, Tiers
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST, Recorder
from offload_rt.transfers.streams import COMPUTE
from offload_rt.transfers.transfer import Transfer
from planners.plans.placement import Tier
from planners.plans.plan import Ring
from planners.plans.schedule import Phase, walk
from tests.fake_device import FakeDevice
from tests.waiting import Waiting

PAGE = 4096
LATE = 0.003


class FakeStore:
    """A drive: fills a slot after a while, on a thread of its own."""

    def __init__(self, links: Links, late_seconds: float = LATE) -> None:
        self.links, self.late_seconds = links, late_seconds
        self.verified: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.works = threading.Event()
        self.works.set()
        self.corrupt: set[str] = set()

    def read(self, block: str, slot) -> Transfer:
        done, buffer = threading.Event(), slot.buffer()
        ends = [buffer]

        def fill() -> None:
            time.sleep(self.late_seconds)
            self.works.wait()
            into = ends.pop()
            into[:] = bytes([int(block[1:]) + 1]) * len(into)
            del into
            done.set()

        threading.Thread(target=fill, daemon=True).start()

        def wait(seconds: float) -> None:
            if not done.wait(seconds):
                raise StorageTimeout("the fake drive was not done")
            if block in self.errors:
                raise self.errors[block]

        return self.links._recorded(Transfer(f"read {block}", slot.num_bytes, wait, (slot, buffer)), writes=slot)

    def verify(self, block: str, slot) -> None:
        assert not slot.on_device, "a checksum is taken of bytes that the host can read"
        assert bytes(slot.buffer()) == bytes([int(block[1:]) + 1]) * slot.num_bytes
        if block in self.corrupt:
            raise OffloadError(f"{block} is corrupt")
        self.verified.append(block)


class Bench:
    """A ring of blocks, each full of its number + 1, that streams through a device whose kernels run late."""

    def __init__(self, rest: Tier, num_blocks=6, num_slots=2, *, late_seconds=LATE, slot_bytes=PAGE, seed=0, ring=0):
        """`ring`: bytes of a locked ring, all else of HOST being pageable."""
        self.device = FakeDevice(late_seconds=late_seconds, seed=seed)
        self.device.pass_through(Arena("locked ring", ring).acquire(ring, "locked ring") if ring else None)
        self.recorder = Recorder(compute=COMPUTE)
        self.links = Links(recorder=self.recorder, device=self.device)
        tiers = Tiers(None, None, None, unified=False, poison=True, device=self.device)
        self.arena = tiers.arena(Tier.DEVICE, "ring", num_slots * slot_bytes)
        names = tuple(f"b{i}" for i in range(num_blocks))
        self.store = FakeStore(self.links, late_seconds)
        if rest is Tier.HOST:
            home = tiers.arena(Tier.HOST, "weights", num_blocks * slot_bytes)
            self.residences = []
            for i, name in enumerate(names):
                slot = home.acquire(slot_bytes, name)
                slot.tensor(torch.uint8, (slot_bytes,)).fill_(i + 1)
                self.residences.append(HostResidence(slot, self.links))
        else:
            self.staging = tiers.arena(Tier.HOST, "staging", num_slots * slot_bytes)
            self.residences = [NvmeResidence(self.store, n, slot_bytes, self.links, self.staging) for n in names]
        ring = Ring(name="layers", blocks=names, num_slots=num_slots, slot_bytes=slot_bytes, rest=rest)
        self.executor = RingExecutor(ring, self.residences, self.arena, recorder=self.recorder)
        self.seen: list[tuple[int, set[int]]] = []

    def visit(self, index: int, phase: Phase, training=True) -> None:
        """Gives a kernel that reads the block by its address, as a GPU's does, and lets go of the slot at once."""
        slot = self.executor.acquire(index, phase, training=training)
        address, num_bytes = slot.tensor(torch.uint8, (1,)).data_ptr(), slot.num_bytes
        del slot
        self.device.compute.give(lambda: self.seen.append((index, set(ctypes.string_at(address, num_bytes)))))
        self.executor.release(index)

    def run(self, visits) -> None:
        for one in visits:
            self.visit(one.block, one.phase)

    def close(self) -> None:
        self.device.compute.record().wait()
        self.executor.drain()
        self.links.close()
        self.device.close()

    def check(self, visits) -> None:
        """Every kernel saw its block whole, and nothing was left to luck."""
        assert self.seen == [(one.block, {one.block + 1}) for one in visits]
        assert self.recorder.check() == []
        assert len(self.recorder.operations) > 2 * len(self.seen)


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 6])
def test_late_kernels_see_their_blocks_and_every_use_is_ordered(rest: Tier, num_slots: int) -> None:
    visits = [*walk(6, training=True), *walk(6, training=True)]
    bench = Bench(rest, 6, num_slots, seed=num_slots)
    bench.run(visits)
    bench.close()
    bench.check(visits)
    assert bench.executor.counters.num_misses == 0
    assert bench.device.to_device.num_copies == bench.executor.counters.num_fetches >= 6
    assert len(bench.store.verified) == (bench.executor.counters.num_fetches if rest is Tier.NVME else 0)


def test_the_host_waits_for_nothing_while_the_device_is_behind() -> None:
    """Four steps are given out while no kernel has run; the device's memory is that of two blocks."""
    visits = [*walk(6, training=True)] * 4
    bench = Bench(Tier.HOST)
    bench.device.compute.hold()
    bench.run(visits)
    assert bench.seen == []
    bench.device.compute.resume()
    bench.close()
    bench.check(visits)


def test_a_steady_step_leases_and_copies_the_same_and_makes_no_arena() -> None:
    bench = Bench(Tier.NVME)
    counts = []
    for _ in range(4):
        bench.run(walk(6, training=True))
        counts.append((bench.arena.num_leases, bench.staging.num_leases, bench.device.to_device.num_copies))
    bench.close()
    steps = [tuple(b - a for a, b in zip(*each, strict=True)) for each in pairwise(counts)]
    assert steps == [(8, 8, 8)] * 3
    assert (bench.device.arenas, bench.device.locked) == (["ring"], ["staging"])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(Phase)), max_size=12), st.sampled_from((Tier.HOST, Tier.NVME))
)
@settings(max_examples=30, deadline=None)
def test_any_order_of_visits_is_ordered(visits, rest) -> None:
    bench = Bench(rest, 5, 2, late_seconds=0.0003)
    for block, phase in visits:
        bench.visit(block, phase)
    bench.close()
    assert bench.seen == [(block, {block + 1}) for block, _ in visits]
    assert bench.recorder.check() == []


def test_a_stage_is_not_read_into_while_a_copy_out_of_it_is_under_way(monkeypatch) -> None:
    monkeypatch.setattr("offload_rt.memory.arena._GRACE_SECONDS", 0.0)
    bench = Bench(Tier.NVME, num_slots=1, late_seconds=0.0)
    bench.device.to_device.hold()
    slot = bench.arena.acquire(PAGE, "b0")
    fetch = bench.residences[0].fetch(slot)
    fetch.wait()  # of the host: the copy was given, not done
    assert bench.staging.try_acquire(PAGE, "b1") is None
    bench.device.reports.hold()
    bench.device.to_device.resume()
    waiting = Waiting(lambda: bench.staging.acquire(PAGE, "b1"))
    assert waiting.still(), "the copy may be over, but nobody has said so"
    bench.device.reports.resume()
    stage = waiting.result()
    del waiting
    assert bench.recorder.check() == []
    bench.store.read("b1", stage).wait()
    assert bench.recorder.check() == []
    del stage
    bench.close()


def test_a_feeder_that_is_late_to_forget_a_copy_holds_no_memory() -> None:
    bench = Bench(Tier.NVME, num_slots=1, late_seconds=0.0)
    assert bench.links.device is not None
    feeder, given = bench.links.device._feeder, []
    submit = feeder.submit
    feeder.submit = lambda *call: given.append(call) or submit(*call)  # type: ignore[method-assign,func-returns-value]
    slot = bench.arena.acquire(PAGE, "b0")
    bench.residences[0].fetch(slot).wait()
    bench.staging.acquire(PAGE, "b1")
    assert len(given) == 1
    bench.close()


@pytest.mark.parametrize("when", ["read", "verified"])
def test_a_block_that_does_not_arrive_raises_where_it_is_wanted_and_can_be_asked_for_again(when: str) -> None:
    bench = Bench(Tier.NVME)
    if when == "read":
        bench.store.errors["b1"] = StorageError("gone", path="/p", errno=5)
    else:
        bench.store.corrupt.add("b1")
    bench.visit(0, Phase.FORWARD)
    with pytest.raises(OffloadError, match="gone" if when == "read" else "b1 is corrupt"):
        bench.visit(1, Phase.FORWARD)
    bench.store.errors.clear()
    bench.store.corrupt.clear()
    bench.visit(1, Phase.FORWARD)
    bench.close()
    assert bench.seen == [(0, {1}), (1, {2})]
    assert (bench.arena.held_bytes(), bench.staging.held_bytes()) == (0, 0)
    assert bench.recorder.check() == []


def test_a_device_that_hangs_is_a_timeout_that_names_the_copy() -> None:
    device = FakeDevice()
    links = Links(device=device)
    source = device.arena("d", PAGE, poison=False).acquire(PAGE, "d")
    device.to_host.hold()
    hung = links.copy(source, Arena("h2", PAGE).acquire(PAGE, "h"))
    with pytest.raises(StorageTimeout, match="copy of d to h2"):
        hung.wait(0.1)
    device.to_host.resume()
    hung.wait()
    links.close()
    device.close()


def test_a_drive_that_hangs_is_a_timeout(monkeypatch) -> None:
    monkeypatch.setattr("offload_rt.transfers.links.WAIT_SECONDS", 0.2)
    bench = Bench(Tier.NVME, late_seconds=0.0)
    bench.store.works.clear()
    with pytest.raises(StorageTimeout):
        bench.visit(0, Phase.FORWARD)
    bench.store.works.set()
    bench.close()


def test_what_comes_back_is_what_late_kernels_wrote_and_its_memory_is_held_until_then() -> None:
    device = FakeDevice(late_seconds=LATE)
    recorder = Recorder(compute=COMPUTE)
    links = Links(recorder=recorder, device=device)
    tiers = Tiers(None, None, None, unified=False, poison=True, device=device)
    on_device, host = tiers.arena(Tier.DEVICE, "gradients", PAGE), tiers.arena(Tier.HOST, "gradients in HOST", PAGE)
    for value in range(5):
        gradient, home = on_device.acquire(PAGE, "g"), host.acquire(PAGE, "h")
        address = gradient.tensor(torch.uint8, (1,)).data_ptr()
        device.compute.give(lambda address=address, value=value: ctypes.memset(address, value, PAGE))
        recorder.use("backward", writes=[gradient.range])
        device.to_host.hold()
        copy = links.copy(gradient, home)
        del gradient
        assert on_device.try_acquire(PAGE, "next") is None
        device.to_host.resume()
        links.wait(copy)
        assert set(bytes(home.buffer())) == {value}
        recorder.use("clip", reads=[home.range], lane=HOST)
        del home, copy
    assert recorder.check() == []
    assert device.to_host.num_copies == 5
    links.close()
    device.close()


def test_an_error_of_the_device_reaches_whoever_waits_for_bytes() -> None:
    device = FakeDevice()
    links = Links(device=device)
    source = device.arena("d", PAGE, poison=False).acquire(PAGE, "d")
    target = Arena("h", PAGE).acquire(PAGE, "h")

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    device.to_host.give(fail)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        links.wait(links.copy(source, target))
    links.close()
    device.close()


def test_links_that_nobody_closed_end_their_threads_behind_the_last_copy() -> None:
    device = FakeDevice()
    before = set(threading.enumerate())
    links = Links(device=device)
    source = device.arena("d", PAGE, poison=False).acquire(PAGE, "d")
    target = Arena("h", PAGE).acquire(PAGE, "h")
    device.to_host.hold()
    links.copy(source, target)
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert {thread.name for thread in threads} >= {"offload_rt-to-device", "offload_rt-to-host"}
    seen = weakref.ref(links)
    del links
    device.to_host.resume()
    for _ in range(600):  # the copy is over, and then its thread has forgotten it
        gc.collect()
        for thread in threads:
            thread.join(0.1 / len(threads))
        if not any(thread.is_alive() for thread in threads):
            break
    assert [thread.name for thread in threads if thread.is_alive()] == [] and seen() is None
    device.close()


def test_within_host_the_host_copies_and_within_the_device_nobody() -> None:
    device = FakeDevice()
    links = Links(device=device)
    host, on_device = Arena("h", 2 * PAGE), device.arena("d", 2 * PAGE, poison=False)
    source, target = host.acquire(PAGE, "a"), host.acquire(PAGE, "b")
    source.tensor(torch.uint8, (PAGE,)).fill_(7)
    links.wait(links.copy(source, target))
    assert set(bytes(target.buffer())) == {7}
    assert device.to_host.num_copies == device.to_device.num_copies == 0
    with pytest.raises(ValueError, match="both in the device's memory"):
        links.copy(on_device.acquire(PAGE, "a"), on_device.acquire(PAGE, "b"))
    links.close()
    device.close()


def test_the_checker_finds_a_kernel_that_does_not_wait_however_late_it_starts() -> None:
    """The copy is over before the kernel is given; that is luck, and said to be."""
    bench = Bench(Tier.HOST, late_seconds=0.0)
    slot = bench.arena.acquire(PAGE, "b0")
    copy = bench.links.copy(bench.residences[0]._slot, slot)
    copy.wait()
    bench.recorder.use("layer 0", reads=[slot.range])
    assert [(race.first.name, race.second.name) for race in bench.recorder.check()] == [(copy.name, "layer 0")]
    bench.links.wait(copy)
    bench.recorder.use("layer 0", reads=[slot.range])
    assert len(bench.recorder.check()) == 1
    del slot
    bench.close()
