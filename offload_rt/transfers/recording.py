"""What happened before what: a record of every transfer and every use, and the checker that reads it.

On a GPU a weight may be used before its copy has arrived, or overwritten while a kernel still reads it, and nothing
says so. Here every submission, arrival, wait and use is recorded as an operation on byte ranges, with the operations
that it is ordered after; `check` then demands that any two operations which touch the same bytes, one of them writing,
are ordered. It is the happens-before relation of race detectors, over a schedule instead of memory accesses.

    host lane     submit(A) ------------- join(A) -- use(A) -- submit(B into the same slot)
                        \\                 /                       \\
    transfer lane        read -> slot  ---                         read -> slot

A transfer is ordered after what its lane (the host, or a stream) had done when it was submitted, and before whatever
joins it. Transfers are not ordered among themselves. The record stands for the real device's streams too: a lane is a
stream, a join is an event wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from offload_rt.memory.arena import MemoryRange

HOST = "host"
"""The lane of the calling thread; on the CPU device it is the compute lane too."""

RETURNED = "returned"
"""What the host has seen to be over because its memory came back. Only what fills HOST memory, or empties it to a
drive, is ordered after it: a kernel must be ordered by an event, not by luck."""


@dataclass(frozen=True)
class Operation:
    """One recorded operation. `ancestors` is the set of operations before it, as a bit set over their numbers."""

    number: int
    name: str
    lane: str
    reads: tuple[MemoryRange, ...]
    writes: tuple[MemoryRange, ...]
    ancestors: int


@dataclass(frozen=True)
class Race:
    """Two operations on the same bytes, one writing, that nothing orders."""

    first: Operation
    second: Operation
    where: MemoryRange

    def __str__(self) -> str:
        return (
            f"{self.second.name} (op {self.second.number}, lane {self.second.lane}) is not ordered after "
            f"{self.first.name} (op {self.first.number}, lane {self.first.lane}): both touch "
            f"{self.where.arena} [{self.where.begin}, {self.where.end})"
        )


class Recorder:
    """Keeps operations in the order of their submission. Thread-safe."""

    def __init__(self, compute: str = HOST) -> None:
        self.compute = compute
        """The lane that uses weights: the device's compute stream, where it has one."""
        self.operations: list[Operation] = []
        self._lane_heads: dict[str, int] = {}
        self._lock = threading.Lock()

    def submit(
        self,
        name: str,
        *,
        reads: Iterable[MemoryRange] = (),
        writes: Iterable[MemoryRange] = (),
        after: Iterable[int] = (),
        lane: str = HOST,
        also: str | None = None,
    ) -> int:
        """Records an asynchronous operation started from `lane`; it runs on a lane of its own. Returns its number.

        It comes after what `lane` was behind, and what `also` was.
        """
        with self._lock:
            ancestors = self._head(lane) | (0 if also is None else self._head(also))
            for number in after:
                ancestors |= self.operations[number].ancestors | (1 << number)
            return self._append(name, f"transfer {len(self.operations)}", reads, writes, ancestors)

    def join(self, number: int, *, lane: str = HOST) -> None:
        """`lane` has waited for operation `number`: all that follows on it is ordered after."""
        with self._lock:
            before = self.operations[number].ancestors | (1 << number)
            self._lane_heads[lane] = self._lane_heads.get(lane, 0) | before

    def use(
        self,
        name: str,
        *,
        reads: Iterable[MemoryRange] = (),
        writes: Iterable[MemoryRange] = (),
        lane: str | None = None,
        also: str | None = None,
    ) -> int:
        """Records something that `lane` (None: compute) itself does with memory, in the lane's order.

        It comes after what `also` was behind too; what the lane does next does not.
        """
        lane = self.compute if lane is None else lane
        with self._lock:
            head = self._head(lane)
            number = self._append(name, lane, reads, writes, head | (0 if also is None else self._head(also)))
            self._lane_heads[lane] = head | (1 << number)
            return number

    def _head(self, lane: str) -> int:
        """What comes before whatever `lane` is given now: also what the host is behind, since it is who gives."""
        head = self._lane_heads.get(lane, 0)
        return head | self._lane_heads.get(HOST, 0) if lane in (self.compute, RETURNED) else head

    def _append(
        self,
        name: str,
        lane: str,
        reads: Iterable[MemoryRange],
        writes: Iterable[MemoryRange],
        ancestors: int,
    ) -> int:
        number = len(self.operations)
        self.operations.append(Operation(number, name, lane, tuple(reads), tuple(writes), ancestors))
        return number

    def check(self) -> list[Race]:
        """Every unordered conflicting pair. An empty list is the proof; an empty record proves nothing."""
        accesses: dict[str, list[tuple[MemoryRange, bool, Operation]]] = {}
        races = []
        for operation in self.operations:
            touched = [(r, False) for r in operation.reads] + [(w, True) for w in operation.writes]
            for where, is_write in touched:
                for other, other_writes, earlier in accesses.setdefault(where.arena, []):
                    if earlier is operation or not (is_write or other_writes):
                        continue
                    overlap = other.begin < where.end and where.begin < other.end
                    if overlap and not operation.ancestors >> earlier.number & 1:
                        races.append(Race(earlier, operation, where))
            for where, is_write in touched:
                accesses[where.arena].append((where, is_write, operation))
        return races
