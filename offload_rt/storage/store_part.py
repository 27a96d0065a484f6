"""The part of a stored block that is read again and again while the rest of the block is in memory.

A store knows the checksum of a whole block. A part is verified against what it held when the whole block was read and
verified once, piece by piece, at the start.
"""

from __future__ import annotations

from offload_rt.checksum import crc32c
from offload_rt.memory.arena import Slot
from offload_rt.storage.store import Store
from offload_rt.transfers.transfer import Transfer


class StorePart:
    """[begin_bytes, begin_bytes + num_bytes) of a block, both whole pages. Reads go to a slot of that size.

    Whoever reads the whole block first shows all of it to `see`, in order.
    """

    def __init__(self, store: Store, block: str, begin_bytes: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._store = store
        self._block = block
        self._begin_bytes = begin_bytes
        self._crc32c = 0
        self._is_verified = False

    def see(self, offset_bytes: int, piece: Slot) -> None:
        """Takes note of what of `piece`, which begins at `offset_bytes` of the block, is in this part."""
        first = max(offset_bytes, self._begin_bytes)
        last = min(offset_bytes + piece.num_bytes, self._begin_bytes + self.num_bytes)
        if first < last:
            self._crc32c = crc32c(piece.part(first - offset_bytes, last - first).buffer(), self._crc32c)

    def read(self, block: str, slot: Slot) -> Transfer:
        """Starts reading the part into `slot`. Does not block for the drive."""
        return self._store.read_range(self._block, self._begin_bytes, slot)

    def verify(self, block: str, slot: Slot) -> None:
        """Checks a part that has arrived, on its first read, or on every one with OFFLOAD_RT_VERIFY=all.

        Raises `StoreCorrupt`.
        """
        if self._is_verified and not self._store.verifies_every_read:
            return
        found = crc32c(slot.part(0, self.num_bytes).buffer())
        if found != self._crc32c:
            end_bytes = self._begin_bytes + self.num_bytes
            raise self._store.other_bytes(block, self._begin_bytes, end_bytes, found=found, expected=self._crc32c)
        self._is_verified = True
