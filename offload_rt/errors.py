"""What can go wrong, one class per cause, each carrying its evidence.

A user's mistake is a `ConfigError` (a `ValueError`); the world's failures have classes of their own. Every message
names what was asked, what was found and what to do. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import errno as errno_names
from collections.abc import Iterable

from planners.errors import PlanInfeasible as PlanInfeasible

_HINTS = {
    errno_names.EIO: "the drive or its connection is faulty; `dmesg` says more",
    errno_names.EROFS: "the file system is read-only, which it becomes when its drive fails; `dmesg` says more",
    errno_names.EACCES: "the folder or file is another user's",
    errno_names.EMFILE: "too many files are open; `ulimit -n` sets how many may be",
    errno_names.ENOSPC: "the drive is full; `offload-rt clean --nvme DIR` lists what no run uses",
    errno_names.EDQUOT: "this user's quota is used up; `offload-rt clean --nvme DIR` lists what no run uses",
    errno_names.ESTALE: "the network file system has lost the file",
    errno_names.ENODEV: "the drive is gone",
    errno_names.ENXIO: "the drive is gone",
}
"""What an error number means where weights and state are read and written."""


class OffloadError(Exception):
    """Base class of everything this library raises on purpose."""


class ConfigError(OffloadError, ValueError):
    """An argument is wrong: the message names the field, the value and what is allowed."""


class StorageError(OffloadError, OSError):
    """A read or write failed. Carries `path`, `offset`, `wanted`, `done` (bytes) and `errno`."""

    def __init__(
        self, message: str, *, path: str, offset: int = 0, wanted: int = 0, done: int = 0, errno: int = 0
    ) -> None:
        self.path = path
        self.offset = offset
        self.wanted = wanted
        self.done = done
        text = f"{path}: {message}"
        if wanted:
            text += f" ({done} of {wanted} bytes at offset {offset})"
        if errno:
            text += f" (errno {errno}, {errno_names.errorcode.get(errno, 'unknown')})"
        if errno in _HINTS:
            text += f": {_HINTS[errno]}"
        super().__init__(text)
        self.errno = errno


class StorageFull(StorageError):
    """There is not enough free space, or quota; found before the first byte is written where it can be."""


def storage_error(
    message: str, *, path: str, offset: int = 0, wanted: int = 0, done: int = 0, errno: int | None = 0
) -> StorageError:
    """A `StorageError`, or `StorageFull` where `errno` says that the drive or a quota is."""
    kind = StorageFull if errno in (errno_names.ENOSPC, errno_names.EDQUOT) else StorageError
    return kind(message, path=path, offset=offset, wanted=wanted, done=done, errno=errno or 0)


class StorageTimeout(OffloadError, TimeoutError):
    """An operation did not finish in time; the message lists what was outstanding."""


class StoreInUse(OffloadError):
    """Another process holds the store's lock."""


class RunInUse(OffloadError):
    """Another process trains into the run's folder."""


class StoreCorrupt(OffloadError):
    """What a store or a commit log has on the drive is not what was written there, or belongs to another one; the
    message names the file.
    """


class CheckpointError(OffloadError):
    """A checkpoint is missing, truncated, malformed, or does not fit the model."""


class CheckpointVerifyError(OffloadError):
    """What is read back is not what was written."""


class DataError(OffloadError, ValueError):
    """Training data are empty or malformed; the message names the file and the line."""


class BudgetExceeded(OffloadError, MemoryError):
    """A managed memory budget would be exceeded; the message says who holds it."""


class OutOfDeviceMemory(OffloadError, MemoryError):
    """A GPU has no room for what a plan puts there. Carries `wanted` and `free` (bytes); the message says who holds
    the rest.
    """

    def __init__(self, message: str, *, wanted: int, free: int) -> None:
        self.wanted = wanted
        self.free = free
        super().__init__(message)


class PinningRefused(OffloadError):
    """The GPU's driver would not lock host memory. Carries the driver's `code`."""

    def __init__(self, message: str, *, code: int) -> None:
        self.code = code
        super().__init__(message)


class UnsupportedModule(OffloadError):
    """A module does something that cannot be streamed correctly; the message names it."""


class TargetNotMatched(ConfigError):
    """An adapter names modules that the model does not have, or does not fit them."""


class QuantCoverageError(OffloadError):
    """`bits=4` would leave too large a share of the layers' frozen bytes unquantized."""


class IntegrityError(OffloadError):
    """Training would go wrong in silence: gradients are missing, all zero or not finite, or are of weights that have
    changed since the forward; or the optimizer's parameters are not the model's.
    """


class NonFiniteLoss(IntegrityError):
    """The loss is NaN or infinite."""


def again(error: Exception) -> Exception:
    """`error` anew, for who keeps one to raise it later: a raised one holds the frames that it went through, and these
    what they worked with.
    """
    kind = type(error)
    found = kind.__new__(kind, *error.args)
    found.args = error.args
    vars(found).update(vars(error))
    found.__cause__ = error.__cause__
    if isinstance(error, StorageError) and isinstance(found, StorageError):
        found.errno = error.errno
    return found


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Ends an error about an unknown name: the nearest match if there is one, otherwise all that is allowed."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"
