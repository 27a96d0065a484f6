"""Keeps what the C library's heap holds back within bounds: on the CPU device, PyTorch allocates from it.

[Note: holes]
PyTorch asks for aligned memory, and glibc does not find a freed block of exactly the wanted size again (its bug 14581:
it looks for one that is larger by the alignment). Over a few steps whose tensors never exceed 60 MiB together, the heap
of the SmolLM2 demo grew by 480 MiB of freed memory. `malloc_trim` gives the pages of such holes back to the system; to
do so after every layer would cost the faults of taking them again. So it is done when there are more holes than the
plan grants: then whatever comes fits, though none of them is used again. Holes are what the process has grown by, less
what the heap has in use (`mallinfo2`). Where the C library does not say that, it is done when the process has outgrown
the whole plan, which what comes next may exceed by its own size.

A layer makes holes while it runs, too, between two looks of the guard. Where a plan's room for holes is less than
half of what is wanted, large blocks are mapped, and leave none: [Note: mapped blocks] in `mapped_blocks`.

[Note: holes that will be filled]
Activations that layers keep are the heap's from forward to backward, and leave holes that the next forward fills. A
trim in between has the kernel clear all of it again (8 layers, each keeping 17 MiB: 350 MiB trimmed and 90 thousand
faults a step, a fifth of its time). So room that was planned for what is kept, and is not in use, is granted besides:
as it fills, the grant shrinks, and the process stays within the plan. So is the window of what is swapped, where DEVICE
is RAM: it is copied at once, and leaves a hole (8 layers, 136 MiB to NVMe: 1 to 2 trims and 45 to 70 thousand faults a
step without that, none and 7 to 16 thousand with it).

[Note: room without looking]
What is in use the C library says by a walk over all that is free: 3000 blocks in a process that trains adapters, 25
microseconds where they are in the caches, 300 where a layer ran in between. So it is not asked while the process holds
so little that it does not matter: if all that may come besides (what is kept, a layer's transients) came, and filled
none of the holes, half of what the plan grants for these would still be free.

[Note: pins]
A layer's transients come and go together, and leave one large hole, unless something that stays was put among them:
holes on both sides of it are too small for the next layer's largest tensors, by a few bytes. In backward that was the
gradients, some twenty small tensors a layer. So their memory is taken while no transient is there, and what autograd
gives is copied into it. With 22 layers of TinyLlama's shape at 512 tokens the heap no longer grows by 400 MiB in each
backward: 0.15 instead of 0.45 million page faults a step. The large transients of frozen layers lie in an arena
(`transients`); where layers train, or run by chunks, they are the heap's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import torch

from offload_rt.memory.mapped_blocks import MappedBlocks

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _MallInfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, of all its arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_bytes() -> int | None:
    """What is in use of the C library's heap, mapped blocks included; None where it does not say (glibc < 2.33)."""
    mallinfo2 = _find_mallinfo2()
    if mallinfo2 is None:
        return None
    found = mallinfo2()
    return int(found.uordblks) + int(found.hblkhd)


@cache
def _find_mallinfo2() -> Callable[[], _MallInfo2] | None:
    """Once: opening the C library makes a class, and it is asked behind every layer."""
    found: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is not None:
        found.restype = _MallInfo2
    mallinfo2: Callable[[], _MallInfo2] | None = found
    return mallinfo2


def is_tight(slack_bytes: int, wanted_bytes: int) -> bool:
    """Whether a plan grants too little for holes to leave a layer's to the C library. wanted_bytes: what it would grant
    where its budget has room.
    """
    return 2 * slack_bytes < wanted_bytes


@dataclass(frozen=True)
class Base:
    """What a process held before there was an engine."""

    resident_bytes: int
    heap_bytes: int | None
    """In use of the C library's heap; None where it does not say."""
    file_bytes: int = 0
    """Of `resident_bytes`, pages of files: code that has run. The kernel takes them where it needs their memory."""

    @staticmethod
    def now(*, besides_bytes: int = 0) -> Base:
        """Of this process, without `besides_bytes` that are accounted for elsewhere."""
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            resident, files = (int(pages) * _PAGE_BYTES for pages in statm.read().split()[1:3])
        in_use = heap_bytes()
        in_use = None if in_use is None else max(0, in_use - besides_bytes)
        return Base(max(0, resident - besides_bytes), in_use, files)


@dataclass
class HeapCounters:
    """What the guard saw and did."""

    num_trims: int = 0
    returned_bytes: int = 0
    peak_bytes: int = 0
    """Most that the process held above its base at any `check`, arenas included, pages of files left out."""


class HeapGuard:
    """Called between layers, and wherever much memory is about to be asked for.

    The process may hold `planned_bytes` above `base`: `arena_bytes` of them lie outside the heap, and `slack_bytes` are
    for holes, where `wanted_bytes` would let none be given back. Of the heap's, `lasting_bytes` are there all the time,
    `kept_bytes` from forward to backward.
    """

    def __init__(
        self,
        base: Base,
        *,
        planned_bytes: int,
        arena_bytes: int,
        slack_bytes: int,
        wanted_bytes: int = 0,
        lasting_bytes: int = 0,
        kept_bytes: int = 0,
    ) -> None:
        self.counters = HeapCounters()
        self.seen_bytes = 0
        """Most resident memory at any `check` since somebody set this to 0."""
        self._base = base
        self._arena_bytes = arena_bytes
        self._planned_bytes = planned_bytes
        self._lasting_bytes, self._kept_bytes = lasting_bytes, kept_bytes
        self._wanted_bytes = wanted_bytes
        self.mapped = MappedBlocks()
        self.grant(slack_bytes)
        self._statm: BinaryIO = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - read between all layers
        # A C library without it (musl) holds nothing back.
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def grant(self, slack_bytes: int) -> None:
        """From now on, so much may be held back. Where that is tight, see [Note: mapped blocks]."""
        self._holes_allowed = self._trim_at = slack_bytes
        if is_tight(slack_bytes, self._wanted_bytes):
            self.mapped.ask(slack_bytes)

    def check(self) -> None:
        """Takes a few microseconds, unless the process is near what it may hold: see [Note: room without looking]."""
        resident, files = self._pages()
        above_base = self._above_base(resident - files)
        self.counters.peak_bytes = max(self.counters.peak_bytes, above_base)
        self.seen_bytes = max(self.seen_bytes, resident)
        if above_base <= self._arena_bytes + self._lasting_bytes + self._holes_allowed // 2:
            return
        in_use = self._in_use()
        if self._holes(resident - files, in_use) > self._trim_at + self._unfilled(in_use):
            self.trim()

    def trim(self) -> None:
        """Gives all holes back, whatever the plan grants."""
        if self._malloc_trim is None:
            return
        resident = self.resident_bytes()
        self._malloc_trim(0)
        left, files = self._pages()
        self.counters.num_trims += 1
        self.counters.returned_bytes += max(0, resident - left)
        # What cannot be given back must not make every check a trim.
        self._trim_at = max(self._holes_allowed, self._holes(left - files, self._in_use()) + self._holes_allowed // 2)

    def resident_bytes(self) -> int:
        """Resident memory of this process now."""
        return self._pages()[0]

    def above_base_bytes(self) -> int:
        """What the process holds above its base now, arenas included, pages of files left out. May be below 0."""
        now = Base.now()  # reports are asked for when the guard is closed, too
        return self._above_base(now.resident_bytes - now.file_bytes)

    def close(self) -> None:
        self.mapped.close()
        self._statm.close()

    def _pages(self) -> tuple[int, int]:
        """Resident bytes of this process now, and what of them is files'."""
        resident, files = os.pread(self._statm.fileno(), 128, 0).split()[1:3]
        return int(resident) * _PAGE_BYTES, int(files) * _PAGE_BYTES

    def _in_use(self) -> int | None:
        """What the heap has in use above the base; None where the C library does not say. May be below 0."""
        in_use = heap_bytes()
        return None if in_use is None or self._base.heap_bytes is None else in_use - self._base.heap_bytes

    def _holes(self, anonymous_bytes: int, in_use: int | None) -> int:
        """What of the memory that is no file's is neither the base's nor an arena's nor in use. May be below 0."""
        above_base = self._above_base(anonymous_bytes)
        if in_use is None:
            return above_base - self._planned_bytes + self._holes_allowed
        return above_base - self._arena_bytes - in_use

    def _above_base(self, anonymous_bytes: int) -> int:
        return anonymous_bytes - (self._base.resident_bytes - self._base.file_bytes)

    def _unfilled(self, in_use: int | None) -> int:
        """What was planned to be kept, and is not there: see [Note: holes that will be filled]."""
        if in_use is None:
            return 0
        return max(0, min(self._kept_bytes, self._lasting_bytes + self._kept_bytes - in_use))


def places_for(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Memory for the gradients of `tensors`, see [Note: pins]; None on a device, whose allocator is another."""
    return [torch.empty_like(tensor) if tensor.device.type == "cpu" else None for tensor in tensors]


def put_into(gradient: torch.Tensor | None, place: torch.Tensor | None) -> torch.Tensor | None:
    """`gradient`, in its place if it has one. One of another layout stays where it is: further products see it."""
    if gradient is None or place is None or gradient.layout is not place.layout:
        return gradient
    return place.copy_(gradient) if gradient.stride() == place.stride() else gradient
