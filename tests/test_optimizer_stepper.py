"""The stepper by itself: the order of updates, what is read ahead, who holds which slot, and what fails."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import StorageError
from offload_rt.memory import arena as arena_module
from offload_rt.memory.arena import Arena, SlotPool
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.rules import Scalars, Update
from offload_rt.optimizer.state import Part, StateHome, begin_state, state_tensors
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.transfers.links import Links
from tests.tiny_blocks import CountingRule, FailingIO, blocks, gradients_of, state_log
from tests.waiting import Waiting

NUMBERS = itertools.count()
threaded = pytest.mark.parametrize("threaded", [False, True])


class Bench:
    """A stepper over three blocks, whose state moves through `num_slots`; `in_memory` pieces of each rest in memory."""

    def __init__(self, folder: Path, *, threaded: bool, num_slots: int = 3, in_memory: int = 0) -> None:
        self.io, self.rule, self.progress = FailingIO(), CountingRule(), Progress()
        self.links = Links(io=self.io)
        self.blocks = blocks(3)
        self.home = StateHome(log=state_log(self.blocks, folder, self.links), links=self.links)
        most = max(piece.num_bytes for block in self.blocks for piece in block.pieces)
        self.arena = Arena(f"state {next(NUMBERS)}", num_slots * most)
        self._resting = Arena(f"resting {next(NUMBERS)}", max(1, 3 * in_memory) * most)
        for block in self.blocks:
            for number, piece in enumerate(block.pieces):
                room = self._resting if number < in_memory else self.arena
                slot = room.acquire(piece.num_bytes, piece.name)
                begin_state(slot, piece, block, None)
                if number < in_memory:
                    self.home.pieces[piece.name] = slot
                else:
                    self.links.wait(self.home.write_back(piece, slot))
                del slot
        self.home.log.commit(1, b"")  # type: ignore[union-attr]
        gradient_bytes = self.blocks[0].gradients.stored_bytes
        self.gradients = Gradients(
            self.blocks, Arena(f"gradients {next(NUMBERS)}", 3 * gradient_bytes), None, self.links, accumulates=False
        )
        for block in self.blocks:
            self.gradients.add(block, gradients_of(block, 1.0), with_norms=True)
        self.stepper = Stepper(
            self.rule, self.home, self.gradients, lambda name: {}, self.progress, self.links,
            state_pool=SlotPool(self.arena, most), weights_pool=SlotPool(Arena(f"weights {next(NUMBERS)}", 4096), 4096),
            threaded=threaded,
        )  # fmt: skip
        self.io.started.clear()

    def masters(self, block: TrainedBlock) -> list[float]:
        """The first element of each segment's master."""
        found = []
        for piece in block.pieces:
            slot = self.home.pieces.get(piece.name)
            if slot is None:
                slot = Arena(f"look {next(NUMBERS)}", piece.num_bytes).acquire(piece.num_bytes, "look")
                self.links.wait(self.home.fetch(piece, slot))
            found += [float(state_tensors(slot, segment)["master"][0]) for segment in piece.segments]
        return found

    def close(self) -> None:
        self.io.fails = set()
        self.stepper.close()
        self.home.log.close()  # type: ignore[union-attr]


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[Any]:
    made: list[Bench] = []

    def make(**arguments: Any) -> Bench:
        made.append(Bench(tmp_path, **arguments))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@threaded
def test_blocks_are_stepped_in_the_order_in_which_they_are_submitted(benches: Any, threaded: bool) -> None:
    bench = benches(threaded=threaded)
    bench.stepper.expect(bench.blocks)
    for block in reversed(bench.blocks):
        bench.stepper.submit(block, grad_scale=0.5)
    bench.stepper.finish()
    assert bench.rule.seen == [(10 * number, 0.5, 1) for number in (2, 1, 0) for _ in range(3)]
    assert [bench.masters(block) for block in bench.blocks] == [[0.5] * 3, [10.5] * 3, [20.5] * 3]
    assert bench.stepper.new_scalars == {f"{n}.{name}": {"last": 1} for n in range(3) for name in ("large", "small")}


@threaded
def test_state_is_read_along_the_hint_and_what_was_not_hinted_at_on_demand(benches: Any, threaded: bool) -> None:
    bench = benches(threaded=threaded, num_slots=2)
    first, second, third = bench.blocks
    bench.stepper.expect([first, third])
    assert [kind for kind, _ in bench.io.started] == ["read", "read"], "as many as there are slots, and no more"
    for block in (first, second, third):
        bench.stepper.submit(block)
    bench.stepper.finish()
    counters = bench.stepper.slots.counters
    assert counters.num_read_on_demand >= len(second.pieces)
    assert counters.num_read_ahead > 0
    assert counters.num_read_ahead + counters.num_read_on_demand == bench.stepper.counters.num_pieces == 9
    assert len(bench.rule.seen) == 9


def test_a_slot_that_a_device_is_late_to_report_is_waited_for_and_what_was_read_ahead_is_kept(
    benches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", 0.0)
    bench = benches(threaded=False, num_slots=2)
    slot = bench.arena.acquire(bench.blocks[0].pieces[0].num_bytes, "stepped on the device")
    give_back = slot.lend("copy of state")
    bench.stepper.expect([bench.blocks[1]])
    out_of_order = Waiting(lambda: bench.stepper.submit(bench.blocks[0]))
    assert out_of_order.still()
    del slot
    give_back()
    out_of_order.result()
    bench.stepper.submit(bench.blocks[1])
    assert bench.stepper.slots.counters.num_read_in_vain == 0
    assert [bench.masters(block)[0] for block in bench.blocks] == [1.0, 11.0, 20.0]


@threaded
def test_an_update_that_fails_is_raised_to_whoever_waits_and_nothing_behind_it_is_stepped(
    benches: Any, threaded: bool
) -> None:
    bench = benches(threaded=threaded)
    bench.stepper.expect(bench.blocks)
    bench.rule.fails_at = 3  # the first one of the second block
    with pytest.raises(ArithmeticError, match="this update fails"):
        for block in bench.blocks:
            bench.stepper.submit(block)
        bench.stepper.finish()
    assert len(bench.rule.seen) == 3
    bench.stepper.forget()
    assert bench.arena.held_bytes() == 0, "no slot stays with the error"
    bench.rule.fails_at = None
    bench.home.log.drop()
    for block in bench.blocks:
        bench.stepper.submit(block)
    bench.stepper.finish()
    assert [bench.masters(block)[0] for block in bench.blocks] == [1.0, 11.0, 21.0]


class FailsOnce(CountingRule):
    """Begins when it may, and fails in one update alone."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.may_begin = threading.Event()

    def update(self, of: Update) -> Scalars:
        self.may_begin.wait()
        try:
            return super().update(of)
        except ArithmeticError:
            self.fails_at = None
            raise


def test_blocks_that_were_submitted_when_one_before_them_failed_are_not_stepped(benches: Any) -> None:
    bench, rule = benches(threaded=True), FailsOnce(3)  # the first update of the second block
    bench.stepper._rule = rule
    for block in bench.blocks:
        bench.stepper.submit(block)
    rule.may_begin.set()
    with pytest.raises(ArithmeticError, match="this update fails"):
        bench.stepper.finish()
    assert [number for number, _, _ in rule.seen] == [0, 0, 0]


@threaded
@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_drive_that_fails_is_an_error_and_no_lease_is_left(benches: Any, threaded: bool, kind: str) -> None:
    bench = benches(threaded=threaded, num_slots=1)
    bench.io.fails = {kind}
    with pytest.raises(StorageError, match=f"{kind} failed"):
        for block in bench.blocks:
            bench.stepper.submit(block)
        bench.stepper.finish()
    bench.io.fails = set()
    bench.stepper.forget()
    gc.collect()  # of the error's own frames, where the update ran on this thread
    assert bench.arena.held_bytes() == 0


class SlowToGoOn(threading.Condition):
    """Where a thread that has told others something gets no further, until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self._has_told = False

    def notify_all(self) -> None:
        super().notify_all()
        self._has_told = True

    def __exit__(self, *error: Any) -> None:
        has_told, self._has_told = self._has_told, False
        super().__exit__(*error)
        if has_told:
            self.may_go_on.wait()


def test_a_thread_that_has_said_that_a_block_is_stepped_does_not_see_the_stepper(tmp_path: Path) -> None:
    """Whoever was told may let go of it, and collect it at once."""
    bench, changed = Bench(tmp_path, threaded=True), SlowToGoOn()
    bench.stepper._changed = changed
    bench.stepper.submit(bench.blocks[0])
    bench.stepper.finish()
    seen, thread = weakref.ref(bench.stepper), bench.stepper._thread
    assert thread is not None
    del bench.stepper
    gc.collect()
    assert seen() is None
    changed.may_go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    bench.home.log.close()  # type: ignore[union-attr]


@threaded
def test_of_a_block_in_two_places_each_part_is_stepped_by_itself(benches: Any, threaded: bool) -> None:
    bench = benches(threaded=threaded, in_memory=1)
    block = bench.blocks[1]
    assert [len(bench.home.part(block, part)) for part in (Part.IN_MEMORY, Part.IN_LOG)] == [1, len(block.pieces) - 1]
    bench.stepper.submit(block, Part.IN_LOG)
    bench.stepper.finish()
    assert bench.masters(block) == [10.0, 11.0, 11.0]
    bench.home.log.drop()
    assert bench.masters(block) == [10.0] * 3, "what is in the log can be taken back"
    bench.stepper.submit(block, Part.IN_LOG)
    bench.stepper.submit(block, Part.IN_MEMORY)
    bench.stepper.finish()
    assert bench.masters(block) == [11.0] * 3
    written = [kind for kind, _ in bench.io.started].count("write")
    assert written == 2 * (len(block.pieces) - 1), "state in memory is not written"


@threaded
def test_parameters_without_a_gradient_are_left_alone(benches: Any, threaded: bool) -> None:
    bench = benches(threaded=threaded)
    block = bench.blocks[0]
    bench.gradients.clear()
    bench.gradients.add(block, {1: torch.ones(8, dtype=torch.bfloat16)}, with_norms=True)
    bench.stepper.submit(block)
    bench.stepper.finish()
    assert bench.masters(block) == [0.0, 0.0, 1.0]
    assert bench.stepper.new_scalars == {"0.small": {"last": 1}}
    assert [kind for kind, _ in bench.io.started].count("write") == 1
