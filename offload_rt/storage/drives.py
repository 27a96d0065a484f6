"""What keeps a drive busy, and how fast it is: a short probe on first use, remembered for the user.

The probe writes an unnamed file of at most 32 MiB into the folder and reads it in a few ways, within half a second.
It is an indication on a machine that may be doing other things: good enough to choose request sizes and to weigh
unequal drives, not a measurement to report. What was found is kept in the user's cache folder under the drive's
identity and measured again after a month, or when what is kept does not fit or cannot be read. A drive that cannot be
probed gets the defaults: it fails with its evidence when it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from offload_rt.cache import recall, remember
from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena
from offload_rt.native import native_core
from offload_rt.storage.mounts import file_system_of
from offload_rt.transfers.file_io import RING_DEPTH, FileIO, OpenFile, RingIO
from offload_rt.transfers.links import Links

FILE_BYTES = 32 << 20
OPERATION_BYTES = 8 << 20
PROBE_BYTES = 2 * OPERATION_BYTES
"""What a probe takes of memory."""
WRITE_SECONDS = 0.15
READ_SECONDS = 0.4
"""Bounds on a slow drive; a fast one is done sooner."""
NUM_PASSES = 2
CLOSE_ENOUGH = 0.95
"""Of the best speed: less may be chance."""
DRAIN_SECONDS = 0.05
"""What is needed at once waits behind what is in flight; within that, more of it wakes the ring less often."""
MAX_AGE_SECONDS = 30 * 24 * 3600.0
"""What was measured of a machine is measured again after a month: drives fill up, kernels and drivers change."""
MIB = 1 << 20
CANDIDATES = ((RING_DEPTH, MIB), (32, MIB), (16, MIB), (8, MIB), (8, 4 * MIB), (32, MIB // 2))
"""Requests in flight, and bytes of one."""


@dataclass(frozen=True, kw_only=True)
class DriveProfile:
    """How to ask one drive, and what it gave."""

    depth: int = RING_DEPTH
    """Requests in flight."""
    io_bytes: int = MIB
    """Length of one."""
    read_bytes_per_second: float = 0.0
    """Zero where it is not known."""
    write_bytes_per_second: float = 0.0

    @classmethod
    def from_json(cls, data: dict[str, object]) -> DriveProfile:
        """Raises `ValueError` for anything that `asdict` would not have made."""
        values: dict[str, int | float] = {}
        for field in fields(cls):
            value = data.get(field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
                raise ValueError(f"{field.name}: {value!r}")
            values[field.name] = value
        profile = cls(**values)  # type: ignore[arg-type]
        if (profile.depth, profile.io_bytes) not in CANDIDATES:
            raise ValueError(f"{profile.depth} requests of {profile.io_bytes} bytes")
        return profile


def drive_profile(folder: Path, io: FileIO) -> DriveProfile:
    """The profile of the drive that `folder` lies on, from the cache or by a probe, which blocks for half a second."""
    if not isinstance(io, RingIO):
        return DriveProfile()
    identity = drive_identity(folder, io.name)
    name = f"drive-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    profile = _remembered(name, identity)
    if profile is None:
        profile = probe(folder, io.name)
        if profile.read_bytes_per_second:
            remember(name, {"identity": identity, "measured": time.time(), "profile": asdict(profile)})
    return profile


def tune(file: OpenFile, io: FileIO) -> None:
    """Tells `io` what keeps the drive busy that `file` lies on. Blocks for a probe, where there has been none."""
    profile = drive_profile(Path(file.path).parent, io)
    io.tune(file, profile.depth, profile.io_bytes)


def drive_identity(folder: Path, backend: str) -> dict[str, str]:
    """What a profile is good for: the drive, its file system, the kernel, and how files are read."""
    number = os.stat(folder).st_dev
    device = Path("/sys/dev/block") / f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError):
        device = device.resolve(strict=True)
    whole = device.parent if (device / "partition").exists() else device
    found = {
        name: _text(whole / name) for name in ("size", "serial", "wwid", "device/model", "device/serial", "device/wwid")
    }
    file_system, source = file_system_of(folder)
    return {
        **{name: text for name, text in found.items() if text},
        "number": f"{os.major(number)}:{os.minor(number)}",
        "file_system": file_system,
        "source": source,
        "kernel": platform.release(),
        "backend": backend,
    }


def probe(folder: Path, backend: str) -> DriveProfile:
    """Measures. The defaults, without speeds, where the drive is full, fails, or refuses O_DIRECT."""
    links: Links | None = None
    try:
        space = os.statvfs(folder)
        if space.f_bavail * space.f_frsize < 4 * FILE_BYTES:
            return DriveProfile()
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
            fcntl.fcntl(file.fileno(), fcntl.F_SETFL, fcntl.fcntl(file.fileno(), fcntl.F_GETFL) | os.O_DIRECT)
            links = Links(io=RingIO(native_core(), backend))
            try:
                return _measure(links, OpenFile(f"probe in {folder}", file.fileno(), True))
            finally:
                links.close()
    except (OSError, OffloadError):
        return DriveProfile()


def _measure(links: Links, file: OpenFile) -> DriveProfile:
    arena = Arena("drive probe", PROBE_BYTES)
    slots = [arena.acquire(OPERATION_BYTES, "drive probe") for _ in range(2)]
    noise = os.urandom(MIB)  # zeros would flatter a drive that compresses
    for slot in slots:
        slot.buffer()[:] = noise * (OPERATION_BYTES // MIB)

    written, begin = 0, time.perf_counter()
    while written < FILE_BYTES and (written == 0 or time.perf_counter() - begin < WRITE_SECONDS):
        transfers = [links.write(file, written + i * OPERATION_BYTES, slot) for i, slot in enumerate(slots)]
        for transfer in transfers:
            transfer.wait()
        written += len(slots) * OPERATION_BYTES
    os.fdatasync(file.fd)
    write_speed = written / (time.perf_counter() - begin)

    speeds: dict[tuple[int, int], float] = {}
    begin = time.perf_counter()
    for _ in range(NUM_PASSES):
        for candidate in CANDIDATES:
            if speeds and time.perf_counter() - begin > READ_SECONDS:
                break
            links.io.tune(file, *candidate)
            start = time.perf_counter()
            # Several reads land in one slot at once: nobody looks at what comes.
            offsets = range(0, written, OPERATION_BYTES)
            for transfer in [links.read(file, at, slots[n % 2]) for n, at in enumerate(offsets)]:
                transfer.wait()
            speed = written / (time.perf_counter() - start)
            speeds[candidate] = max(speed, speeds.get(candidate, 0.0))
    depth, io_bytes = choose(speeds)
    return DriveProfile(
        depth=depth, io_bytes=io_bytes, read_bytes_per_second=speeds[depth, io_bytes],
        write_bytes_per_second=write_speed,
    )  # fmt: skip


def choose(speeds: dict[tuple[int, int], float]) -> tuple[int, int]:
    """Of the candidates that are close to the best: the most bytes in flight that are read within `DRAIN_SECONDS`, or
    the fewest where none is; of equals the longest requests.
    """
    best = max(speeds.values())
    enough = [candidate for candidate, speed in speeds.items() if speed >= CLOSE_ENOUGH * best]
    quick = [candidate for candidate in enough if candidate[0] * candidate[1] <= DRAIN_SECONDS * best]
    if quick:
        return max(quick, key=lambda candidate: (candidate[0] * candidate[1], candidate[1]))
    return min(enough, key=lambda candidate: (candidate[0] * candidate[1], -candidate[1]))


def _remembered(name: str, identity: dict[str, str]) -> DriveProfile | None:
    data = recall(name)
    try:
        if data is None or data["identity"] != identity or not 0 <= time.time() - data["measured"] <= MAX_AGE_SECONDS:
            return None
        return DriveProfile.from_json(data["profile"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def drive_weights(profiles: Sequence[DriveProfile]) -> list[float]:
    """By how much each drive should hold more than another; equal where any speed is unknown."""
    speeds = [profile.read_bytes_per_second for profile in profiles]
    return speeds if all(speeds) else [1.0] * len(speeds)
