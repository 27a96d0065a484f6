"""Where a commit log's bytes lie, and how its files are made.

    <folder>/OFFLOAD_RT_STORE  lock     as a store's
             state.bin                  home drive  [record 0][record 1][body 0][body 1][ extents ... ]
                                        others      [ extents ... ]
                                        an extent   [ slot 0 ][ slot 1 ], each of its length
             log.json                   the layout; the same on every drive but for the drive's number

The home drive is the first. A log is complete when its home has a `log.json`, which is written last. Every byte was
written once by then, as zeros, and synced: an extent that is merely reserved becomes durable only with the file
system's next journal commit, which costs the first step, and may still be refused by a full drive. But what the first
commit is to hold is written once by that: whoever makes the log names it.
"""

from __future__ import annotations

import ctypes
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from offload_rt.checksum import crc32c
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError, StorageError, StoreCorrupt
from offload_rt.memory.arena import Arena, Slot
from offload_rt.storage.commit_record import (
    RECORD_BYTES,
    Record,
    RecordInvalid,
    Version,
    body_bytes,
    pack_body,
    unpack_body,
)
from offload_rt.storage.drive_files import (
    FolderLock,
    SealBroken,
    check_space,
    close_fenced,
    make_folder,
    open_fenced,
    preallocate,
    sealed,
    unsealed,
)
from offload_rt.storage.drives import tune
from offload_rt.storage.durable import os_error, sync_folder, write_atomically
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer

LOG_VERSION = 1
PAYLOAD_BYTES = 1 << 20
"""Default room for a payload: random number generators take 30 KB, schedulers and positions little."""
FILL_BYTES = 4 << 20
BUFFER_BYTES = 64 << 10
"""Through which a body is written and read, part by part: most payloads are smaller."""
LOG_BUFFER_BYTES = BUFFER_BYTES + RECORD_BYTES
"""The memory of a log that is open: a body's part, and a record, which need not wait for each other."""
_FILLS_IN_FLIGHT = 4


@dataclass(frozen=True, kw_only=True)
class MutableExtent:
    """State that is read and written whole: two slots of `length_bytes` on one drive."""

    name: str
    length_bytes: int
    """A multiple of 4096."""
    drive: int = 0
    offset_bytes: int = 0
    """Of slot 0 in the drive's file; slot 1 follows. Given by the layout."""

    def slot_offset(self, slot: int) -> int:
        return self.offset_bytes + slot * self.length_bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All places of a log. Never changes once the log is made."""

    log_id: str
    """32 hexadecimal digits."""
    num_drives: int
    body_capacity_bytes: int
    extents: tuple[MutableExtent, ...]

    def record_offset(self, place: int) -> int:
        """Of record 0 or 1 in the home drive's file."""
        return place * RECORD_BYTES

    def body_offset(self, place: int) -> int:
        return 2 * RECORD_BYTES + place * self.body_capacity_bytes

    def file_bytes(self) -> list[int]:
        """Length of each drive's file."""
        ends = [2 * (RECORD_BYTES + self.body_capacity_bytes)] + [0] * (self.num_drives - 1)
        for extent in self.extents:
            ends[extent.drive] = max(ends[extent.drive], extent.slot_offset(2))
        return ends

    @classmethod
    def of(cls, extents: Sequence[MutableExtent], *, num_drives: int, payload_bytes: int) -> Layout:
        """Lays the extents one behind the other on their drives. ConfigError names what cannot be laid."""
        names: set[str] = set()
        for extent in extents:
            if extent.length_bytes <= 0 or extent.length_bytes % IO_ALIGNMENT_BYTES:
                raise ConfigError(f"extent {extent.name}: {extent.length_bytes} bytes is no multiple of 4096")
            if not 0 <= extent.drive < num_drives:
                raise ConfigError(f"extent {extent.name}: drive {extent.drive} of {num_drives}")
            if extent.name in names:
                raise ConfigError(f"extent {extent.name}: given twice")
            names.add(extent.name)
        capacity = align_up(max(body_bytes(len(extents), payload_bytes), 1), IO_ALIGNMENT_BYTES)
        empty = cls(log_id=secrets.token_hex(16), num_drives=num_drives, body_capacity_bytes=capacity, extents=())
        ends, laid = empty.file_bytes(), []
        for extent in extents:
            laid.append(replace(extent, offset_bytes=ends[extent.drive]))
            ends[extent.drive] = laid[-1].slot_offset(2)
        return replace(empty, extents=tuple(laid))


def make_log(
    drives: Sequence[NvmePath],
    extents: Sequence[MutableExtent],
    links: Links,
    *,
    payload_bytes: int = PAYLOAD_BYTES,
    written_first: Collection[str] = (),
    zeros: Slot | None = None,
    buffer: Arena | None = None,
) -> None:
    """Makes a log whose extents are zero, committed as step 0 with an empty payload. Blocks until it is durable.

    `written_first` names extents that the caller writes before the first commit: their free slots are left to that.
    `zeros` is memory of whole pages that the caller lends, whose content is lost: what is written at a time, up to
    `FILL_BYTES`. `buffer` has `LOG_BUFFER_BYTES`. None, of either, takes memory that nobody has reserved.

    `drives` are the log's own folders, made if missing; `capacity_bytes` bounds each. `payload_bytes` is the most that
    a commit can carry besides. Raises `StorageFull` before the first byte, and ConfigError where a folder already holds
    a log, which is never overwritten. What a killed run left of making one is made again.
    """
    if not drives:
        raise ConfigError("a commit log needs at least one folder")
    layout = Layout.of(extents, num_drives=len(drives), payload_bytes=payload_bytes)
    folders = [drive.path for drive in drives]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"a commit log wants one folder per drive, got {', '.join(map(str, folders))}")
    locks: list[FolderLock] = []
    files: list[OpenFile] = []
    in_flight: deque[Transfer] = deque()
    try:
        for folder in folders:
            make_folder(folder)
            locks.append(FolderLock(folder))
        if read_layout(folders) is not None:
            raise ConfigError(f"{folders[0]} holds training state; remove it, or give another folder")
        for folder in folders:  # what a make that was cut off has left
            (folder / "log.json").unlink(missing_ok=True)
            sync_folder(folder)
        for drive, need_bytes in zip(drives, layout.file_bytes(), strict=True):
            (drive.path / "state.bin").unlink(missing_ok=True)  # a file that nothing in flight can reach, then
            free_bytes = shutil.disk_usage(drive.path).free
            check_space(
                "training state", drive.path, need_bytes, free_bytes=free_bytes, capacity_bytes=drive.capacity_bytes
            )
        for folder, file_bytes in zip(folders, layout.file_bytes(), strict=True):
            files.append(open_fenced(folder / "state.bin", 0.0))
            if file_bytes:
                preallocate(files[-1], file_bytes)
        for file in files:
            tune(file, links.io)
        if zeros is None:
            zeros = Arena("commit log zeros", FILL_BYTES).acquire(FILL_BYTES, "zeros")
        if buffer is None:
            buffer = Arena("commit log", LOG_BUFFER_BYTES)
        zeros = zeros.part(0, min(FILL_BYTES, zeros.num_bytes))
        _fill(layout, frozenset(written_first), files, links, in_flight, zeros, buffer)
        for folder in folders:
            sync_folder(folder)
            sync_folder(folder.parent)
        for number in reversed(range(len(folders))):
            _write_layout(layout, number, folders[number])
    finally:
        settle(in_flight)
        for file in files:
            close_fenced(file)
        for lock in locks:
            lock.close()


def read_layout(folders: Sequence[Path]) -> tuple[Layout, list[Path]] | None:
    """A log's layout, and its folders in the order of its drives. None where they hold none, or an unfinished one.

    Raises `StoreCorrupt` where a part is missing, damaged, or belongs to another log.
    """
    parts = {part[0]: (part[1], folder) for folder in folders if (part := _read_part(folder)) is not None}
    if not parts:
        return None
    layout = parts[min(parts)][0]
    for other, folder in parts.values():
        if other != layout:
            raise StoreCorrupt(f"{folder}: belongs to log {other.log_id}, not {layout.log_id}")
    in_order = [parts[drive][1] for drive in sorted(parts)]
    missing = [drive for drive in range(layout.num_drives) if drive not in parts]
    if missing == [0] and in_order == list(folders[1:]) and (folders[0] / "state.bin").exists():
        return None  # cut off before the home's part, which is written last
    if missing or len(folders) != layout.num_drives:
        raise StoreCorrupt(
            f"{', '.join(map(str, folders))}: log {layout.log_id} lies on {layout.num_drives} drives; "
            f"{f'missing: {missing}' if missing else f'{len(folders)} folders were given'}"
        )
    return layout, in_order


def folders_of_log(folder: Path, elsewhere: Sequence[Path]) -> tuple[list[Path], int]:
    """`folder` and those of `elsewhere` that hold other parts of the log there, and on how many drives it lies.

    Raises ConfigError where `folder` holds no part of one, `StoreCorrupt` where a part is damaged.
    """
    own = _read_part(folder)
    if own is None:
        raise ConfigError(f"{folder}: no commit log here")
    found = {own[0]: folder}
    for other in elsewhere:
        part = _read_part(other)
        if part is not None and part[1].log_id == own[1].log_id:
            found.setdefault(part[0], other)
    return list(found.values()), own[1].num_drives


def home_layout(folder: Path) -> Layout | None:
    """The layout of the log whose home is `folder`; None where it has no part of one, or another drive's.

    Raises `StoreCorrupt` where the part is damaged, `StorageError` where it cannot be read.
    """
    part = _read_part(folder)
    return None if part is None or part[0] else part[1]


def read_record(layout: Layout, place: int, read: Callable[[int, int], bytes]) -> tuple[Record, list[Version], bytes]:
    """Record 0 or 1 of a log, the versions of its extents, and its payload. `read` takes offset and length, in bytes.

    Raises `RecordInvalid`, and what `read` raises.
    """
    record = Record.unpack(read(layout.record_offset(place), RECORD_BYTES))
    if record.log_id.hex() != layout.log_id or record.num_extents != len(layout.extents):
        raise RecordInvalid(f"of log {record.log_id.hex()} with {record.num_extents} extents, not {layout.log_id}")
    if not body_bytes(record.num_extents, 0) <= record.body_bytes <= layout.body_capacity_bytes:
        raise RecordInvalid(f"a body of {record.body_bytes} bytes, where {layout.body_capacity_bytes} have room")
    versions, payload = unpack_body(record, read(layout.body_offset(place), record.body_bytes))
    if any(version.slot not in (0, 1) for version in versions):
        raise RecordInvalid("an extent in a slot that there is not")
    return record, versions, payload


def _read_part(folder: Path) -> tuple[int, Layout] | None:
    """Which drive of which log a folder is; None where it has no `log.json`."""
    path = folder / "log.json"
    try:
        body = unsealed(path.read_text())
        if body["version"] != LOG_VERSION:
            raise StoreCorrupt(f"{path}: written by another version of offload_rt ({body['version']})")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise os_error("cannot be read", path, error) from None
    except SealBroken as error:
        raise StoreCorrupt(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path}: not readable as a layout ({type(error).__name__}: {error})") from None
    extents = tuple(MutableExtent(**extent) for extent in body["layout"]["extents"])
    return body["drive"], Layout(**{**body["layout"], "extents": extents})


def _fill(
    layout: Layout,
    left_out: Collection[str],
    files: Sequence[OpenFile],
    links: Links,
    in_flight: deque[Transfer],
    zeros: Slot,
    buffer: Arena,
) -> None:
    """Writes every byte but slot 1 of the extents `left_out`: zeros, out of `zeros`, and on the home drive the first
    record, which nobody believes before `log.json`.
    """
    ctypes.memset((ctypes.c_char * zeros.num_bytes).from_buffer(zeros.buffer()), 0, zeros.num_bytes)
    for drive, (file, file_bytes) in enumerate(zip(files, layout.file_bytes(), strict=True)):
        holes = [
            (e.slot_offset(1), e.slot_offset(2)) for e in layout.extents if e.drive == drive and e.name in left_out
        ]
        begins = [0, *(end for _, end in holes)]
        ends = [*(begin for begin, _ in holes), file_bytes]
        for begin, end in zip(begins, ends, strict=True):  # extents lie in their order
            for offset in range(begin, end, zeros.num_bytes):
                if len(in_flight) == _FILLS_IN_FLIGHT:
                    links.wait(in_flight[0])
                    in_flight.popleft()
                in_flight.append(links.write(file, offset, zeros.part(0, min(zeros.num_bytes, end - offset))))
    finish(links, in_flight)
    lengths = {extent.length_bytes for extent in layout.extents}
    checksums = {length: _zeros_crc32c(length, zeros.buffer()) for length in lengths}
    body = pack_body([Version(slot=0, crc32c=checksums[extent.length_bytes]) for extent in layout.extents], b"")
    record = Record(
        log_id=bytes.fromhex(layout.log_id), sequence=0, step=0, num_extents=len(layout.extents),
        body_bytes=len(body), body_crc32c=crc32c(memoryview(body)),
    )  # fmt: skip
    for offset, data in ((layout.body_offset(0), body), (layout.record_offset(0), record.pack())):
        put(links, files[0], offset, data, buffer, in_flight)
    barrier(links, files, in_flight)


def put(links: Links, file: OpenFile, offset_bytes: int, data: bytes, arena: Arena, in_flight: deque[Transfer]) -> None:
    """Writes `data`, filled up to whole pages with zeros, and waits for it. See `finish` for `in_flight`."""
    if not data:
        return
    slot = arena.acquire(min(BUFFER_BYTES, align_up(len(data), IO_ALIGNMENT_BYTES)), "commit")
    for begin in range(0, len(data), slot.num_bytes):
        rest = len(data) - begin
        part = slot.part(0, min(slot.num_bytes, align_up(rest, IO_ALIGNMENT_BYTES)))
        part.buffer()[:] = data[begin : begin + part.num_bytes].ljust(part.num_bytes, b"\0")
        in_flight.append(links.write(file, offset_bytes + begin, part))
        finish(links, in_flight)


def get(
    links: Links, file: OpenFile, offset_bytes: int, num_bytes: int, arena: Arena, in_flight: deque[Transfer]
) -> bytes:
    """Reads what `put` has written. See `finish` for `in_flight`."""
    slot = arena.acquire(min(BUFFER_BYTES, align_up(num_bytes, IO_ALIGNMENT_BYTES)), "commit")
    found = bytearray()
    while len(found) < num_bytes:
        rest = num_bytes - len(found)
        part = slot.part(0, min(slot.num_bytes, align_up(rest, IO_ALIGNMENT_BYTES)))
        in_flight.append(links.read(file, offset_bytes + len(found), part))
        finish(links, in_flight)
        found += part.buffer()[:rest]
    return bytes(found)


def barrier(links: Links, files: Sequence[OpenFile], in_flight: deque[Transfer]) -> None:
    """Makes durable what was waited for: fdatasync on every file, all at once. Blocks."""
    in_flight.extend(links.sync(file) for file in files)
    finish(links, in_flight)


def finish(links: Links, in_flight: deque[Transfer]) -> None:
    """Waits for all of `in_flight`, in order. What failed or is late stays in it, with those behind it.

    So whoever owns the file settles `in_flight` before closing it: a write in flight goes to a descriptor's number, and
    once that is closed it is the next file's number.
    """
    while in_flight:
        links.wait(in_flight[0])
        in_flight.popleft()


def settle(in_flight: deque[Transfer]) -> None:
    """Waits for transfers whose outcome no longer matters. Raises `StorageTimeout` where one is still under way."""
    while in_flight:
        transfer = in_flight[0]
        with suppress(StorageError):
            transfer.wait()
        with suppress(ValueError):  # whoever waited for it as well took it away
            in_flight.remove(transfer)


def _zeros_crc32c(num_bytes: int, zeros: memoryview) -> int:
    checksum = 0
    for offset in range(0, num_bytes, len(zeros)):
        checksum = crc32c(zeros[: min(len(zeros), num_bytes - offset)], checksum)
    return checksum


def _write_layout(layout: Layout, drive: int, folder: Path) -> None:
    body = {"version": LOG_VERSION, "drive": drive, "layout": asdict(layout)}
    write_atomically(folder / "log.json", sealed(body))
