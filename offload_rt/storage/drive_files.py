"""Files and folders on a drive: made, opened, locked and sealed, for the store and for the commit log.

Nothing here reads or writes a tensor; that goes through `Links`.

[Note: lock lifetime]
io_uring does not take a killed process's direct writes back, and its end does not wait for them: a `lock` file is free
while the drive still writes (10 to 40 ms were seen for 64 MiB in flight). A request holds the open file that it writes
to, though, and an flock belongs to that open file, not to the process. So each `state.bin` is locked itself, through
the descriptor that is written through: whoever has got that lock knows that no earlier write is under way. Who is
collected without having been closed lets go of both by closing them, the file when its last write is over.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from offload_rt.errors import ConfigError, StorageError, StorageFull, StoreInUse
from offload_rt.storage.durable import os_error
from offload_rt.transfers import file_io
from offload_rt.transfers.file_io import Descriptor, OpenFile
from planners.errors import format_bytes

MARKER = "OFFLOAD_RT_STORE"
_POLL_SECONDS = 0.01


class FolderLock:
    """An exclusive flock on a store's `lock` file, held until closed, or collected, or until the process is gone."""

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            self._file = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise StorageError("the lock cannot be opened", path=str(path), errno=error.errno or 0) from None
        if not self._takes(path):
            holder = path.read_text().strip() or "unknown"
            if holder == _this_process():
                gc.collect()  # an engine that nobody closed, and nobody sees any more
            if not self._takes(path):
                self._file.close()
                raise StoreInUse(_in_use(folder, holder))
        try:
            os.ftruncate(self._file.fd, 0)
            os.pwrite(self._file.fd, f"{_this_process()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise os_error("the lock cannot be written", path, error) from None

    def _takes(self, path: Path) -> bool:
        """Takes the lock where it is free, and says whether."""
        try:
            fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            self._file.close()
            raise StorageError("cannot be locked", path=str(path), errno=error.errno or 0) from None
        return True

    def close(self) -> None:
        fcntl.flock(self._file.fd, fcntl.LOCK_UN)  # a forked child may hold the descriptor too, and the lock with it
        self._file.close()


def _in_use(folder: Path, holder: str) -> str:
    if holder == _this_process():
        return (
            f"{folder} is in use by an engine of this process ({holder}), which keeps it until engine.close(): "
            f"close that one first (`with offload_rt.engine(...)` does), or give nvme= another folder"
        )
    return f"{folder} is in use by another run ({holder}); wait for it to end, or give nvme= another folder"


def _this_process() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def make_folder(folder: Path) -> None:
    """Makes `folder` ours by a marker. ConfigError where it holds something and carries no marker."""
    try:
        folder.mkdir(exist_ok=True)
        marker = folder / MARKER
        if not marker.exists():
            if any(folder.iterdir()):
                raise ConfigError(f"nvme: {folder} exists, is not empty and carries no {MARKER}; it is not ours")
            marker.write_text("A store of offload_rt. Remove it with `offload-rt clean`.\n")
    except OSError as error:
        raise os_error("the store's folder cannot be made (read-only, or no permission?)", folder, error) from None


def preallocate(file: OpenFile, num_bytes: int) -> None:
    """Reserves the first `num_bytes` of `file`. Raises `StorageFull`."""
    try:
        os.posix_fallocate(file.fd, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            os.ftruncate(file.fd, num_bytes)  # a file system that cannot: a full drive shows up in the write
            return
        raise os_error(f"cannot preallocate {format_bytes(num_bytes)}", Path(file.path), error) from None


def open_file(path: Path, *, writable: bool) -> OpenFile:
    """As `file_io.open_file`, with an error that says what failed."""
    try:
        return file_io.open_file(path, writable=writable)
    except OSError as error:
        raise os_error("cannot be opened", path, error) from None


def open_fenced(path: Path, patience_seconds: float) -> OpenFile:
    """Opens `path` for writing once no write of an earlier process is under way. See [Note: lock lifetime].

    Blocks at most `patience_seconds`, then raises `StoreInUse`.
    """
    file = open_file(path, writable=True)
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                raise os_error("cannot be locked", path, error) from None
        if time.monotonic() >= deadline:
            file.close()
            raise StoreInUse(
                f"{path}: a process that is gone left writes under way, or a child that has the file open; "
                f"not free after {patience_seconds:g} s"
            )
        time.sleep(_POLL_SECONDS)


def close_fenced(file: OpenFile) -> None:
    """Gives the lock back, also where a forked child has the descriptor. Nothing may be in flight."""
    fcntl.flock(file.fd, fcntl.LOCK_UN)
    file.close()


def sealed(body: dict[str, Any]) -> bytes:
    """Plain values as JSON, with a checksum of them beside: what `unsealed` reads."""
    return json.dumps({"body": body, "sha256": _digest(body)}, indent=1).encode()


def unsealed(text: str) -> dict[str, Any]:
    """The values again. Raises `SealBroken`; ValueError, KeyError or TypeError for what `sealed` never made."""
    data: dict[str, Any] = json.loads(text)
    body: dict[str, Any] = data["body"]
    if data["sha256"] != _digest(body):
        raise SealBroken("does not match its own checksum")
    return body


class SealBroken(ValueError):
    """Sealed values are not those that were written."""


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_space(
    what: str, folder: Path, need_bytes: int, *, free_bytes: int, capacity_bytes: int | None = None
) -> None:
    """Raises `StorageFull` where `what` needs more than is free in `folder`, or than nvme= allows."""
    allowed_bytes = free_bytes if capacity_bytes is None else min(free_bytes, capacity_bytes)
    if need_bytes > allowed_bytes:
        raise StorageFull(
            f"{what} needs {format_bytes(need_bytes)}, {format_bytes(allowed_bytes)} are "
            f"{'free' if allowed_bytes == free_bytes else 'allowed by nvme='}; nothing was written",
            path=str(folder), errno=errno.ENOSPC,
        )  # fmt: skip
