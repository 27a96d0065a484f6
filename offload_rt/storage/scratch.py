"""Room on NVMe for what lives shorter than a step, such as layer inputs: written, read back, never durable.

What comes back is held against the checksum of what was written: another activation would be a wrong gradient.
One unlinked file per run: the kernel takes it away with the process, however that ends. Ranges are handed out
first-fit and return themselves with their `ScratchRange`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from functools import partial
from pathlib import Path

from offload_rt.checksum import crc32c
from offload_rt.errors import OffloadError, StorageError, StorageFull, StorageTimeout, StoreCorrupt
from offload_rt.memory.arena import Slot
from offload_rt.storage.drive_files import open_file, preallocate
from offload_rt.storage.drives import tune
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer, checked
from planners.errors import format_bytes


class ScratchRange:
    """A lease of [offset_bytes, offset_bytes + num_bytes) of the scratch file. What it has begun holds no lease of it:
    it may be let go of while it is written or read, by any thread and inside any allocation.
    """

    def __init__(self, scratch: Scratch, offset_bytes: int, num_bytes: int) -> None:
        self._scratch = scratch
        self.offset_bytes = offset_bytes
        self.num_bytes = num_bytes
        self._begun: list[Transfer] = []
        """Those that may be under way."""
        self._crc32c: int | None = None
        """Of what was written last."""

    def write(self, slot: Slot) -> Transfer:
        """Starts writing all of it. Computes the checksum before it returns."""
        part = slot.part(0, self.num_bytes)
        self._crc32c = crc32c(part.buffer())
        return self._began(self._scratch.links.write(self._scratch.file, self.offset_bytes, part))

    def read(self, slot: Slot) -> Transfer:
        """Starts reading all of it. The wait raises `StoreCorrupt` where this is not what was written."""
        part = slot.part(0, self.num_bytes)
        arriving = self._scratch.links.read(self._scratch.file, self.offset_bytes, part)
        place = f"{self._scratch.file.path}: scratch at offset {self.offset_bytes}, {self.num_bytes} bytes"
        return self._began(checked(arriving, part, partial(_verify, place, self._crc32c)))

    def _began(self, transfer: Transfer) -> Transfer:
        self._begun = [earlier for earlier in self._begun if not earlier.was_waited_for] + [transfer]
        return transfer

    def __del__(self) -> None:
        # Waits for nothing, and takes no lock: this thread may hold that lock, or be the one that is waited for.
        end_bytes = self.offset_bytes + self.num_bytes
        self._scratch.returned.append((self.offset_bytes, end_bytes, tuple(self._begun)))


def _verify(place: str, expected: int | None, slot: Slot) -> None:
    if expected is not None and (found := crc32c(slot.buffer())) != expected:
        raise StoreCorrupt(
            f"{place}: checksum {found:08x}, {expected:08x} was written; the drive, or its link, gives other bytes back"
        )


class Scratch:
    """A file of at most `capacity_bytes` in `folder`. Ranges may be let go of by any thread; all else is for one."""

    def __init__(self, folder: Path, capacity_bytes: int, links: Links) -> None:
        self.links = links
        self.capacity_bytes = align_up(capacity_bytes, IO_ALIGNMENT_BYTES)
        self.returned: deque[tuple[int, int, tuple[Transfer, ...]]] = deque()
        """Ranges that were let go of, by finalizers, which may run at any time; and what may be under way there."""
        self._free: list[tuple[int, int]] = [(0, self.capacity_bytes)]
        try:
            fd, path = tempfile.mkstemp(prefix="scratch-", dir=folder)
        except OSError as error:
            raise StorageError("no scratch file can be made", path=str(folder), errno=error.errno or 0) from None
        os.close(fd)
        try:
            self.file = open_file(Path(path), writable=True)
            try:
                preallocate(self.file, self.capacity_bytes)
            except StorageError:
                self.file.close()
                raise
            tune(self.file, links.io)
        finally:
            os.unlink(path)

    def acquire(self, num_bytes: int) -> ScratchRange:
        """A range of `num_bytes`, rounded up to 4 KiB. Blocks as `take_back` does. Raises `StorageFull`."""
        wanted = align_up(num_bytes, IO_ALIGNMENT_BYTES)
        merged: list[tuple[int, int]] = []
        self.take_back()
        for start, end in sorted(self._free):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._free = merged
        for index, (start, end) in enumerate(merged):
            if end - start >= wanted:
                merged[index] = (start + wanted, end)
                return ScratchRange(self, start, wanted)
        raise StorageFull(f"no room for {format_bytes(wanted)} more", path=self.file.path, errno=errno.ENOSPC)

    def take_back(self) -> None:
        """Has the ranges that were let go of free again, and the slots that they were written from or read to.

        Blocks until nothing is under way there. Nobody wants it any more, so its error is nobody's. What is late, or
        whoever interrupts the wait, keeps the range for good: it may still be written to, or read, when others would
        be there.
        """
        while self.returned:
            start, end, begun = self.returned.popleft()
            try:
                for transfer in begun:
                    self._settle(transfer)
            except StorageTimeout:
                continue
            self._free.append((start, end))

    def _settle(self, transfer: Transfer) -> None:
        try:
            if not transfer.was_waited_for:
                self.links.wait(transfer)
        except StorageTimeout:
            raise
        except OffloadError:
            pass

    def file_bytes(self) -> int:
        """What the file is long; 0 where it is closed."""
        owner = self.file.owner
        return 0 if owner is None or owner.fd < 0 else os.fstat(owner.fd).st_size

    def close(self) -> None:
        self.file.close()
