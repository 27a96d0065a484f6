"""Files and folders that are on the drive, with their names, when a call returns. No torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from offload_rt.errors import StorageError, storage_error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` so that a crash leaves the old or the new content, whole and durable. Raises `StorageError`, with
    nothing of the new content left where it could not be written: it would take up what is left of a full drive.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise os_error("cannot be written", path, error) from None


def make_folders(folder: Path) -> None:
    """Makes `folder` and those that it is in, as far as they are missing, so that their names are durable. Raises
    `OSError`, of which `StorageError` is one.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Makes names created in `folder` durable. Raises `StorageError`."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise os_error("the names in it cannot be made durable", folder, error) from None


def os_error(message: str, path: Path, error: OSError) -> StorageError:
    """`error` as one of ours: `StorageFull` where the drive or a quota is."""
    return storage_error(message, path=str(path), errno=error.errno)
