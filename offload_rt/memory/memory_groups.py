"""What limits the memory of this process besides the machine's RAM: its control groups and their parents, v1 and v2.

Each of them may have a limit of its own, and counts what all processes in it use, the pages of files that they have
read or written among it. The kernel drops those before it kills somebody: all but what is mapped, code first of all,
which is not counted on. Neither torch nor anything that takes long is imported here: `doctor` asks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
"""Version 1 says "no limit" by a number near 2**63."""


@dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """One that has a limit."""

    limit_bytes: int
    used_bytes: int
    """Less the pages of files that the kernel would drop."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def memory_groups(
    *, proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[MemoryGroup]:
    """Those over this process; none where nothing can be read."""
    for line in _text(proc).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, limit_name, used_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container's namespace the path may not exist; its root is then the group.
        folder = base / group.lstrip("/")
        while True:
            limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
            if limit.isdigit() and int(limit) < _UNLIMITED_BYTES:
                used_bytes = max(0, int(used or 0) - _dropped_bytes(folder))
                yield MemoryGroup(limit_bytes=int(limit), used_bytes=used_bytes)
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _dropped_bytes(folder: Path) -> int:
    lines = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    values = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}

    def of(name: str) -> int:
        return values.get(f"total_{name}", values.get(name, 0))  # with its children: version 1, 2

    return max(0, of("active_file") + of("inactive_file") - max(of("mapped_file"), of("file_mapped")))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
