"""Runs a ring's schedule: fetches blocks ahead into slots, hands them out, takes them back.

The schedule is a hint, the demand is the truth. Each time a block is wanted, the executor looks whether the schedule
expected it; if so it goes on along it, otherwise (an evaluation, a skipped or repeated layer, an exception in the last
pass) it makes a new schedule from there, and a block that is not under way is fetched on the spot and counted as a
miss. Nothing is ever assumed to be present.

[Note: when a slot is free]
RELEASE drops the executor's lease; the bytes are free when the last view of them is gone (see [Note: slot lifetime] in
arena). A FETCH that finds no room therefore waits in `_pending` and is tried again at the next event. Only a demand
insists: it evicts, and then raises with the names of those who hold the arena.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from offload_rt.memory.arena import Arena, Slot
from offload_rt.tiering.tiers import Fetch, Residence
from offload_rt.transfers.recording import Recorder
from planners.plans.plan import Ring
from planners.plans.schedule import Phase, Step, StepKind, Visit, ring_schedule, walk


class Residency(str, Enum):
    """Where a block of a ring is."""

    ABSENT = "absent"
    """In no slot; it occupies nothing in DEVICE memory."""
    FETCHING = "fetching"
    """A slot is leased, its bytes are on their way."""
    RESIDENT = "resident"
    """Its bytes are in a slot."""


@dataclass
class ExecutorCounters:
    """What the executor did since the start."""

    num_fetches: int = 0
    fetched_bytes: int = 0
    num_hits: int = 0
    """Blocks that were in a slot, or on their way there, when they were wanted."""
    num_misses: int = 0
    """Blocks that had to be fetched on the spot."""
    num_replans: int = 0
    """Passes that left the schedule before its end."""
    scheduled_fetches: int = 0
    """FETCH steps of all schedules begun, less those that were cut off with their schedule."""


class RingExecutor:
    """Streams the blocks of one ring through its slots. Used by one thread at a time."""

    def __init__(
        self,
        ring: Ring,
        residences: Sequence[Residence],
        arena: Arena,
        *,
        backward: frozenset[int] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.ring = ring
        self.counters = ExecutorCounters()
        self._residences = tuple(residences)
        self.arena = arena
        self._backward = backward
        self._recorder = recorder
        self._slots: dict[int, Slot] = {}
        self._fetches: dict[int, Fetch] = {}
        self._users: Counter[int] = Counter()
        self._schedule: tuple[Step, ...] = ()
        self.num_calls = 1
        """Calls of the model that go through it together: each visit of the schedule is made by all of them."""
        self._visit: Visit | None = None
        self._num_served = 0
        self._cursor = 0
        self._pending: deque[Step] = deque()
        self._lock = threading.RLock()

    def residency(self, index: int) -> Residency:
        if index in self._fetches:
            return Residency.FETCHING
        return Residency.RESIDENT if index in self._slots else Residency.ABSENT

    def acquire(self, index: int, phase: Phase, *, training: bool) -> Slot:
        """The slot with block `index`, waiting for it if need be. Each `acquire` needs a `release`.

        `training` says whether a backward pass will follow this forward. Raises what the fetch raised, and
        `BudgetExceeded` when everything is in use.
        """
        with self._lock:
            visit = Visit(index, phase)
            if visit == self._visit and self._num_served < self.num_calls:
                self._num_served += 1
            else:
                self._visit, self._num_served = visit, 1
                self._follow(visit, training=training)
            self._pump()
            if index in self._slots:
                self.counters.num_hits += 1
            else:
                self.counters.num_misses += 1
                self._demand(index)
            self._arrive(index)
            self._users[index] += 1
            slot = self._slots[index]
            if self._recorder is not None:
                self._recorder.use(f"{phase.value} {self.ring.blocks[index]}", reads=[slot.range])
            return slot

    def foresee(self) -> None:
        """A forward pass has begun: starts fetching its first block, if there is room. Blocks as `Residence.fetch`."""
        with self._lock:
            if 0 in self._slots:
                return
            slot = self.arena.try_acquire(self.ring.slot_bytes, self.ring.blocks[0])
            if slot is not None:
                self.counters.scheduled_fetches += 1
                self._start(0, slot)

    def release(self, index: int) -> None:
        """The user of block `index` is done: the schedule goes on to the next computation. Blocks only as
        `Residence.fetch` does, and for a block on its way that the schedule drops.
        """
        with self._lock:
            self._users[index] -= 1
            if self._recorder is not None and index in self._slots:
                self._recorder.use(f"done with {self.ring.blocks[index]}", reads=[self._slots[index].range])
            if self._num_served >= self.num_calls:
                self._take_steps()
            self._pump()

    def drain(self) -> None:
        """Waits for all that is under way and empties the slots. Errors of fetches nobody wanted are dropped."""
        with self._lock:
            self._schedule, self._cursor = (), 0
            self._visit, self._num_served = None, 0
            self._pending.clear()
            for fetch in self._fetches.values():
                try:
                    fetch.wait()
                except Exception:  # noqa: BLE001 - nobody asked for this block; a demand would raise it again
                    continue
            self._fetches.clear()
            self._slots.clear()

    def _follow(self, visit: Visit, *, training: bool) -> None:
        """Moves the cursor to `visit`, or makes a new schedule that begins with it."""
        step = Step(StepKind.COMPUTE, visit.block, visit.phase)
        if self._cursor < len(self._schedule) and self._schedule[self._cursor] == step:
            self._cursor += 1
            return
        if self._cursor < len(self._schedule):
            self.counters.num_replans += 1
            self.counters.scheduled_fetches -= sum(s.kind is StepKind.FETCH for s in self._schedule[self._cursor :])
        self.counters.scheduled_fetches -= sum(s.kind is StepKind.FETCH for s in self._pending)
        self._pending.clear()
        num_blocks = len(self.ring.blocks)
        visits = walk(num_blocks, training=training, start=visit, backward=self._backward)
        if not visits or visits[0] != visit:  # a backward visit of a block that the walk does not expect there
            visits = (visit, *visits)
        # After a pass without backward comes, most likely, the next one: the next token, the next batch.
        then = () if training or visit.phase is Phase.BACKWARD else tuple(range(min(num_blocks, self.ring.num_slots)))
        present = frozenset(self._slots)
        self._schedule = ring_schedule(visits, self.ring.num_slots, present, then)
        self.counters.scheduled_fetches += sum(s.kind is StepKind.FETCH for s in self._schedule)
        self._cursor = 0
        self._take_steps()
        self._cursor += 1

    def _take_steps(self) -> None:
        """Queues what the schedule does before its next COMPUTE."""
        while self._cursor < len(self._schedule) and self._schedule[self._cursor].kind is not StepKind.COMPUTE:
            self._pending.append(self._schedule[self._cursor])
            self._cursor += 1

    def _pump(self) -> None:
        """Carries out queued steps in order, as far as there is room. See [Note: when a slot is free]."""
        while self._pending:
            step = self._pending[0]
            if step.kind is StepKind.RELEASE:
                if self._users[step.block]:
                    return
                self._evict(step.block)
            elif step.block not in self._slots:
                slot = self.arena.try_acquire(self.ring.slot_bytes, self.ring.blocks[step.block])
                if slot is None:
                    return
                self._start(step.block, slot)
            self._pending.popleft()

    def _start(self, index: int, slot: Slot) -> None:
        self._fetches[index] = self._residences[index].fetch(slot)
        self._slots[index] = slot
        self.counters.num_fetches += 1
        self.counters.fetched_bytes += self._residences[index].num_bytes

    def _arrive(self, index: int) -> None:
        fetch = self._fetches.get(index)
        if fetch is None:
            return
        try:
            fetch.wait()
        except BaseException as error:
            self._slots.pop(index, None)
            self._fetches.pop(index, None)
            # Whoever keeps the exception keeps its frames, and must not keep the slot with them.
            fetch = None
            traceback.clear_frames(error.__traceback__)
            raise
        del self._fetches[index]

    def _evict(self, index: int) -> None:
        """Drops the lease of a block. One that is still on its way is waited for: the drive may not be interrupted."""
        if index in self._fetches:
            self._arrive(index)
        self._slots.pop(index, None)

    def _demand(self, index: int) -> None:
        """Fetches a block that nobody foresaw."""
        name = self.ring.blocks[index]
        slot = self.arena.try_acquire(self.ring.slot_bytes, name)
        for other in [other for other in self._slots if not self._users[other]]:
            if slot is not None:
                break
            self._evict(other)
            slot = self.arena.try_acquire(self.ring.slot_bytes, name)
        if slot is None:
            slot = self.arena.acquire(self.ring.slot_bytes, name)
        self._start(index, slot)
