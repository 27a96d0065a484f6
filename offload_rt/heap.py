"""Keeps what the C library's heap holds back within bounds: on the CPU device, PyTorch allocates from it.

[Note: holes]
PyTorch asks for aligned memory, and glibc does not find a freed block of exactly the wanted size again (its bug 14581:
it looks for one that is larger by the alignment). Over a few steps whose tensors never exceed 60 MiB together, the heap
of the SmolLM2 demo grew by 480 MiB of freed memory. `malloc_trim` gives the pages of such holes back to the system; to
do so after every layer would cost the faults of taking them again, so it is done when the process has outgrown what the
plan allows it, and at most once for every `margin_bytes` of growth.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import BinaryIO

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class HeapCounters:
    """What the guard saw and did."""

    num_trims: int = 0
    returned_bytes: int = 0
    peak_bytes: int = 0
    """Most resident memory of the process at any `check`."""


class HeapGuard:
    """Called between layers. `limit_bytes`: resident memory of the process from which on holes are given back."""

    def __init__(self, limit_bytes: int, *, margin_bytes: int = 64 << 20) -> None:
        self.counters = HeapCounters()
        self._margin_bytes = margin_bytes
        self._limit_bytes = self._trim_at = limit_bytes
        self._statm: BinaryIO = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - read between all layers
        # A C library without it (musl) holds nothing back.
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def check(self) -> None:
        """Takes some microseconds, unless it is time to trim."""
        resident = self.resident_bytes()
        self.counters.peak_bytes = max(self.counters.peak_bytes, resident)
        if resident > self._trim_at:
            self.trim()

    def trim(self) -> None:
        """Gives all holes back, whatever the limit."""
        if self._malloc_trim is None:
            return
        resident = self.resident_bytes()
        self._malloc_trim(0)
        left = self.resident_bytes()
        self.counters.num_trims += 1
        self.counters.returned_bytes += max(0, resident - left)
        self._trim_at = max(self._limit_bytes, left + self._margin_bytes)

    def resident_bytes(self) -> int:
        """Resident memory of this process now."""
        return int(os.pread(self._statm.fileno(), 128, 0).split()[1]) * _PAGE_BYTES

    def close(self) -> None:
        self._statm.close()
