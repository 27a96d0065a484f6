"""Which file system a folder lies in, as the kernel tells it. No torch."""

from __future__ import annotations

from pathlib import Path


def file_system_of(folder: Path) -> tuple[str, str]:
    """Type and device of the file system that `folder` lies in."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    wanted = str(folder.resolve())
    best, found = -1, ("unknown file system", "an unknown device")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        # A later mount on the same point hides the earlier one.
        if inside and len(point) >= best:
            best, found = len(point), (after.split()[0], after.split()[1])
    return found
