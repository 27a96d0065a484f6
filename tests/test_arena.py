"""Leases of one fixed region: exact, never overlapping, returned when the last view dies and not before.

arena  |-- a --|-- free --|-- c --|-- free --|      first fit; neighbours that are free are one range
"""

import gc
import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload_rt.errors import BudgetExceeded, StorageTimeout
from offload_rt.memory import arena as arena_module
from offload_rt.memory.arena import Arena, Slot
from tests.waiting import Waiting

PAGE = 4096


def test_a_lease_returns_when_its_slot_dies():
    arena = Arena("a", 2 * PAGE)
    slot = arena.acquire(PAGE, "x")
    assert arena.held_bytes() == PAGE
    del slot
    assert arena.held_bytes() == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda slot: slot.buffer(),
        lambda slot: slot.buffer()[5:9],
        lambda slot: slot.tensor(torch.float32, (4, 4)),
        lambda slot: slot.tensor(torch.float32, (4, 4)).t()[1:, 2],
        lambda slot: slot.tensor(torch.uint8, (64,), 8).view(torch.int64),
        lambda slot: slot.tensor(torch.float32, (4,)).numpy(),
        lambda slot: slot.part(64, 64),
        lambda slot: slot.part(64, 64).buffer(),
        lambda slot: torch.nn.Parameter(slot.tensor(torch.float32, (4,)), requires_grad=False),
    ],
)
def test_a_lease_lives_as_long_as_anything_that_sees_it(view):
    arena = Arena("a", PAGE)
    slot = arena.acquire(PAGE, "x")
    kept = view(slot)
    del slot
    gc.collect()
    assert arena.held_bytes() == PAGE
    assert arena.try_acquire(PAGE, "y") is None
    del kept
    assert arena.held_bytes() == 0


def test_a_parameter_that_looks_elsewhere_gives_the_lease_back():
    arena = Arena("a", PAGE)
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    parameter.data = arena.acquire(PAGE, "x").tensor(torch.float32, (4,))
    assert arena.held_bytes() == PAGE
    parameter.data = torch.zeros(4)
    assert arena.held_bytes() == 0


def test_what_autograd_saved_holds_the_lease():
    arena = Arena("a", PAGE)
    weight = arena.acquire(PAGE, "x").tensor(torch.float32, (4,)).fill_(2.0)
    x = torch.ones(4, requires_grad=True)
    out = (x * weight).sum()
    del weight
    assert arena.held_bytes() == PAGE
    out.backward()
    assert arena.held_bytes() == 0
    assert x.grad.tolist() == [2.0] * 4


def test_the_arena_may_die_before_its_leases():
    tensor = Arena("a", PAGE).acquire(PAGE, "x").tensor(torch.float32, (1024,))
    gc.collect()
    tensor.fill_(1.0)
    assert tensor.sum() == 1024


def test_slots_see_the_same_bytes_as_their_parts_buffers_and_tensors():
    slot = Arena("a", 2 * PAGE).acquire(PAGE, "x")
    slot.tensor(torch.uint8, (PAGE,)).copy_(torch.arange(PAGE) % 251)
    assert bytes(slot.part(100, 50).buffer()) == bytes(i % 251 for i in range(100, 150))
    assert slot.part(100, 50).tensor(torch.uint8, (10,), 5).tolist() == [i % 251 for i in range(105, 115)]
    assert (slot.part(100, 50).range.begin, slot.part(100, 50).range.end) == (100, 150)


def test_a_slot_is_page_aligned_for_direct_io():
    arena = Arena("a", 4 * PAGE)
    for _ in range(3):
        slot = arena.acquire(1, "x")
        assert slot.tensor(torch.uint8, (1,)).data_ptr() % PAGE == 0
        assert slot.num_bytes == 1


@pytest.mark.parametrize("num_bytes, pages", [(0, 1), (1, 1), (4095, 1), (4096, 1), (4097, 2)])
def test_a_lease_takes_whole_pages(num_bytes, pages):
    arena = Arena("a", 8 * PAGE)
    slot = arena.acquire(num_bytes, "x")
    assert (arena.held_bytes(), slot.num_bytes) == (pages * PAGE, num_bytes)


@pytest.mark.parametrize("arguments", [(-1, 4), (0, 4097), (4096, 1), (0, -1)])
def test_a_part_outside_its_slot_is_refused(arguments):
    slot = Arena("a", PAGE).acquire(PAGE, "x")
    with pytest.raises(ValueError, match="slot: range"):
        slot.part(*arguments)


@pytest.mark.parametrize("shape, offset", [((1025,), 0), ((1024,), 4), ((1,), 4093), ((1,), -4)])
def test_a_tensor_outside_its_slot_is_refused(shape, offset):
    slot = Arena("a", 3 * PAGE).acquire(3 * PAGE, "x").part(PAGE, PAGE)
    with pytest.raises(ValueError):
        slot.tensor(torch.float32, shape, offset)


def test_an_empty_tensor_holds_nothing():
    arena = Arena("a", PAGE)
    empty = arena.acquire(PAGE, "x").tensor(torch.float32, (0, 3))
    assert empty.shape == (0, 3) and arena.held_bytes() == 0


def test_neighbours_that_come_back_are_one_range_again():
    arena = Arena("a", 4 * PAGE)
    slots = [arena.acquire(PAGE, str(i)) for i in range(4)]
    for index in (1, 3, 2):  # the middle one comes last
        slots[index] = None
    whole = arena.acquire(3 * PAGE, "large")
    assert whole.range.begin == PAGE


def test_the_first_gap_that_fits_is_taken():
    arena = Arena("a", 6 * PAGE)
    slots = [arena.acquire(size * PAGE, "x") for size in (1, 1, 2, 1, 1)]
    slots[0] = slots[2] = None
    assert arena.acquire(2 * PAGE, "y").range.begin == 2 * PAGE
    assert arena.acquire(PAGE, "y").range.begin == 0


def test_an_exhausted_arena_names_who_holds_it():
    arena = Arena("ring of layers", 3 * PAGE)
    held = [arena.acquire(PAGE, "layers.3"), arena.acquire(PAGE, "layers.4")]
    with pytest.raises(BudgetExceeded) as raised:
        arena.acquire(2 * PAGE, "layers.5")
    for evidence in ("ring of layers", "layers.5 needs 8 KiB of 12 KiB", "layers.3 4 KiB", "layers.4 4 KiB"):
        assert evidence in str(raised.value)
    assert isinstance(raised.value, MemoryError)
    del held
    arena.acquire(3 * PAGE, "layers.5")


@pytest.mark.parametrize("ask", [Arena.acquire, Arena.acquire_or_none])
def test_room_that_is_lent_is_waited_for(ask, monkeypatch):
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", 0.0)
    arena = Arena("a", 2 * PAGE)
    slots = [arena.acquire(PAGE, "x"), arena.acquire(PAGE, "y")]
    gave_back = [slot.lend("copy out") for slot in slots]
    waiting = Waiting(lambda: ask(arena, 2 * PAGE, "z"))
    for give_back in reversed(gave_back):
        assert waiting.still()
        slots.pop()
        give_back()
    assert waiting.result().num_bytes == 2 * PAGE


def test_what_is_lent_and_not_given_up_is_no_room(monkeypatch):
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", 0.0)
    arena = Arena("a", PAGE)
    kept = arena.acquire(PAGE, "x")
    give_back = kept.part(0, 8).lend("copy out")
    waiting = Waiting(lambda: arena.acquire_or_none(PAGE, "y"))
    assert waiting.still()
    give_back()
    assert waiting.result() is None
    with pytest.raises(BudgetExceeded, match=r"held by: x 4 KiB$"):
        arena.acquire(PAGE, "y")
    del kept


@pytest.mark.parametrize("ask", [Arena.acquire, Arena.acquire_or_none])
def test_what_is_lent_and_never_comes_back_is_a_timeout_that_names_the_copies(ask, monkeypatch):
    monkeypatch.setattr(arena_module, "WAIT_SECONDS", 0.01)
    arena = Arena("a", PAGE)
    slot = arena.acquire(PAGE, "x")
    for name in ("copy out", "copy in", "copy out"):
        slot.lend(name)
    with pytest.raises(StorageTimeout, match=r"y needs 4 KiB of 4 KiB; held by: x 4 KiB \(lent to copy in, copy out\)"):
        ask(arena, PAGE, "y")


def test_more_than_there_ever_is_is_not_waited_for():
    arena = Arena("a", PAGE)
    slot = arena.acquire(PAGE, "x")
    slot.lend("copy out")
    assert arena.acquire_or_none(2 * PAGE, "y") is None
    with pytest.raises(BudgetExceeded, match="y needs 8 KiB of 4 KiB"):
        arena.acquire(2 * PAGE, "y")


def test_room_is_waited_for_while_a_late_thread_holds_it(monkeypatch):
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", 60.0)
    arena = Arena("a", PAGE)
    held = [arena.acquire(PAGE, "x")]
    late = threading.Timer(0.2, held.clear)
    late.start()
    assert arena.acquire(PAGE, "y").num_bytes == PAGE and not held
    late.join()


@pytest.mark.parametrize("grace_seconds", [0.0, 60.0])
def test_what_only_a_reference_cycle_holds_is_room(grace_seconds, monkeypatch):
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", grace_seconds)
    arena = Arena("a", PAGE)
    gc.disable()
    try:
        cycle = [arena.acquire(PAGE, "x")]
        cycle.append(cycle)
        del cycle
        assert arena.try_acquire(PAGE, "y") is None
        assert arena.acquire(PAGE, "y").num_bytes == PAGE
    finally:
        gc.enable()


def test_the_budget_met_to_the_byte_is_enough_and_one_page_more_is_not():
    arena = Arena("a", 3 * PAGE)
    whole = arena.acquire(3 * PAGE, "x")
    assert whole.num_bytes == 3 * PAGE
    assert arena.try_acquire(1, "y") is None
    del whole
    assert arena.try_acquire(3 * PAGE + 1, "y") is None


def test_an_empty_arena_gives_nothing():
    assert Arena("a", 0).try_acquire(1, "x") is None


def test_poison_fills_memory_before_a_lease_and_after_it():
    arena = Arena("a", PAGE, poison=True)
    tensor = arena.acquire(PAGE, "x").tensor(torch.float32, (1024,))
    assert tensor.isnan().all()
    tensor.fill_(1.0)
    del tensor
    again = arena.acquire(PAGE, "x").tensor(torch.bfloat16, (2048,))
    assert again.isnan().all()


def test_without_poison_memory_is_left_as_it_is():
    arena = Arena("a", PAGE)
    arena.acquire(PAGE, "x").tensor(torch.float32, (1024,)).fill_(3.0)
    assert (arena.acquire(PAGE, "x").tensor(torch.float32, (1024,)) == 3.0).all()


def test_peak_and_lease_counts_are_kept():
    arena = Arena("a", 4 * PAGE)
    first, second = arena.acquire(PAGE, "x"), arena.acquire(2 * PAGE, "y")
    del first, second
    arena.acquire(PAGE, "z")
    assert (arena.peak_bytes, arena.num_leases) == (3 * PAGE, 3)


class Leases(RuleBasedStateMachine):
    """Leases come and go in any order, held by slots, tensors or buffers; each is filled with its own number."""

    def __init__(self):
        super().__init__()
        self.arena = Arena("a", 16 * PAGE, poison=True)
        self.live = []
        self.number = 0

    @rule(num_bytes=st.integers(0, 6 * PAGE), keep=st.sampled_from(["slot", "tensor", "buffer"]))
    def lease(self, num_bytes, keep):
        slot = self.arena.try_acquire(num_bytes, "x")
        if slot is None:
            pages = max(1, -(-num_bytes // PAGE))
            gaps = [True] * 16
            for _, where, _ in self.live:
                for page in range(where.begin // PAGE, max(where.begin // PAGE + 1, -(-where.end // PAGE))):
                    gaps[page] = False
            longest = max(len(run) for run in "".join("x" if gap else " " for gap in gaps).split(" "))
            assert longest < pages, "there was room"
            return
        assert slot.num_bytes == num_bytes
        self.number = (self.number + 1) % 250
        slot.tensor(torch.uint8, (num_bytes,)).fill_(self.number)
        where = slot.range
        kept = {"slot": slot, "tensor": slot.tensor(torch.uint8, (num_bytes,)), "buffer": slot.buffer()}[keep]
        if num_bytes == 0:
            kept = slot  # an empty tensor holds no lease
        self.live.append((kept, where, self.number))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data):
        del self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @invariant()
    def no_two_live_leases_overlap_and_none_was_overwritten(self):
        ranges = sorted((where.begin, where.end) for _, where, _ in self.live)
        assert all(end <= begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))
        for kept, _, number in self.live:
            if isinstance(kept, torch.Tensor):
                kept = kept.numpy()
            content = bytes(kept.buffer() if isinstance(kept, Slot) else kept)
            assert content == bytes([number]) * len(content)
        pages = sum(max(1, -(-(where.end - where.begin) // PAGE)) for _, where, _ in self.live)
        assert self.arena.held_bytes() == pages * PAGE


Leases.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestLeases = Leases.TestCase
