"""A folder that is written whole or not at all: made beside its place under another name, synced, and renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from offload_rt.errors import ConfigError, OffloadError, StorageFull, storage_error
from offload_rt.storage.durable import make_folders, sync_folder
from planners.errors import format_bytes


@contextlib.contextmanager
def replaced_whole(
    folder: Path,
    need_bytes: int,
    *,
    what: str,
    is_ours: Callable[[str], object] = lambda name: False,
    one_by_one: bool = False,
) -> Iterator[Path]:
    """Yields an empty folder to write to; it takes the place of `folder` where the body ends without an error.

    Until then what was there is whole. Of it, files that are not `is_ours` by their names, and that the body did not
    write, stay, also those that came meanwhile. The body syncs the files that it writes. A link stays one: the folder
    that it leads to is replaced, on its drive. Raises `ConfigError` where `folder` is a file or holds a folder, which
    would be gone; with `one_by_one` files take their places one by one, each whole, where that is so, and wherever else
    the folder itself cannot be replaced. Raises `StorageFull` before the first byte where `need_bytes` are not free;
    and gives the body's own failures to write as `StorageError`.
    """
    folder = Path(os.path.realpath(folder))
    _staying(folder, what, is_ours, beside_folders=one_by_one)
    place = folder if one_by_one and _has_to_stay(folder) else folder.parent
    partial = place / f".{folder.name}.partial-{os.getpid()}"
    try:
        make_folders(folder.parent)
        _tidy(folder)
        free = shutil.disk_usage(place).free
        if free < need_bytes:
            raise StorageFull(
                f"{what} needs {format_bytes(need_bytes)}, {format_bytes(free)} are free", path=str(folder)
            )
        partial.mkdir()
        yield partial
        # Now: it may have been put back, and others write to it.
        staying = _staying(folder, what, is_ours, beside_folders=one_by_one)
        if place == folder or any(map(_is_folder, staying)):
            _put_files(partial, folder)
        else:
            for path in staying:
                if not os.path.lexists(partial / path.name):
                    _keep(path, partial / path.name)
            if folder.exists():
                shutil.copymode(folder, partial)
            sync_folder(partial)
            _put_in_place(partial, folder, one_by_one=one_by_one)
    except BaseException as error:  # Ctrl-C, too, leaves nothing
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors and torch report a full drive in classes of their own.
        if isinstance(error, OffloadError) or not isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise
        code = error.errno if isinstance(error, OSError) else None
        raise storage_error(f"{what} could not be written: {error}", path=str(folder), errno=code) from None


def _has_to_stay(folder: Path) -> bool:
    """Whether another folder cannot take its name, or somebody would be left in the old one."""
    if not folder.is_dir():
        return False
    is_ours = os.access(folder.parent, os.W_OK | os.X_OK)
    return not is_ours or os.path.ismount(folder) or folder.samefile(os.curdir)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _staying(folder: Path, what: str, is_ours: Callable[[str], object], *, beside_folders: bool) -> list[Path]:
    """What in `folder` is somebody else's. ConfigError where it is no place for a folder of files."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder for {what}")
    for entry in folder.iterdir():
        if _is_folder(entry) and not beside_folders:
            raise ConfigError(f"{folder} holds a folder, {entry.name}; give {what} a folder of its own")
    return [entry for entry in folder.iterdir() if not is_ours(entry.name)]


def _keep(path: Path, place: Path) -> None:
    """Has the file `path` at `place` too: by another name, or copied where there is none to be had."""
    try:
        os.link(path, place, follow_symlinks=False)
    except OSError as error:
        # A file system without links, or one that refuses them for the files of other users.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copy2(path, place, follow_symlinks=False)
        if not place.is_symlink():
            with open(place, "rb") as copied:
                os.fsync(copied.fileno())


def _tidy(folder: Path) -> None:
    """Takes away what saves that were cut off left in `folder` and beside it, and puts one back that had been moved."""
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.old-*"):
        if not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)
    for where in (folder, folder.parent):
        for partial in where.glob(f".{glob.escape(folder.name)}.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)


def _put_files(partial: Path, folder: Path) -> None:
    """Moves the files of `partial` to `folder`, each in one step; those of its folders to folders of that name."""
    for path in sorted(partial.iterdir()):
        if _is_folder(path):
            (folder / path.name).mkdir(exist_ok=True)
            _put_files(path, folder / path.name)
        else:
            os.replace(path, folder / path.name)
    sync_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, *, one_by_one: bool) -> None:
    """Gives `partial` the name `folder`. What had it is whole until then, and gone afterwards."""
    if not folder.exists():
        os.rename(partial, folder)
    elif _exchange(partial, folder):
        pass
    elif one_by_one:
        _put_files(partial, folder)
        return
    else:
        # A file system that cannot exchange names: for an instant the old one lies beside its place, see _tidy.
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        try:
            os.rename(folder, old)
            os.rename(partial, folder)
        finally:
            if not folder.exists():
                os.rename(old, folder)
        partial = old
    sync_folder(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, by `renameat2`. False where the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_current_folder, exchange = -100, 2
    done: int = renameat2(at_current_folder, os.fsencode(one), at_current_folder, os.fsencode(other), exchange)
    return done == 0
