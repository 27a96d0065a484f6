"""Slots through which state comes to memory to be stepped, and leaves again: read ahead, and written behind.

[Note: read ahead] The order in which pieces will be stepped is a hint. State is read along it as slots fall free; a
piece that comes out of order is read on demand, and what was read in vain is dropped.

[Note: slots that fall free] A slot is free when its write is over, which somebody has to see. The thread that steps
looks when a piece has arrived, before it steps it, so that the drive reads meanwhile. Seen behind the step, with two
slots each read began when one had ended:

    seen behind    read 2 | step 2 | read 3 | step 3        seen before    read 2 | read 3 | read 4 |
                          | write 2         | write 3                             | step 2 | step 3
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Slot, SlotPool
from offload_rt.optimizer.parted_weights import PartedRoom
from offload_rt.optimizer.pieces import Piece, TrainedBlock
from offload_rt.optimizer.state import StateHome
from offload_rt.storage.commit_layout import settle
from offload_rt.transfers.transfer import Transfer


@dataclass(kw_only=True)
class SlotCounters:
    """Pieces that came through slots since the start."""

    num_read_ahead: int = 0
    """They were read, or under way, when they were wanted."""
    num_read_on_demand: int = 0
    num_read_in_vain: int = 0


class StateSlots:
    """Room for the state and the new weights of `home` that do not rest in memory. Used by the thread that steps;
    `expect`, and `forget` while nothing is stepped, by any other.
    """

    def __init__(
        self,
        home: StateHome,
        *,
        state_pool: SlotPool,
        weights_pool: SlotPool,
        wait: Callable[[Transfer], None],
        settle_one: Callable[[], bool],
    ) -> None:
        """`wait` blocks until a transfer has arrived. `settle_one` blocks until the device has stepped one piece more
        and `write_state` has it; False where it steps none.
        """
        self.counters = SlotCounters()
        self._home = home
        self._state_pool, self._weights_pool = state_pool, weights_pool
        self._wait = wait
        self._settle_one = settle_one
        # Half of the slots at most are on their way out, so that the other half can be read into meanwhile.
        self._max_writes = max(1, state_pool.num_slots // 2)
        self._to_read: deque[Piece] = deque()
        self._ahead: dict[str, tuple[Slot, Transfer]] = {}
        self._writes: deque[Transfer] = deque()
        self._read_lock = threading.Lock()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Says in which order pieces will be stepped, and starts reading. See [Note: read ahead]. Blocks only for a
        write of the same piece that is under way.
        """
        with self._read_lock:
            self._to_read = deque(
                piece for piece in pieces if piece.name not in self._home.pieces and piece.name not in self._ahead
            )
            self._read_ahead()

    def state(self, piece: Piece) -> Slot:
        """The piece's state in HOST: where it rests, or where it arrives. Blocks until it is there."""
        resting = self._home.pieces.get(piece.name)
        return resting if resting is not None else self._arrived(piece)

    def read(self, piece: Piece) -> Slot:
        """As `state`, for a piece that rests in the log and was not read ahead."""
        slot = self._take(self._state_pool, piece.name).part(0, piece.num_bytes)
        self._wait(self._home.fetch(piece, slot))
        return slot

    def write_state(self, piece: Piece, slot: Slot) -> None:
        """Starts writing a piece to where it rests, if that is not memory, and reads on. Blocks for earlier writes."""
        if piece.name in self._home.pieces:
            return
        self._writes.append(self._home.write_back(piece, slot))
        self._settle_writes(self._max_writes)
        with self._read_lock:
            self._read_ahead()

    def weights(self, block: TrainedBlock) -> Slot | PartedRoom | None:
        """Where the block's new weights are collected; None where its parameters hold them. Blocks for room."""
        if block.weights is None:
            return None
        resting = self._home.weights.get(block.name)
        if resting is not None:
            wait = self._home.before_change.get(block.name)
            if wait is not None:
                wait()
            return resting
        parts = self._home.parted.get(block.name)
        if parts is not None and not parts.split.nvme_bytes:
            return parts.room(None)
        slot = self._take(self._weights_pool, f"weights of {block.name}")
        if parts is not None:
            return parts.room(slot.part(0, parts.split.streamed_bytes))
        return slot.part(0, block.weights.stored_bytes)

    def write_weights(self, block: TrainedBlock, room: Slot | PartedRoom) -> None:
        """Starts writing collected weights to where they rest."""
        self._writes.append(self._home.write_weights(block, room))

    def forget(self) -> None:
        """Drops what was read ahead. Blocks until nothing is under way."""
        with self._read_lock:
            self._to_read.clear()
            self._drop_ahead()
        settle(self._writes)  # a commit would tell what became of them, and there will be none of this

    def _arrived(self, piece: Piece) -> Slot:
        with self._read_lock:
            found = self._ahead.pop(piece.name, None)
            if found is None and piece in self._to_read:  # what was read ahead has left the hint
                while self._to_read.popleft() is not piece:
                    continue  # passed by
        if found is None:
            self.counters.num_read_on_demand += 1
            return self.read(piece)
        self.counters.num_read_ahead += 1
        slot, transfer = found
        self._wait(transfer)
        self._read_on()
        return slot

    def _read_on(self) -> None:
        """Sees which writes are over, and starts reading into their slots. Does not block, but for a write of the
        piece that is read. See [Note: slots that fall free].

        Where nothing is to be read, nobody looks: so a step leaves as many writes behind, however fast the drive is,
        and the next one's first pieces are as many.
        """
        while self._to_read and self._writes and self._writes[0].is_over():
            self._wait(self._writes.popleft())  # orders the reads behind it; raises what it raised
        with self._read_lock:
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Starts reading along the hint while there are slots. Holds the lock.

        Ends where what was written of a piece has failed: that is the error of whoever wants the piece, and of the
        commit. It is not that of a step which was taken, or of one that is given up.
        """
        while self._to_read:
            slot = self._state_pool.try_acquire(self._to_read[0].name)
            if slot is None:
                return
            piece = self._to_read.popleft()
            slot = slot.part(0, piece.num_bytes)
            try:
                reading = self._home.fetch(piece, slot)
            except OffloadError:
                self._to_read.clear()
                return
            self._ahead[piece.name] = (slot, reading)

    def _take(self, pool: SlotPool, owner: str) -> Slot:
        """A slot, once a write that holds one is done, or the device; at the worst what was read ahead is dropped."""
        while (slot := pool.try_acquire(owner)) is None:
            if self._writes:
                self._settle_writes(len(self._writes) - 1)
                continue
            if self._settle_one():
                continue
            slot = pool.acquire_or_none(owner)  # what a device has stepped is lent until that is reported
            if slot is not None:
                return slot
            with self._read_lock:
                was_ahead = bool(self._ahead) and pool is self._state_pool
                if was_ahead:
                    self._drop_ahead()
            if not was_ahead:
                return pool.acquire(owner)  # raises, naming the holders
        return slot

    def _drop_ahead(self) -> None:
        while self._ahead:
            _, (_, transfer) = self._ahead.popitem()
            self.counters.num_read_in_vain += 1
            try:
                self._wait(transfer)
            except OffloadError:  # nobody wanted it: whoever does will meet it again
                continue

    def _settle_writes(self, num_left: int) -> None:
        while len(self._writes) > num_left:
            self._wait(self._writes.popleft())
