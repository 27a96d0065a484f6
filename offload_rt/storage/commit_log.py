"""Mutable state at rest on NVMe: every change goes to a free slot, and a commit makes all changes real at once.

    step 7 committed           step 8 writes              commit(8)                  a kill before | after
    m  [ 7 ]*[ 6 ]             [ 7 ]*[ 8 ]                record: m in slot 1        7, whole      | 8, whole
    v  [ 6 ] [ 7 ]*            [ 8 ] [ 7 ]*                       v in slot 0

A commit is: every write has been waited for; the body is written (per extent which slot is real, and its checksum; and
the payload); fdatasync on every drive; one record that vouches for the body, in the older of two places; fdatasync of
that. Hence there is at every moment a valid record whose slots nothing has been written to since.

[Note: opening syncs] A record that is found may be one that a killed process had written and not yet synced. Built
upon, and then lost with the power, it would leave the record before it, whose slots had become free and were written
to. So opening syncs first, drops what the page cache holds (after a failed sync it may hold what the drive does not),
and reads then: what it finds is on the drive.

[Note: a failed commit] After fdatasync has failed once, a second one may succeed and mean nothing; and whether a record
whose write failed is on the drive, nobody knows. From there on the log refuses everything; opening it again reads what
became real.

What a layout is and how a log is made: `commit_layout`. The bytes of a record: `commit_record`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from offload_rt.checksum import crc32c
from offload_rt.errors import ConfigError, StorageError, StoreCorrupt, nearest
from offload_rt.memory.arena import WAIT_SECONDS, Arena, Slot
from offload_rt.storage.commit_layout import (
    LOG_BUFFER_BYTES,
    Layout,
    MutableExtent,
    barrier,
    get,
    put,
    read_layout,
    read_record,
    settle,
)
from offload_rt.storage.commit_record import Record, RecordInvalid, Version, body_bytes, pack_body
from offload_rt.storage.drive_files import FolderLock, close_fenced, open_fenced
from offload_rt.storage.drives import tune
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer, checked

logger = logging.getLogger("offload_rt")


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What is committed: a step, and whatever the caller gave with it."""

    step: int
    payload: bytes
    sequence: int
    """0 is a log that was just made; each commit adds one."""


@dataclass
class _Extent:
    """One extent's versions, and what is under way to and from its two slots."""

    place: MutableExtent
    file: OpenFile
    committed: Version
    newest: Version
    """`committed`, or what was written since."""
    writes: tuple[deque[Transfer], deque[Transfer]] = field(default_factory=lambda: (deque(), deque()))
    reads: tuple[deque[Transfer], deque[Transfer]] = field(default_factory=lambda: (deque(), deque()))


class CommitLog:
    """A log that `make_log` made, opened by one process. Owns its files and their locks until `close`.

    Reads and writes of different extents may come from different threads; `commit`, `drop` and `close` while no other
    call runs. Its own memory is `LOG_BUFFER_BYTES`, whatever a commit carries.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        links: Links,
        *,
        buffer: Arena | None = None,
        patience_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Opens the log in `folders`, one per drive in any order, at its newest commit.

        buffer: its memory, of `LOG_BUFFER_BYTES`, which `close` gives back; None: memory that nobody has reserved.

        Blocks until writes that a killed process left under way are over, at most `patience_seconds`. Raises
        `StoreInUse`, `StoreCorrupt` (with what is wrong with either record) and `StorageError`; ConfigError where there
        is no log.
        """
        self.ignored: str | None = None
        """What is wrong with the older record: the evidence of a commit that a kill or a power loss cut off."""
        self._links = links
        self._locks: list[FolderLock] = []
        self._files: list[OpenFile] = []
        self._extents: dict[str, _Extent] = {}
        self._in_flight: deque[Transfer] = deque()  # records, bodies and syncs
        self._refusal: str | None = None
        self._is_warned = False
        self._place = 0  # of the newest record
        found = read_layout(folders)
        if found is None:
            raise ConfigError(f"{', '.join(map(str, folders))}: no commit log here")
        self.layout: Layout = found[0]
        self.folders = tuple(found[1])
        """In the order of the layout's drives, the home first."""
        self._arena = Arena("commit log", LOG_BUFFER_BYTES) if buffer is None else buffer
        try:
            for folder, file_bytes in zip(found[1], self.layout.file_bytes(), strict=True):
                self._locks.append(FolderLock(folder))
                path = folder / "state.bin"
                size = path.stat().st_size if path.exists() else 0
                if size < file_bytes:
                    raise StoreCorrupt(f"{path}: {size} bytes, the layout needs {file_bytes}")
                self._files.append(open_fenced(path, patience_seconds))
                tune(self._files[-1], links.io)
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        return list(self._extents)

    def length_bytes(self, name: str) -> int:
        return self._extent(name).place.length_bytes

    @property
    def dirty(self) -> list[str]:
        """Extents that were written since the last commit or drop."""
        return [name for name, extent in self._extents.items() if extent.newest != extent.committed]

    def version(self, name: str) -> Version:
        """The committed version of an extent."""
        return self._extent(name).committed

    def committed_place(self, name: str) -> tuple[OpenFile, int]:
        """The file and offset that the committed content of an extent is at until the next commit, for cloning it."""
        extent = self._extent(name)
        return extent.file, extent.place.slot_offset(extent.committed.slot)

    def read(self, name: str, slot: Slot, *, committed: bool = False, begin_bytes: int = 0) -> Transfer:
        """Starts reading an extent into `slot`; waiting for it also verifies it, and may raise `StoreCorrupt`.

        From `begin_bytes` on, whole pages, where it was last written from there: then that is what can be verified.

        What is read is the newest content, written since the last commit or not; with `committed`, that of the last
        commit, from which a step can be done again. Blocks only while this content is still being written.
        """
        extent = self._extent(name)
        version = extent.committed if committed else extent.newest
        for write in extent.writes[version.slot]:
            self._links.wait(write)
        part = slot.part(0, extent.place.length_bytes - begin_bytes)
        arriving = self._links.read(extent.file, extent.place.slot_offset(version.slot) + begin_bytes, part)
        reads = extent.reads[version.slot]
        reads.append(arriving)
        return checked(
            arriving, part, partial(self._verify, extent, version), is_over=partial(_take_away, reads, arriving)
        )

    def write(self, name: str, slot: Slot, *, begin_bytes: int = 0) -> Transfer:
        """Starts writing `slot` to the extent's free slot on the drive. Computes its checksum before it returns.

        From `begin_bytes` on, whole pages: what is before is not part of the new content, and is not to be read.

        Blocks only while that slot is still in use: written before in the same step, or read from before the last
        commit. The transfer need not be waited for: `commit` does, and raises what it raised.
        """
        extent = self._extent(name)
        free = 1 - extent.committed.slot
        settle(extent.writes[free])
        settle(extent.reads[free])
        part = slot.part(0, extent.place.length_bytes - begin_bytes)
        version = Version(slot=free, crc32c=crc32c(part.buffer()))
        transfer = self._links.write(extent.file, extent.place.slot_offset(free) + begin_bytes, part)
        extent.writes[free].append(transfer)
        extent.newest = version
        return transfer

    def drop(self) -> None:
        """Forgets what was written since the last commit. Does not block: the next write to a slot waits for it."""
        self._check_usable()
        for extent in self._extents.values():
            extent.newest = extent.committed

    def commit(self, step: int, payload: bytes = b"") -> None:
        """Makes everything written since the last commit real, and durable, together with `step` and `payload`. Blocks.

        Raises what a write raised; then nothing is committed, and the extent can be written again or all be dropped.
        A failure after that refuses every further call, see [Note: a failed commit]. Files that somebody has removed
        hold what is written until this process ends, and nobody finds it: that is warned of once.
        """
        self._check_usable()
        self._warn_of_removed()
        length = body_bytes(len(self._extents), len(payload))
        if length > self.layout.body_capacity_bytes:
            room = self.layout.body_capacity_bytes - body_bytes(len(self._extents), 0)
            raise ConfigError(f"a commit carries a payload of {len(payload)} bytes; this log was made for {room}")
        if not 0 <= step < 1 << 64:
            raise ConfigError(f"step {step}: must be 0 or more")
        for extent in self._extents.values():
            if extent.newest != extent.committed:
                for write in extent.writes[extent.newest.slot]:
                    self._links.wait(write)
        self._refusal = f"the commit of step {step} failed half-way; open the log again to see whether it became real"
        self._write_record(Commit(step=step, payload=payload, sequence=self.committed.sequence + 1))
        self._refusal = None

    def close(self) -> None:
        """Waits for what is under way, then closes the files and gives the locks back. Nothing is committed.

        Raises `StorageTimeout` where something is still under way; then all stays as it is.
        """
        settle(self._in_flight)
        for extent in self._extents.values():
            for transfers in (*extent.writes, *extent.reads):
                settle(transfers)
        for file in self._files:
            close_fenced(file)
        for lock in self._locks:
            lock.close()
        self._files, self._locks = [], []
        self._arena.region.give_back()
        self._refusal = "the log is closed"

    def _warn_of_removed(self) -> None:
        removed = [file.path for file in self._files if os.fstat(file.fd).st_nlink == 0]
        if removed and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "%s was removed while training commits to it: what is committed there goes with this process; save a "
                "checkpoint in another folder", removed[0],
            )  # fmt: skip

    def _write_record(self, commit: Commit) -> None:
        home, place = self._files[0], 1 - self._place
        body = pack_body([extent.newest for extent in self._extents.values()], commit.payload)
        record = Record(
            log_id=bytes.fromhex(self.layout.log_id), sequence=commit.sequence, step=commit.step,
            num_extents=len(self._extents), body_bytes=len(body), body_crc32c=crc32c(memoryview(body)),
        )  # fmt: skip
        put(self._links, home, self.layout.body_offset(place), body, self._arena, self._in_flight)
        barrier(self._links, self._files, self._in_flight)
        put(self._links, home, self.layout.record_offset(place), record.pack(), self._arena, self._in_flight)
        barrier(self._links, [home], self._in_flight)
        self._place = place
        self.committed = commit
        for extent in self._extents.values():
            if extent.newest != extent.committed:
                self._forget_cached(extent, extent.newest)
                extent.committed = extent.newest

    def _recover(self) -> None:
        home = self._files[0]
        barrier(self._links, [home], self._in_flight)  # [Note: opening syncs]
        os.posix_fadvise(home.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found: dict[int, tuple[Record, list[Version], bytes]] = {}
        wrong: dict[int, str] = {}
        for place in (0, 1):
            try:
                found[place] = read_record(self.layout, place, self._get)
            except (RecordInvalid, StorageError) as error:  # a drive may refuse to read a sector that was torn
                wrong[place] = f"record {place}: {error}"
                settle(self._in_flight)
        if not found:
            raise StoreCorrupt(
                f"{home.path}: neither of the two commit records is valid: {'; '.join(wrong.values())}. "
                f"Training state of this run cannot be told; go back to a snapshot"
            )
        self._place = max(found, key=lambda place: found[place][0].sequence)
        record, versions, payload = found[self._place]
        if record.sequence > 0:  # before that, the other place was never written
            self.ignored = wrong.get(1 - self._place)
        for extent, version in zip(self.layout.extents, versions, strict=True):
            file = self._files[extent.drive]
            self._extents[extent.name] = _Extent(extent, file, committed=version, newest=version)
        self.committed = Commit(step=record.step, payload=payload, sequence=record.sequence)

    def _get(self, offset_bytes: int, num_bytes: int) -> bytes:
        return get(self._links, self._files[0], offset_bytes, num_bytes, self._arena, self._in_flight)

    def _extent(self, name: str) -> _Extent:
        self._check_usable()
        if name not in self._extents:
            raise ConfigError(f"extent {name!r}: not in this log; {nearest(name, self._extents)}")
        return self._extents[name]

    def _check_usable(self) -> None:
        if self._refusal is not None:
            raise StorageError(self._refusal, path=str(self._files[0].path if self._files else self.layout.log_id))

    def _verify(self, extent: _Extent, version: Version, slot: Slot) -> None:
        self._forget_cached(extent, version)
        found = crc32c(slot.buffer())
        if found != version.crc32c:
            place = extent.place
            raise StoreCorrupt(
                f"{extent.file.path}: extent {place.name}, slot {version.slot} at offset "
                f"{place.slot_offset(version.slot)}, {place.length_bytes} bytes: checksum {found:08x}, expected "
                f"{version.crc32c:08x} since step {self.committed.step}; go back to a snapshot"
            )

    def _forget_cached(self, extent: _Extent, version: Version) -> None:
        place = extent.place
        if not extent.file.direct:  # keep the page cache, which the budget does not know, from growing
            os.posix_fadvise(
                extent.file.fd, place.slot_offset(version.slot), place.length_bytes, os.POSIX_FADV_DONTNEED
            )


def _take_away(transfers: deque[Transfer], transfer: Transfer) -> None:
    with suppress(ValueError):  # a later write may have settled it
        transfers.remove(transfer)
