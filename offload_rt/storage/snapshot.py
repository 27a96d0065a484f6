"""A commit in a folder of its own: by extent name, free of drives and plans, so that a run resumes from it anywhere.

    <folder>/state.bin       the committed extents, one behind the other
             payload.bin     what was committed with them
             ...             what the caller says about the extents
             manifest.json   step; per extent name, offset, length, CRC32C; written last

A log's file is written in place, so a hard link to it would change under the snapshot. Where the file system can clone
ranges (FICLONERANGE: XFS, btrfs, bcachefs) the extents are cloned, which takes neither room nor time; elsewhere they
are copied, through two slots of the largest one's size. The folder is made under another name and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from offload_rt.checksum import crc32c
from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError, StorageError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.storage.commit_layout import barrier, finish, settle
from offload_rt.storage.commit_log import Commit, CommitLog
from offload_rt.storage.commit_record import Version
from offload_rt.storage.drive_files import SealBroken, check_space, open_file, sealed, unsealed
from offload_rt.storage.durable import make_folders, os_error, sync_folder, write_atomically
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer

SNAPSHOT_VERSION = 1
_MARGIN_BYTES = 1 << 20
_FICLONERANGE = 0x4020940D
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


class SnapshotLog(Protocol):
    """What a snapshot needs of a commit log, or of memory that stands for one."""

    committed: Commit

    @property
    def names(self) -> list[str]: ...
    def length_bytes(self, name: str) -> int: ...
    def version(self, name: str) -> Version: ...
    def committed_place(self, name: str) -> tuple[OpenFile, int] | None: ...
    def read(self, name: str, slot: Slot, *, committed: bool = False) -> Transfer: ...
    def write(self, name: str, slot: Slot) -> Transfer: ...
    def drop(self) -> None: ...


def save_snapshot(
    log: SnapshotLog,
    folder: Path,
    links: Links,
    *,
    names: Callable[[str], bool] = lambda name: True,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    """Saves what `log` has committed to `folder`, which must not exist. Blocks until it is durable.

    `names` says which extents are part of it, `beside` has further files by name. Returns how many bytes were copied;
    the others were cloned. What was written since the commit is not part of it, and nothing may be committed meanwhile.
    Raises `StorageFull` before the first byte, and `StoreCorrupt` where an extent that is copied does not match its
    checksum (one that is cloned is verified when it is loaded).
    """
    folder = folder.absolute()
    if folder.exists():
        raise ConfigError(f"{folder} exists; a snapshot is not written over anything")
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        make_folders(folder.parent)
        partial.mkdir()
        for name, content in beside.items():
            write_atomically(partial / name, content)
        copied_bytes = _save(log, partial, links, [name for name in log.names if names(name)])
        os.rename(partial, folder)
        sync_folder(folder.parent)
    except StorageError:
        raise
    except OSError as error:
        raise os_error("cannot be written", folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copied_bytes


def read_payload(folder: Path) -> tuple[int, bytes]:
    """The step of the snapshot in `folder`, and what was committed with it. Raises as `load_snapshot` does."""
    body = read_manifest(folder)
    try:
        payload = (folder / "payload.bin").read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder}: payload.bin cannot be read ({error})") from None
    _verify(folder / "payload.bin", memoryview(payload), body["payload_crc32c"])
    return int(body["step"]), payload


def load_snapshot(
    folder: Path, log: SnapshotLog, links: Links, *, names: Callable[[str], bool] = lambda name: True
) -> tuple[int, bytes]:
    """Writes the snapshot in `folder` into `log`; the caller commits, with the step and payload returned. Blocks.

    Of the extents that `names` takes, the log holds the same, by name and length, wherever they lie. Until the commit
    it is what it was. Raises `CheckpointError` where something is missing or does not fit, `CheckpointVerifyError`
    where bytes have changed; then everything written is dropped.
    """
    body = read_manifest(folder)
    found = read_payload(folder)
    saved = {extent["name"]: extent for extent in body["extents"]}
    here = {name: log.length_bytes(name) for name in log.names if names(name)}
    _check_same(folder, {name: extent["length_bytes"] for name, extent in saved.items()}, here)
    if not (folder / "state.bin").is_file():
        raise CheckpointError(f"{folder}: state.bin is missing")
    file = open_file(folder / "state.bin", writable=False)
    reads: deque[Transfer] = deque()

    def read(name: str, slot: Slot) -> None:
        reads.append(links.read(file, saved[name]["offset_bytes"], slot))
        finish(links, reads)
        _verify(folder / "state.bin", slot.buffer(), saved[name]["crc32c"])

    try:
        _bring(log, {name: here[name] for name in saved}, links, read)
    finally:
        settle(reads)
        file.close()
    return found


def copy_commit(
    folder: Path, source: CommitLog, log: SnapshotLog, links: Links, *, names: Callable[[str], bool]
) -> None:
    """Writes what the log in `folder` has committed into `log`, as `load_snapshot` does a snapshot. Blocks.

    Raises `CheckpointError` where they hold other extents, `StoreCorrupt` where bytes have changed.
    """
    here = {name: log.length_bytes(name) for name in log.names if names(name)}
    there = {name: source.length_bytes(name) for name in source.names if names(name)}
    _check_same(folder, there, here)
    _bring(log, here, links, lambda name, slot: links.wait(source.read(name, slot, committed=True)))


def _check_same(folder: Path, there: Mapping[str, int], here: Mapping[str, int]) -> None:
    odd = set(there.items()) ^ set(here.items())
    if odd:
        raise CheckpointError(f"{folder}: holds other extents than this run, first: {min(odd)} ({len(odd)} differ)")


def _bring(log: SnapshotLog, lengths: Mapping[str, int], links: Links, read: Callable[[str, Slot], None]) -> None:
    """Writes extents into `log` that `read` brings, one while the one before it is written. Drops all if one fails."""
    log.drop()
    largest = max(lengths.values(), default=0)
    arena = Arena("snapshot", 2 * largest)
    writes: deque[Transfer] = deque()  # the log owns them too
    try:
        for name, num_bytes in lengths.items():
            slot = arena.acquire(largest, name).part(0, num_bytes)
            read(name, slot)
            finish(links, writes)
            writes.append(log.write(name, slot))
            del slot
        finish(links, writes)
    except BaseException:
        log.drop()
        raise


def _save(log: SnapshotLog, folder: Path, links: Links, names: list[str]) -> int:
    extents: list[dict[str, Any]] = []
    offset = 0
    for name in names:
        length = log.length_bytes(name)
        extents.append(
            {"name": name, "offset_bytes": offset, "length_bytes": length, "crc32c": log.version(name).crc32c}
        )
        offset += length
    file = open_file(folder / "state.bin", writable=True)
    in_flight: deque[Transfer] = deque()
    try:
        copied = [extent for extent in extents if not _clone(log, extent, file)]
        copied_bytes = sum(int(extent["length_bytes"]) for extent in copied)
        need_bytes = copied_bytes + len(log.committed.payload) + _MARGIN_BYTES
        check_space("a snapshot", folder, need_bytes, free_bytes=shutil.disk_usage(folder).free)
        _copy(log, copied, file, links, in_flight)
        barrier(links, [file], in_flight)
    finally:
        settle(in_flight)
        file.close()
    body = {
        "version": SNAPSHOT_VERSION, "step": log.committed.step, "extents": extents,
        "payload_crc32c": crc32c(memoryview(log.committed.payload)),
    }  # fmt: skip
    write_atomically(folder / "payload.bin", log.committed.payload)
    write_atomically(folder / "manifest.json", sealed(body))
    return copied_bytes


def _clone(log: SnapshotLog, extent: dict[str, Any], file: OpenFile) -> bool:
    """Shares an extent's bytes with the snapshot. False where the file system, or the pair of them, cannot."""
    place = log.committed_place(extent["name"])
    if place is None:
        return False
    source, offset = place
    request = struct.pack("=qQQQ", source.fd, offset, extent["length_bytes"], extent["offset_bytes"])
    try:
        fcntl.ioctl(file.fd, _FICLONERANGE, request)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise os_error("cannot be cloned", Path(file.path), error) from None
    return True


def _copy(
    log: SnapshotLog, extents: list[dict[str, Any]], file: OpenFile, links: Links, in_flight: deque[Transfer]
) -> None:
    """Copies through two slots: one extent is read while the one before it is written."""
    largest = max((extent["length_bytes"] for extent in extents), default=0)
    arena = Arena("snapshot", 2 * largest)
    for extent in extents:
        slot = arena.acquire(largest, extent["name"]).part(0, extent["length_bytes"])
        links.wait(log.read(extent["name"], slot, committed=True))
        finish(links, in_flight)
        in_flight.append(links.write(file, extent["offset_bytes"], slot))
        del slot
    finish(links, in_flight)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked body of the snapshot's manifest: `step`, `extents`, `payload_crc32c`. Raises as `load_snapshot`."""
    path = folder / "manifest.json"
    try:
        body = unsealed(path.read_text())
        if body["version"] != SNAPSHOT_VERSION:
            raise CheckpointError(f"{path}: written by another version of offload_rt ({body['version']})")
    except OSError as error:
        raise CheckpointError(f"{folder}: there is no snapshot ({error})") from None
    except SealBroken as error:
        raise CheckpointVerifyError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a manifest ({type(error).__name__}: {error})") from None
    return body


def _verify(path: Path, data: memoryview, expected: int) -> None:
    found = crc32c(data)
    if found != expected:
        raise CheckpointVerifyError(f"{path}: {len(data)} bytes with checksum {found:08x}, expected {expected:08x}")
