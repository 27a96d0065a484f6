"""A trained block's weights that rest in parts, and how new ones come to all of them.

    the block    |== stays in DEVICE ==|==== rests in HOST ====|==== rests in the log ====|
                 0                     ^ what streams begins   ^ whole pages              |
    a room                             |-- collects the new weights of what streams ------|

Tensors that stay in DEVICE are stepped there, as those of a block that stays whole. The others are rounded into a room
of their own, from where HOST's part is copied and the log's part is written. Where nothing rests in the log, HOST's
part is the room.

[Note: one commit for all parts] Weights are their masters, rounded, and the masters are what a commit holds. The part
in the log is written behind the step, to its extent's free slot, and becomes real with the masters' commit; the parts
in memory are real as long as the process is. So no parts of a commit can disagree: whoever loads one, after a kill or a
loss of power, and whoever takes a step back, rounds these blocks' weights again, into every part. A log's extent has
room for the block as a whole, and its checksum is of what was written last: another plan may cut it elsewhere, and does
not believe what lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_rt.memory.arena import Slot
from planners.plans.placement import Split


class WeightsRoom(Protocol):
    """Memory with a block's weights: a slot, or parts."""

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> Tensor:
        """A contiguous tensor over the bytes from `offset_bytes` of the block on."""


@dataclass(frozen=True)
class PartedRoom:
    """Where a block's weights are while it is stepped: its first tensors in `resident`, the others in `streamed`."""

    resident: Slot | None
    streamed: Slot
    streamed_from_bytes: int

    def slot_of(self, offset_bytes: int) -> Slot:
        """What holds the tensor that begins there."""
        if self.resident is not None and offset_bytes < self.resident.num_bytes:
            return self.resident
        return self.streamed

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> Tensor:
        slot = self.slot_of(offset_bytes)
        return slot.tensor(dtype, shape, offset_bytes - (0 if slot is self.resident else self.streamed_from_bytes))


@dataclass(frozen=True)
class PartedWeights:
    """Where the parts of one block rest. Slots belong to the arenas of their tiers."""

    split: Split
    resident: Slot | None
    host: Slot | None
    settle: Callable[[], None]
    """Blocks until nothing reads `host`, so that it may change."""

    @property
    def log_from_bytes(self) -> int:
        """Where in the block the log's part begins, which goes on to its end."""
        return self.split.device_bytes + self.split.host_bytes

    def room(self, slot: Slot | None) -> PartedRoom:
        """The block's weights, with what streams in `slot`; where nothing is in the log, where it rests. May block."""
        if slot is None:
            if self.host is None:
                raise RuntimeError("weights that stream rest neither in HOST nor in the log")
            self.settle()
            slot = self.host
        return PartedRoom(self.resident, slot, self.split.device_bytes)

    def log_part(self, room: PartedRoom) -> Slot:
        """What of `room` is the log's."""
        return room.streamed.part(self.split.host_bytes, self.split.nvme_bytes)

    def from_host(self, room: PartedRoom) -> None:
        """Copies HOST's part into `room`."""
        if self.host is not None and room.streamed is not self.host:
            _bytes(room.streamed.part(0, self.split.host_bytes)).copy_(_bytes(self.host))

    def to_host(self, room: PartedRoom) -> None:
        """Copies HOST's part from `room`, after `settle`."""
        if self.host is not None and room.streamed is not self.host:
            _bytes(self.host).copy_(_bytes(room.streamed.part(0, self.split.host_bytes)))


def _bytes(slot: Slot) -> Tensor:
    return slot.tensor(torch.uint8, (slot.num_bytes,))
