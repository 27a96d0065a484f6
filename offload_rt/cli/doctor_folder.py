"""`doctor`'s look at one folder: what it is, whether it can be read past the page cache, how fast. It tries, on a file.

The probe file is made inside the folder, has no name there where the file system allows that, and is gone
afterwards. The speeds are of a second each: an indication, not a measurement (`calibrate` measures).
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from offload_rt.native import native_core
from offload_rt.storage.mounts import doubts_about, file_system_of
from planners.errors import format_bytes

COMPARED_BYTES = 1 << 20
PROBE_BYTES = 64 << 20
REQUEST_BYTES = 4 << 20
PROBE_SECONDS = 1.0
"""Each way; a slow drive ends the probe early."""


def folder_lines(folder: Path) -> list[str]:
    """What was found about `folder`, a line a finding."""
    if not folder.is_dir():
        return [f"{folder}: is not a folder"]
    file_system, device = file_system_of(folder)
    space = os.statvfs(folder)
    free_bytes = space.f_bavail * space.f_frsize
    lines = [f"{folder}: {file_system} on {device}, {format_bytes(free_bytes)} free"]
    lines += doubts_about(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return [*lines, "not writable by this user"]
    if free_bytes < 2 * PROBE_BYTES:
        return [*lines, "too full to try reading and writing"]
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            direct = _try_direct(file.fileno(), lines)
            lines.append(_compare(file.fileno(), direct=direct))
            lines.append(_speed(file.fileno(), direct=direct))
        if direct:
            lines.append(_profile(folder))
    except OSError as error:
        lines.append(f"reading and writing failed: {error.strerror} (errno {error.errno})")
    return lines


def _try_direct(fd: int, lines: list[str]) -> bool:
    """Turns the page cache off for `fd`, and shows by a write that it worked."""
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as page:
            os.pwrite(fd, page, 0)
    except OSError as error:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        name = errno.errorcode.get(error.errno or 0, "unknown")
        lines.append(f"O_DIRECT: refused ({name}); reads go through the page cache, which is dropped behind them")
        return False
    return True


def _compare(fd: int, *, direct: bool) -> str:
    pattern = os.urandom(COMPARED_BYTES)
    # Anonymous maps begin at a page: aligned as O_DIRECT needs it.
    with mmap.mmap(-1, COMPARED_BYTES) as written, mmap.mmap(-1, COMPARED_BYTES) as read:
        written[:] = pattern
        _all(lambda at: os.pwritev(fd, [memoryview(written)[at:]], at), COMPARED_BYTES)
        os.fdatasync(fd)
        _all(lambda at: os.preadv(fd, [memoryview(read)[at:]], at), COMPARED_BYTES)
        same = read[:] == pattern
    name = "O_DIRECT" if direct else "buffered"
    return f"{name}: {format_bytes(COMPARED_BYTES)} written, read back" + (
        " and equal" if same else " and DIFFERENT: do not use this drive"
    )


def _speed(fd: int, *, direct: bool) -> str:
    with mmap.mmap(-1, REQUEST_BYTES) as buffer:
        buffer[:] = os.urandom(REQUEST_BYTES)  # zeros would flatter a drive that compresses

        def write(at: int) -> int:
            return os.pwrite(fd, buffer, at)

        written_bytes, write_seconds = _timed(write, PROBE_BYTES)
        begin = time.monotonic()
        os.fdatasync(fd)
        write_seconds += time.monotonic() - begin
        if not direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        def read(at: int) -> int:
            return os.preadv(fd, [buffer], at)

        read_bytes, read_seconds = _timed(read, written_bytes)
    return (
        f"short probe, one request of {format_bytes(REQUEST_BYTES)} at a time: "
        f"read {read_bytes / read_seconds / 1e9:.2f} GB/s, write {written_bytes / write_seconds / 1e9:.2f} GB/s"
    )


def _profile(folder: Path) -> str:
    """Measured now, whatever the cache says."""
    try:
        from offload_rt.storage.drives import probe
    except ImportError as error:  # torch, which the rest of this report does without
        return f"many requests at a time: not tried ({error})"
    core = native_core()
    if core is None:
        return "many requests at a time: not tried (no native core)"
    with core.Ring(depth=1) as ring:
        backend = ring.backend
    profile = probe(folder, backend)
    if not profile.read_bytes_per_second:
        return "many requests at a time: could not be tried"
    return (
        f"by {backend}, {profile.depth} requests of {format_bytes(profile.io_bytes)} at a time keep it busy: read "
        f"{profile.read_bytes_per_second / 1e9:.2f} GB/s, write {profile.write_bytes_per_second / 1e9:.2f} GB/s"
    )


def _timed(transfer: Callable[[int], int], limit_bytes: int) -> tuple[int, float]:
    begin = time.monotonic()
    done = 0
    while done < limit_bytes and time.monotonic() - begin < PROBE_SECONDS:
        done += _some(transfer(done))
    return done, max(time.monotonic() - begin, 1e-9)


def _all(transfer: Callable[[int], int], num_bytes: int) -> None:
    done = 0
    while done < num_bytes:
        done += _some(transfer(done))


def _some(num_bytes: int) -> int:
    if num_bytes <= 0:
        raise OSError(errno.EIO, "a transfer moved nothing")
    return num_bytes
