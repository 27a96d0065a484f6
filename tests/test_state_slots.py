"""State through few slots by a simulated clock: when each read begins, and when the last piece is stepped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from offload_rt.errors import StorageTimeout
from offload_rt.memory.arena import Arena, SlotPool
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.rules import Scalars, Update
from offload_rt.optimizer.state import StateHome, begin_state
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.transfers.links import Links
from tests.power_loss import PlainIO
from tests.tiny_blocks import CountingRule, blocks, gradients_of, state_log

NUMBERS = itertools.count()
READ, STEP = 4.0, 1.0
"""Seconds of a piece."""


class SlowIO(PlainIO):
    """A drive that reads, and beside that writes, one thing after the other, by a clock that waits set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free_at = {"read": 0.0, "write": 0.0}
        self.seconds = {"read": 0.0, "write": 0.0}
        self.begun: dict[str, list[float]] = {"read": [], "write": []}

    def start(self, kind: str, file: Any, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        super().start(kind, file, offset_bytes, buffer)  # type: ignore[no-untyped-call]
        if kind not in self.seconds:
            return lambda timeout_seconds: None
        begin = max(self.now, self.free_at[kind])
        self.begun[kind].append(begin)
        over = self.free_at[kind] = begin + self.seconds[kind]

        def wait(timeout_seconds: float) -> None:
            if not timeout_seconds and over > self.now:
                raise StorageTimeout("under way")
            self.now = max(self.now, over)

        return wait


class SlowRule(CountingRule):
    """Steps that take their time by the drive's clock."""

    def __init__(self, io: SlowIO) -> None:
        super().__init__()
        self.io = io

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        self.io.now += STEP
        return super().update_all(updates)


def stepped(folder: Path, *, num_slots: int, write_seconds: float) -> SlowIO:
    """Two blocks of three pieces stepped through `num_slots`, all of whose gradients are there."""
    io = SlowIO()
    links, made = Links(io=io), blocks(2)
    home = StateHome(log=state_log(made, folder, links), links=links)
    most = max(piece.num_bytes for block in made for piece in block.pieces)
    arena = Arena(f"state {next(NUMBERS)}", num_slots * most)
    for block in made:
        for piece in block.pieces:
            slot = arena.acquire(piece.num_bytes, piece.name)
            begin_state(slot, piece, block, None)
            links.wait(home.write_back(piece, slot))
            del slot
    assert home.log is not None
    home.log.commit(1, b"")
    room = Arena(f"gradients {next(NUMBERS)}", 2 * made[0].gradients.stored_bytes)
    gradients = Gradients(made, room, None, links, accumulates=False)
    for block in made:
        gradients.add(block, gradients_of(block, 1.0), with_norms=True)
    stepper = Stepper(
        SlowRule(io), home, gradients, lambda name: {}, Progress(), links, state_pool=SlotPool(arena, most),
        weights_pool=SlotPool(Arena(f"weights {next(NUMBERS)}", 4096), 4096), threaded=False,
    )  # fmt: skip
    io.begun["read"].clear()
    io.seconds = {"read": READ, "write": write_seconds}
    stepper.expect(made)
    for block in made:
        stepper.submit(block)
    stepper.finish()
    stepper.close()  # and the last writes are over
    home.log.close()
    return io


@pytest.mark.parametrize(
    ("num_slots", "write_seconds", "reads", "end"),
    [
        (1, 4.0, [0.0, 9.0, 18.0, 27.0, 36.0, 45.0], 54.0),
        (2, 4.0, [0.0, 4.0, 9.0, 13.0, 18.0, 22.0], 31.0),
        (2, 3.0, [0.0, 4.0, 8.0, 12.0, 16.0, 20.0], 28.0),
        (2, 2.0, [0.0, 4.0, 8.0, 12.0, 16.0, 20.0], 27.0),
        (3, 4.0, [0.0, 4.0, 8.0, 12.0, 16.0, 20.0], 29.0),
    ],
)
def test_a_slot_is_read_into_as_soon_as_it_is_written(
    num_slots: int, write_seconds: float, reads: list[float], end: float, tmp_path: Path
) -> None:
    """Two slots, whose writes take as long as their reads:

    read    0----4----     9----13----     18---22----
    step          0    1         2    3          4    5
    write          5----9----     14---18----     23---27----
    """
    io = stepped(tmp_path, num_slots=num_slots, write_seconds=write_seconds)
    assert io.begun["read"] == reads
    assert io.now == end
