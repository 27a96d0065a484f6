"""The executor over fake residences: the right bytes in every slot, whatever order they are wanted in.

ring of 2 slots     |  0  |  1  |        residence 0..4, each filled with its own number, late at random
"""

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.errors import BudgetExceeded, StorageError
from offload_rt.layers.executor import Residency, RingExecutor
from offload_rt.memory.arena import Arena
from offload_rt.transfers.recording import Recorder
from planners.plans.plan import Ring, Tier
from planners.plans.schedule import Phase, walk

PAGE = 4096
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


class FakeFetch:
    """Fills the slot when it is waited for, so that a use without a wait meets poison."""

    def __init__(self, residence, slot):
        self.residence, self.slot = residence, slot

    def wait(self):
        if self.residence.wait_errors:
            raise self.residence.wait_errors.pop()
        if self.residence.delay:
            threading.Event().wait(random.random() * self.residence.delay)
        self.slot.tensor(torch.uint8, (PAGE,)).fill_(self.residence.number)
        self.residence.arrivals += 1


class FakeResidence:
    num_bytes = PAGE

    def __init__(self, number, delay=0.0):
        self.number, self.delay = number, delay
        self.fetches = self.arrivals = 0
        self.start_errors, self.wait_errors = [], []

    def fetch(self, slot):
        if self.start_errors:
            raise self.start_errors.pop()
        self.fetches += 1
        return FakeFetch(self, slot)


class Bench:
    def __init__(self, num_blocks=5, num_slots=2, delay=0.0, **arguments):
        self.residences = [FakeResidence(i, delay) for i in range(num_blocks)]
        self.arena = Arena("ring of layers", num_slots * PAGE, poison=True)
        ring = Ring(
            name="layers", blocks=tuple(f"b{i}" for i in range(num_blocks)), num_slots=num_slots, slot_bytes=PAGE,
            rest=Tier.HOST,
        )  # fmt: skip
        self.recorder = Recorder()
        self.executor = RingExecutor(ring, self.residences, self.arena, recorder=self.recorder, **arguments)
        self.counters = self.executor.counters

    def visit(self, index, phase=FORWARD, training=True):
        slot = self.executor.acquire(index, phase, training=training)
        assert (slot.tensor(torch.uint8, (PAGE,)) == index).all(), f"block {index} is not in its slot"
        assert self.executor.residency(index) is Residency.RESIDENT
        del slot
        self.executor.release(index)

    def run(self, visits, training=True):
        for one in visits:
            self.visit(one.block, one.phase, training)


def broken():
    return StorageError("gone", path="/p", errno=5)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 7])
def test_training_steps_move_what_the_schedule_says_and_miss_nothing(num_slots):
    bench = Bench(5, num_slots)
    for _ in range(4):
        bench.run(walk(5, training=True))
    expected = min(5, num_slots) + max(0, 5 - num_slots) + max(0, 5 - num_slots) + 3 * 2 * max(0, 5 - num_slots)
    assert bench.counters.num_fetches == bench.counters.scheduled_fetches == expected
    assert (bench.counters.num_misses, bench.counters.num_replans) == (0, 0)
    assert bench.counters.num_hits == 40
    assert bench.counters.fetched_bytes == expected * PAGE == sum(r.fetches for r in bench.residences) * PAGE


def test_a_fetch_is_under_way_before_it_is_wanted():
    bench = Bench(5, 2)
    bench.visit(0)
    bench.visit(1)
    assert bench.executor.residency(2) is Residency.FETCHING
    assert bench.residences[2].arrivals == 0


def test_layers_that_are_not_visited_in_backward_are_not_fetched_for_it():
    bench = Bench(5, 1, backward=frozenset({3, 4}))
    for _ in range(2):
        bench.run(walk(5, training=True, backward=frozenset({3, 4})))
    assert bench.counters.num_misses == 0
    assert [r.fetches for r in bench.residences] == [2, 2, 2, 4, 2]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(Phase), st.booleans()), max_size=25),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_any_order_of_visits_gives_the_right_bytes(visits, num_slots):
    bench = Bench(5, num_slots)
    for block, phase, training in visits:
        bench.visit(block, phase, training)
    assert bench.counters.num_hits + bench.counters.num_misses == len(visits)
    assert bench.recorder.check() == []
    assert len([i for i in range(5) if bench.executor.residency(i) is not Residency.ABSENT]) <= num_slots


def test_a_miss_is_counted_and_fetched_on_the_spot():
    bench = Bench(5, 1)
    bench.executor._follow = lambda visit, training: None  # no schedule at all: every visit is a demand
    bench.run(walk(5, training=False))
    assert (bench.counters.num_misses, bench.counters.num_hits) == (5, 0)


def test_a_pass_that_breaks_off_is_a_new_schedule_and_counted():
    bench = Bench(5, 2)
    bench.run(walk(5, training=True)[:3])
    bench.run(walk(5, training=True))
    assert bench.counters.num_replans == 1
    bench.run(walk(5, training=False), training=False)
    assert bench.counters.num_replans == 1
    assert bench.counters.num_fetches == bench.counters.scheduled_fetches


def test_skipped_and_repeated_layers_work():
    bench = Bench(5, 2)
    for block in (0, 0, 1, 4, 2, 2):
        bench.visit(block)
    for block in (2, 2, 4, 1, 0, 0):
        bench.visit(block, BACKWARD)


def test_after_an_evaluation_the_next_one_finds_its_first_blocks_on_their_way():
    bench = Bench(5, 2)
    bench.run(walk(5, training=False), training=False)
    misses = bench.counters.num_misses
    assert bench.executor.residency(0) is not Residency.ABSENT
    bench.run(walk(5, training=False), training=False)
    assert bench.counters.num_misses == misses


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize("kind", ["wait_errors", "start_errors"])
def test_a_fetch_that_fails_is_raised_once_and_never_becomes_wrong_bytes(block, kind, num_slots):
    """The visit that meets the error raises; whoever tries again gets the block, not what was in its slot."""
    bench = Bench(5, num_slots)
    getattr(bench.residences[block], kind).append(broken())
    raised = 0
    for visit in walk(5, training=True):
        for _ in range(3):
            try:
                bench.visit(visit.block, visit.phase)
                break
            except StorageError:
                raised += 1
        else:
            pytest.fail("the executor did not recover")
    assert raised == 1
    bench.run(walk(5, training=True))


def test_a_caller_that_keeps_the_exception_can_try_again():
    """An interactive session keeps the last exception, and with it every frame that it passed."""
    bench = Bench(3, 1)
    bench.residences[0].wait_errors.append(broken())
    kept = []
    try:
        bench.visit(0)
    except StorageError as error:
        kept.append(error)
    bench.visit(0)
    assert kept


def test_when_everything_is_in_use_a_demand_says_who_holds_the_ring(monkeypatch):
    monkeypatch.setattr("offload_rt.memory.arena._GRACE_SECONDS", 0.0)
    bench = Bench(5, 2)
    first = bench.executor.acquire(0, FORWARD, training=True)
    second = bench.executor.acquire(1, FORWARD, training=True)
    with pytest.raises(BudgetExceeded) as raised:
        bench.executor.acquire(4, FORWARD, training=True)
    assert "b4" in str(raised.value) and "b0 4 KiB" in str(raised.value) and "b1 4 KiB" in str(raised.value)
    assert (first.tensor(torch.uint8, (PAGE,)) == 0).all() and (second.tensor(torch.uint8, (PAGE,)) == 1).all()
    del first, second, raised
    bench.executor.release(0)
    bench.executor.release(1)
    bench.visit(4)
    bench.run(walk(5, training=True))


def test_a_block_in_use_is_never_evicted():
    bench = Bench(5, 3)
    slot = bench.executor.acquire(0, FORWARD, training=True)
    for block in (4, 3, 2, 1, 4, 2):
        bench.visit(block)
        assert bench.executor.residency(0) is Residency.RESIDENT
        assert (slot.tensor(torch.uint8, (PAGE,)) == 0).all()
    bench.executor.release(0)


def test_a_tensor_that_somebody_kept_is_not_overwritten():
    bench = Bench(5, 3)
    slot = bench.executor.acquire(0, FORWARD, training=True)
    kept = slot.tensor(torch.uint8, (PAGE,))
    del slot
    bench.executor.release(0)
    for _ in range(2):
        bench.run(walk(5, training=True))
    assert (kept == 0).all()
    del kept
    bench.run(walk(5, training=True))
    assert bench.arena.peak_bytes <= 3 * PAGE


def test_the_same_block_acquired_twice_is_released_twice(monkeypatch):
    monkeypatch.setattr("offload_rt.memory.arena._GRACE_SECONDS", 0.0)
    bench = Bench(3, 1)
    outer = bench.executor.acquire(0, FORWARD, training=True)
    inner = bench.executor.acquire(0, FORWARD, training=True)
    assert outer.range == inner.range
    del inner
    bench.executor.release(0)
    with pytest.raises(BudgetExceeded):
        bench.executor.acquire(1, FORWARD, training=True)
    del outer
    bench.executor.release(0)
    bench.visit(1)


def test_drain_empties_the_ring_and_it_works_again():
    bench = Bench(5, 3)
    bench.visit(0)
    bench.executor.drain()
    assert bench.arena.held_bytes() == 0
    assert all(bench.executor.residency(i) is Residency.ABSENT for i in range(5))
    bench.run(walk(5, training=True))


def test_drain_drops_errors_of_blocks_nobody_wanted():
    bench = Bench(5, 3)
    bench.visit(0)
    for residence in bench.residences[1:]:
        residence.wait_errors.append(broken())
    bench.executor.drain()
    assert bench.arena.held_bytes() == 0


def test_delays_change_nothing():
    bench = Bench(5, 2, delay=0.002)
    for _ in range(2):
        bench.run(walk(5, training=True))
    assert bench.counters.num_misses == 0
