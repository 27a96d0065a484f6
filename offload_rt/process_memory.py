"""The memory that this process has, and what it may still take, as the system sees it: no tier, no account."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


def free_memory_bytes() -> int:
    """What this process may still take: free RAM or what its cgroup leaves, less a tenth as a reserve."""
    free = int(psutil.virtual_memory().available)
    limit, usage = cgroup_memory_bytes()
    if limit is not None:
        free = min(free, limit - usage)
    return free * 9 // 10


@dataclass(frozen=True, kw_only=True)
class MemoryLeft:
    """What anybody may still take before the kernel kills somebody."""

    left_bytes: int
    total_bytes: int
    of: str
    """"RAM", or "cgroup" where its limit is nearer."""


def memory_left() -> MemoryLeft:
    """Now, with the pages of files that the kernel would drop."""
    memory = psutil.virtual_memory()
    found = MemoryLeft(left_bytes=int(memory.available), total_bytes=int(memory.total), of="RAM")
    limit, usage = cgroup_memory_bytes(without_dropped=True)
    if limit is not None and limit - usage < found.left_bytes:
        return MemoryLeft(left_bytes=limit - usage, total_bytes=limit, of="cgroup")
    return found


def cgroup_memory_bytes(*, without_dropped: bool = False) -> tuple[int | None, int]:
    """The limit of this process's memory cgroup (v2 or v1) and what it uses; no limit is None. `without_dropped`: less
    the pages of files that have not been used lately.
    """
    places = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base = Path("/sys/fs/cgroup" + path)
                places.append((base / "memory.max", base / "memory.current"))
            elif "memory" in controllers.split(","):
                for root in ("/sys/fs/cgroup/memory" + path, "/sys/fs/cgroup/memory"):
                    places.append((Path(root) / "memory.limit_in_bytes", Path(root) / "memory.usage_in_bytes"))
    except OSError:
        return None, 0
    for limit_file, usage_file in places:
        try:
            text = limit_file.read_text().strip()
            if text != "max" and int(text) < 1 << 60:
                usage = int(usage_file.read_text())
                return int(text), usage - (_inactive_bytes(limit_file.parent) if without_dropped else 0)
        except (OSError, ValueError):
            continue
    return None, 0


def _inactive_bytes(cgroup: Path) -> int:
    values = dict(line.split(maxsplit=1) for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


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
