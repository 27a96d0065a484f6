"""The memory that this process has, and what it may still take, as the system sees it: no tier, no account."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_rt.memory.memory_groups import memory_groups


def free_memory_bytes() -> int:
    """What this process may still take: what `memory_left` says, less a tenth as a reserve."""
    return memory_left().left_bytes * 9 // 10


@dataclass(frozen=True, kw_only=True)
class MemoryLeft:
    """What anybody may still take before the kernel kills somebody."""

    left_bytes: int
    total_bytes: int
    of: str
    """"RAM", or "cgroup" where its limit is nearer."""


def memory_left() -> MemoryLeft:
    """Now, with the pages of files that the kernel would drop: of the RAM, or of the control group that has less."""
    memory = psutil.virtual_memory()
    ram = MemoryLeft(left_bytes=int(memory.available), total_bytes=int(memory.total), of="RAM")
    groups = [
        MemoryLeft(left_bytes=group.left_bytes, total_bytes=group.limit_bytes, of="cgroup") for group in memory_groups()
    ]
    return min([ram, *groups], key=lambda left: left.left_bytes)


def peak_resident_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process now (VmRSS)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
