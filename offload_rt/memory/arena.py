"""One fixed region of memory and leases of it that return themselves.

An `Arena` is reserved once, to the byte, page-aligned (what O_DIRECT needs) and advised to use huge pages; nothing in
a steady step allocates. A `Slot` is a lease of a range of it. The range goes back when the last thing that can see it
is gone: the slot itself, every tensor made from it, and every I/O operation that holds its buffer.

[Note: slot lifetime]
A slot's bytes are exposed through one ctypes array. `torch.frombuffer` and the native ring both take a reference to
that array, so its own reference count is the lease: `weakref.finalize` on it gives the range back. Hence a tensor that
somebody kept cannot be overwritten by the next block; it shows up as an arena that is short, with the owner's name.

    arena  |-- slot "layers.3" --|-- free --|-- slot "layers.4" --|
                  |  ctypes array  <- memoryview in flight (ring)
                  |                <- tensor q_proj.weight, tensor norm.weight

[Note: lent memory]
A device is behind the host by as much as memory lets it, and the thread that reports its copies as over may be behind
the device. Until then a copy holds its ends, though everybody else has let go of them. So leases say to which copies
they are *lent*, and whoever needs room waits as long as any of the arena is, up to what a transfer may take. When none
is, nobody gives anything back by himself, and there is no room: that is said soon.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from offload_rt.config import io_timeout_seconds
from offload_rt.errors import BudgetExceeded, StorageTimeout
from offload_rt.memory import mapped
from offload_rt.patience import Patience
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from planners.errors import format_bytes

WAIT_SECONDS = io_timeout_seconds()
"""How long anybody waits for a device, a drive, or what one of them still uses."""
_GRACE_SECONDS = 1.0
"""A thread that has let go of memory, but for a tensor or a buffer, may be late by several of a scheduler's periods of
0.1 s."""
_COLLECT_SECONDS = 0.05
"""After so long a reference cycle is looked for that holds a lease: a collection takes longer than most waits."""
POISON = 0xFF
"""Every float made of 0xFF bytes is a NaN."""


class Region(mmap.mmap):
    """The memory of an arena. Unmapped when nothing sees it any more, after `before_unmap` was called.

    Whoever has the kernel or a driver keep these pages (see [Note: registration] in `file_io`) leaves there how to undo
    that: a weak reference would be cleared after the unmapping, when the address may be another arena's already.
    """

    before_unmap: list[Callable[[int], None]]
    """Each is called with the address, from whichever thread lets go last. None may raise."""
    address: int
    tell_gone: Callable[[], object]
    """Says that the memory was given back, once."""
    is_locked: bool
    """A device was asked to make it reachable for copies of its own."""
    is_pageable: bool
    """It was asked, and could not: its copies go through memory that is reachable."""

    def __new__(cls, num_bytes: int) -> Region:
        # Private: Python's default, a shared mapping, gets no huge pages, and direct reads were 1.6 times slower.
        region = super().__new__(cls, -1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        region.before_unmap = []
        region.tell_gone = lambda: None
        region.is_locked = region.is_pageable = False
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: small pages serve
                region.madvise(mmap.MADV_HUGEPAGE)
        return region

    def give_back(self) -> None:
        """Gives the memory back to the system now, whoever still sees it. What lay in it is lost. Nothing may be copied
        to it or from it any more: whoever had its pages kept lets go of them first.
        """
        while self.before_unmap:
            self.before_unmap.pop()(self.address)
        self.is_locked = self.is_pageable = False
        self.madvise(mmap.MADV_DONTNEED)
        self.tell_gone()

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if at_exit():  # everything goes with the process, and modules are already gone
            return
        for undo in self.before_unmap:
            undo(self.address)


@dataclass(frozen=True)
class MemoryRange:
    """The half-open byte range [begin, end) of a named arena."""

    arena: str
    begin: int
    end: int


@dataclass
class Lease:
    """The half-open byte range [start, end) of `arena`, and whose it is."""

    arena: str
    owner: str
    start: int
    end: int
    lent_to: list[str] = field(default_factory=list)
    """Copies that are not known to be over. See [Note: lent memory]."""

    def __str__(self) -> str:
        lent = f" (lent to {', '.join(sorted(set(self.lent_to)))})" if self.lent_to else ""
        return f"{self.owner} {format_bytes(self.end - self.start)}{lent}"


class Slot:
    """A lease of `num_bytes` of an arena, or the part of one. Kept alive by whatever was made from it."""

    on_device = False
    """Whether it lies in memory of a device whose work is asynchronous, so that its use is ordered by events."""

    def __init__(
        self,
        memory: Any,
        region: Any,
        lease: Lease,
        offset_bytes: int,
        num_bytes: int,
    ) -> None:
        self._memory = memory
        self.region = region
        self._lease = lease
        self._offset_bytes = offset_bytes
        self.num_bytes = num_bytes

    @property
    def address(self) -> int:
        """Of its first byte, in whichever memory."""
        return ctypes.addressof(self._memory) + self._offset_bytes

    @property
    def owner(self) -> str:
        """What it was leased for."""
        return self._lease.owner

    @property
    def range(self) -> MemoryRange:
        """Which bytes of which arena: what a recorder sees."""
        begin = self._lease.start + self._offset_bytes
        return MemoryRange(self._lease.arena, begin, begin + self.num_bytes)

    def lend(self, to: str) -> Callable[[], None]:
        """Says that `to` may use the memory until what is returned is called, once: when it has let go of the memory.

        See [Note: lent memory]. Holds no lease.
        """
        self._lease.lent_to.append(to)
        return partial(self._lease.lent_to.remove, to)

    def part(self, offset_bytes: int, num_bytes: int) -> Slot:
        """The half-open range [offset, offset + num_bytes) of this slot, under the same lease."""
        if offset_bytes < 0 or num_bytes < 0 or offset_bytes + num_bytes > self.num_bytes:
            raise ValueError(f"slot: range [{offset_bytes}, {offset_bytes + num_bytes}) of {self.num_bytes} bytes")
        return type(self)(self._memory, self.region, self._lease, self._offset_bytes + offset_bytes, num_bytes)

    def buffer(self) -> memoryview:
        """The slot's bytes, writable. Holds the lease as long as it lives."""
        return memoryview(self._memory).cast("B")[self._offset_bytes : self._offset_bytes + self.num_bytes]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> torch.Tensor:
        """A contiguous tensor over the bytes from `offset_bytes` on. Holds the lease as long as it lives."""
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset_bytes < 0 or offset_bytes + num_elements * dtype.itemsize > self.num_bytes:
            raise ValueError(f"slot: {tuple(shape)} of {dtype} at {offset_bytes} exceeds {self.num_bytes} bytes")
        flat = torch.frombuffer(self._memory, dtype=dtype, count=num_elements, offset=self._offset_bytes + offset_bytes)
        return flat if len(shape) == 1 else flat.view(tuple(shape))

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in this slot `tensor` begins; None if it begins elsewhere."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < self.num_bytes else None


class Arena:
    """`num_bytes` of memory, leased out first-fit. Thread-safe. `poison` fills what is returned with NaN bytes.

    Leases begin at multiples of `granule_bytes` and take whole ones: pages, where drives read and write them. Other
    memory than the host's is a subclass: what it is, how it is leased and filled.
    """

    slot_type = Slot

    def __init__(
        self, name: str, num_bytes: int, *, poison: bool = False, granule_bytes: int = IO_ALIGNMENT_BYTES
    ) -> None:
        self.name = name
        self._granule_bytes = granule_bytes
        self.num_bytes = align_up(num_bytes, IO_ALIGNMENT_BYTES)
        self.peak_bytes = 0
        """The most under lease at once since it was made, or since `restart_peak`."""
        self.num_leases = 0
        """Leases ever given; a steady step's count does not depend on its number."""
        self._poison = poison
        self._lock = threading.Lock()
        self._returned: deque[int] = deque()
        self._leases: dict[int, Lease] = {}
        self._held_bytes = 0
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)] if self.num_bytes else []
        self._next_lease = 0
        self.region = self._map()
        self.region.tell_gone = mapped.tell(self.region, name, self.num_bytes)
        if poison:
            self._fill(0, self.num_bytes)

    def _map(self) -> Any:
        """Reserves the memory: once, to the byte."""
        return Region(self.num_bytes)

    def _memory(self, start: int, num_bytes: int) -> Any:
        """What sees a range of it; the range is leased as long as this lives."""
        return (ctypes.c_char * num_bytes).from_buffer(self.region, start)

    def _fill(self, start: int, num_bytes: int) -> None:
        """Poisons a range."""
        ctypes.memset(self.region.address + start, POISON, num_bytes)

    def acquire(self, num_bytes: int, owner: str) -> Slot:
        """Leases `num_bytes`, aligned. Blocks while there is no room and some of it is lent, see [Note: lent memory].

        Raises `BudgetExceeded`, naming the holders, when nobody gives back so much, and `StorageTimeout` when what is
        lent does not come back in `WAIT_SECONDS`.
        """
        slot = self.acquire_or_none(num_bytes, owner)
        if slot is None and num_bytes <= self.num_bytes:
            begin, has_collected = time.monotonic(), False
            while (slot := self.acquire_or_none(num_bytes, owner)) is None:
                waited = time.monotonic() - begin
                if not has_collected and waited >= min(_GRACE_SECONDS, _COLLECT_SECONDS):
                    gc.collect()
                    has_collected = True
                elif waited >= _GRACE_SECONDS:
                    break
                else:
                    time.sleep(0.001)
        if slot is None:
            raise BudgetExceeded(self._short_of(num_bytes, owner))
        return slot

    def acquire_or_none(self, num_bytes: int, owner: str) -> Slot | None:
        """As `acquire`, but None when nobody gives back so much: blocks only while some of the arena is lent."""
        if num_bytes > self.num_bytes:
            return None
        if (slot := self.try_acquire(num_bytes, owner)) is not None:  # mostly there is room, and nobody need be asked
            return slot
        patience = Patience(WAIT_SECONDS)
        while True:
            may_come_back = self._is_lent()  # asked first: who lets go in between has made room
            slot = self.try_acquire(num_bytes, owner)
            if slot is not None or not may_come_back:
                return slot
            if not patience.slice_seconds():
                raise StorageTimeout(f"{self._short_of(num_bytes, owner)}; nothing came back in {WAIT_SECONDS:g} s")
            time.sleep(0.001)

    def try_acquire(self, num_bytes: int, owner: str) -> Slot | None:
        """As `acquire`, but None when there is no room now. Does not block."""
        wanted = max(align_up(num_bytes, self._granule_bytes), self._granule_bytes)
        with self._lock:
            self._collect()
            for index, (start, end) in enumerate(self._free):
                if end - start >= wanted:
                    if end - start == wanted:
                        del self._free[index]
                    else:
                        self._free[index] = (start + wanted, end)
                    number = self._next_lease
                    self._next_lease += 1
                    self.num_leases += 1
                    lease = self._leases[number] = Lease(self.name, owner, start, start + wanted)
                    self._held_bytes += wanted
                    self.peak_bytes = max(self.peak_bytes, self._held_bytes)
                    break
            else:
                return None
        memory = self._memory(start, wanted)
        # See [Note: slot lifetime]. The finalizer may run inside any allocation, also of a thread that holds the
        # lock: it only appends to a deque, and the next acquire does the work.
        weakref.finalize(memory, self._returned.append, number).atexit = False
        return self.slot_type(memory, self.region, lease, 0, num_bytes)

    def held_bytes(self) -> int:
        """Bytes under lease now."""
        with self._lock:
            self._collect()
            return self._held_bytes

    def restart_peak(self) -> None:
        """From now on `peak_bytes` is what comes, and what is under lease already."""
        with self._lock:
            self._collect()
            self.peak_bytes = self._held_bytes

    def _is_lent(self) -> bool:
        with self._lock:
            return any(lease.lent_to for lease in self._leases.values())

    def _short_of(self, num_bytes: int, owner: str) -> str:
        with self._lock:
            held = ", ".join(map(str, self._leases.values()))
        return (
            f"arena {self.name}: {owner} needs {format_bytes(num_bytes)} of {format_bytes(self.num_bytes)}; "
            f"held by: {held or 'nobody'}"
        )

    def _collect(self) -> None:
        while self._returned:
            lease = self._leases.pop(self._returned.popleft())
            self._held_bytes -= lease.end - lease.start
            if self._poison:
                self._fill(lease.start, lease.end - lease.start)
            self._free.append((lease.start, lease.end))
            self._free.sort()
            merged = [self._free[0]]
            for start, end in self._free[1:]:
                if start == merged[-1][1]:
                    merged[-1] = (merged[-1][0], end)
                else:
                    merged.append((start, end))
            self._free = merged


@dataclass(frozen=True)
class SlotPool:
    """An arena in which all slots are as large as the largest of what they are for."""

    arena: Arena
    slot_bytes: int

    @property
    def num_slots(self) -> int:
        return self.arena.num_bytes // max(1, self.slot_bytes)

    def acquire(self, owner: str) -> Slot:
        """As `Arena.acquire`."""
        return self.arena.acquire(self.slot_bytes, owner)

    def acquire_or_none(self, owner: str) -> Slot | None:
        """As `Arena.acquire_or_none`."""
        return self.arena.acquire_or_none(self.slot_bytes, owner)

    def try_acquire(self, owner: str) -> Slot | None:
        """As `Arena.try_acquire`."""
        return self.arena.try_acquire(self.slot_bytes, owner)
