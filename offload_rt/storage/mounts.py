"""Which file system a folder lies in, on which drives, and what speaks against it, as the kernel tells it. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SYSFS = Path("/sys")
CPUINFO = Path("/proc/cpuinfo")
_IN_MEMORY = ("tmpfs", "ramfs")
_FROM_AFAR = ("nfs", "nfs4", "cifs", "smb3", "9p", "drvfs", "virtiofs", "ceph", "glusterfs", "lustre", "beegfs", "afs")
"""Of other machines, or of the one around this. WSL2 has Windows' drives by 9p."""


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


def doubts_about(folder: Path) -> list[str]:
    """Why `folder` may be no good place for weights and state, a sentence each; empty where nothing is known."""
    kind = file_system_of(folder)[0]
    if kind in _IN_MEMORY:
        return [f"{kind} is in memory, not on a drive: what is stored there takes up RAM, beside every budget"]
    if kind in _FROM_AFAR or kind.startswith("fuse"):
        return [f"{kind} is no drive's own file system: it is slow, and a commit as durable as what is behind it"]
    if kind == "overlay":
        return ["overlay is a container's own file system: what is stored there is lost with the container"]
    # Virtual drives say this of themselves or do not, whatever is behind them.
    spinning = [] if _in_virtual_machine() else rotating_drives(folder)
    return [f"drive {name} spins: an SSD is meant, this one is many times slower" for name in spinning]


def rotating_drives(folder: Path) -> list[str]:
    """Names of the drives below `folder`'s file system that the kernel takes for rotational ones, in order. Looks
    through partitions, device mapper (LVM, encryption) and RAID; empty where there is no drive, or none to be seen.
    """
    try:
        number = os.stat(folder).st_dev
        if not os.major(number):  # btrfs numbers its subvolumes itself
            number = os.stat(file_system_of(folder)[1]).st_rdev
    except OSError:
        return []
    device = SYSFS / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    return sorted({drive.name for drive in _drives_below(device) if _says(drive / "queue" / "rotational") == "1"})


def _in_virtual_machine() -> bool:
    """As processors of x86-64 tell; False where nothing does."""
    flags = (line.partition(":")[2].split() for line in _says(CPUINFO).splitlines() if line.startswith("flags"))
    return "hypervisor" in next(flags, [])


def _drives_below(device: Path) -> Iterator[Path]:
    """The folders in /sys/block of the drives that a block device is on, itself where it is on no other."""
    device = device.resolve()
    whole = device.parent if (device / "partition").exists() else device
    try:
        parts = sorted((whole / "slaves").iterdir())
    except OSError:
        parts = []
    for part in parts:
        yield from _drives_below(part)
    if not parts:
        yield whole


def _says(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
