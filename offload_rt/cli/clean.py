"""`offload-rt clean`: removes weight stores that no living process uses. It touches nothing without our marker.

A store is a folder DIR/offload_rt-<16 hex digits> that carries the file OFFLOAD_RT_STORE. Its lock is taken
before anything in it is removed, and the marker goes last, so that an interrupted removal can be done again.
Weights can be encoded again; training state cannot, so what holds the state of a run stays unless --state is given.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from offload_rt.config import parse_nvme
from offload_rt.errors import ConfigError, StorageError
from planners.errors import format_bytes

MARKER = "OFFLOAD_RT_STORE"
LOCK = "lock"
STATE = ("commit", "state.bin")
"""Training state: of adapters beside their weights, or of full fine-tuning in a folder of its own."""


@dataclass(frozen=True)
class FoundStore:
    """A folder with our marker."""

    path: Path
    num_bytes: int
    kept_because: str
    """Why it must stay; empty if it may go."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nvme",
        action="append",
        required=True,
        metavar="DIR",
        help="folder that stores lie in; once per drive",
    )
    parser.add_argument("--state", action="store_true", help="training state too: what was not saved elsewhere is lost")
    parser.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")


def run(arguments: argparse.Namespace) -> int:
    stores = []
    for drive in parse_nvme(arguments.nvme):
        if not drive.path.is_dir():
            raise ConfigError(f"--nvme: {drive.path} is not a folder")
        stores += find_stores(drive.path, with_state=arguments.state)
    if not stores:
        sys.stdout.write("no weight stores found\n")
        return 0
    unused = [store for store in stores if not store.kept_because]
    for store in stores:
        note = f"stays: {store.kept_because}" if store.kept_because else "unused"
        sys.stdout.write(f"{format_bytes(store.num_bytes):>10}  {store.path}  {note}\n")
    if not arguments.yes:
        total = format_bytes(sum(store.num_bytes for store in unused))
        sys.stdout.write(f"{len(unused)} unused, {total}; nothing was removed, --yes removes the unused ones\n")
        return 0
    removed = [store for store in unused if remove_store(store.path)]
    total = format_bytes(sum(store.num_bytes for store in removed))
    sys.stdout.write(f"removed {len(removed)} of {len(stores)}, {total}\n")
    return 0


def find_stores(folder: Path, *, with_state: bool = False) -> list[FoundStore]:
    """The stores directly below `folder`, by name. Those with training state may go only `with_state`."""
    found = []
    for entry in sorted(folder.iterdir()):
        is_store = re.fullmatch(r"offload_rt-[0-9a-f]{16}", entry.name) and not entry.is_symlink()
        if is_store and entry.is_dir() and (entry / MARKER).is_file():
            num_bytes = sum(path.lstat().st_blocks * 512 for path in entry.rglob("*") if not path.is_symlink())
            found.append(FoundStore(entry, num_bytes, _why_it_stays(entry, with_state=with_state)))
    return found


def remove_store(path: Path) -> bool:
    """Removes one store while holding its lock; False if a run has taken it meanwhile."""
    lock = _take_lock(path)
    if lock is None:
        return False
    try:
        for entry in path.iterdir():
            if entry.name in (MARKER, LOCK):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (path / MARKER).unlink()
        (path / LOCK).unlink()
        path.rmdir()
    except OSError as error:
        raise StorageError(f"cannot be removed: {error.strerror}", path=str(path), errno=error.errno or 0) from error
    finally:
        os.close(lock)
    return True


def _why_it_stays(path: Path, *, with_state: bool) -> str:
    if not (path / LOCK).is_file():
        return "it has no lock file, so whether it is in use cannot be told"
    try:
        lock = _take_lock(path)
    except StorageError as error:
        return str(error)
    if lock is None:
        holder = (path / LOCK).read_text(errors="replace").strip()
        return f"in use ({holder or 'holder unknown'})"
    os.close(lock)
    if not with_state and any((path / name).exists() for name in STATE):
        return "it holds the training state of a run; --state lets it go"
    return ""


def _take_lock(path: Path) -> int | None:
    """The descriptor that holds the lock, or None where somebody else does. Never creates the file."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StorageError(
            f"cannot be locked: {error.strerror}", path=str(path / LOCK), errno=error.errno or 0
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
