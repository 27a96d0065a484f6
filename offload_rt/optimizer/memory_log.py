"""State that rests in memory only, as a snapshot sees a commit log: named extents, a step and a payload."""

from __future__ import annotations

from collections.abc import Mapping

from offload_rt.checksum import crc32c
from offload_rt.memory.arena import Slot
from offload_rt.storage.commit_log import Commit
from offload_rt.storage.commit_record import Version
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer


class MemoryLog:
    """Extents over `slots`, by name. What is written is there at once: `drop` takes nothing back."""

    def __init__(self, slots: Mapping[str, Slot], links: Links, step: int, payload: bytes) -> None:
        self.committed = Commit(step=step, payload=payload, sequence=0)
        self._slots = dict(slots)
        self._links = links

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    def length_bytes(self, name: str) -> int:
        return self._slots[name].num_bytes

    def version(self, name: str) -> Version:
        return Version(slot=0, crc32c=crc32c(self._slots[name].buffer()))

    def committed_place(self, name: str) -> tuple[OpenFile, int] | None:
        return None

    def read(self, name: str, slot: Slot, *, committed: bool = False) -> Transfer:
        return self._links.copy(self._slots[name], slot)

    def write(self, name: str, slot: Slot) -> Transfer:
        return self._links.copy(slot, self._slots[name])

    def drop(self) -> None:
        pass
