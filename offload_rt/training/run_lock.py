"""Who trains into a run's folder: one process at a time, by an flock on the folder's `lock` file. No torch.

The lock belongs to the open file, so that it is gone with its process, however that ends. A child that Python forks
closes the file: it keeps no lock of a run that was killed, and gives none back that is its parent's. What is started by
exec has never had it. The file says who holds the lock, for whoever is refused.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from offload_rt.errors import RunInUse, StorageError
from offload_rt.storage.durable import make_folders, os_error

logger = logging.getLogger("offload_rt")

LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer: some of networks, and some in user space."""


class RunLock:
    """An exclusive flock on `folder`'s lock file, held until closed, collected, or until the process is gone."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where it is missing. Raises `RunInUse` where somebody holds the lock, `StorageError`.

        A file system without locks is warned of, and nothing is kept from anybody there.
        """
        self._path = folder / LOCK
        self._made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
        self._fd = -1
        try:
            while not self._takes():
                pass
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{_this_process()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n".encode(), 0)
        except BaseException as error:
            self._close_file()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise os_error("cannot be made, and locked", self._path, error) from None
            raise
        _held.add(self)

    def _takes(self) -> bool:
        """Opens and locks the file; False where that was removed meanwhile, by who held it."""
        self._close_file()
        make_folders(self._path.parent)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if self._path.parent.exists():
                raise
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunInUse(self._refusal()) from None
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: its file system has no locks (%s): nothing keeps another run from training into the same folder, "
                "which would mix both",
                self._path.parent, errno.errorcode.get(error.errno or 0),
            )  # fmt: skip
        return self.place() == self._path.parent.absolute()

    def _refusal(self) -> str:
        """Why a lock that somebody holds is not to be had."""
        holder = os.pread(self._fd, 256, 0).decode(errors="replace").strip()
        text = f"{self._path.parent} is in use by a run that trains into it ({holder or 'which is just beginning'})"
        words = holder.split()
        if words[:1] == ["pid"] and words[3:4] == [socket.gethostname()] and not _lives(words[1]):
            text += "; no such process is here: one that it has started keeps the lock, or it is in another container"
        return f"{text}; wait for it to end, or give --out another folder"

    def place(self) -> Path | None:
        """Where the folder is now, which somebody may have moved; None where the lock was removed, alone or with it."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                return self._path.parent.absolute()
        except OSError:
            pass
        now = Path(os.readlink(f"/proc/self/fd/{self._fd}"))  # ends in " (deleted)" where it has no name
        return now.parent if now.exists() else None

    def close(self) -> None:
        """Gives the lock back, and removes the folder again where nothing came into it. May be called twice."""
        if self._fd < 0:
            return
        try:
            if self.place() == self._path.parent.absolute():
                self._path.unlink()  # who has it open meanwhile sees that: `_takes`
                for folder in self._made:
                    folder.rmdir()
        except OSError as error:
            logger.debug("%s: stays (%s)", error.filename, error.strerror)
        finally:
            self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self._close_file()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for lock in _held:
        lock._close_file()


os.register_at_fork(after_in_child=_leave_to_parent)


def _this_process() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _lives(pid: str) -> bool:
    return not pid.isdigit() or Path("/proc", pid).exists()
