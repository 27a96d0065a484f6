"""New weights on their way into a device's memory, in place of the old ones.

Weights that rest in HOST are stepped where they lie, and those on NVMe are written there; both come to the device when
they are fetched. Those that stay in the device's memory are out of the CPU's reach: a range of them at a time is
rounded into HOST memory and copied in place. By rule 1 of [Note: streams] the copy begins behind everything that the
device had been given when it was asked for, so behind the last use of the old weights, since a block is stepped when
its backward has been given. `order` puts it before the next use.

    compute     .. backward 5 | backward 4 ..             [wait] forward 1 of the next step
    to_device                 | weights of 5 in place ..  /
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from offload_rt.memory.arena import Arena
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST, RETURNED
from offload_rt.transfers.transfer import Transfer

LANDING_SLOTS = 2
"""Ranges of new weights in HOST memory: one is rounded while another is copied."""


def largest_range_bytes(blocks: Sequence[TrainedBlock]) -> int:
    """HOST memory for the weights that are updated as one."""
    return max(
        align_up(
            (each.end - each.begin) * block.parameters[each.parameter].parameter.element_size(), IO_ALIGNMENT_BYTES
        )
        for block in blocks
        for piece in block.pieces
        for each in piece.segments
    )


class Landing:
    """Copies new weights into a device's memory. Used by one thread at a time."""

    def __init__(self, arena: Arena, slot_bytes: int, links: Links) -> None:
        """`arena`, of HOST memory, has room for `LANDING_SLOTS` of `slot_bytes`, those of the largest range."""
        self._arena = arena
        self._slot_bytes = slot_bytes
        self._links = links
        self._unordered: deque[Transfer] = deque()
        self.num_copies = 0
        """Since the start."""

    @contextmanager
    def room_for(self, weights: Tensor) -> Iterator[Tensor]:
        """HOST memory of the shape and dtype of `weights`, contiguous and the device's, which is copied to them at the
        end. Blocks until an earlier copy has left room; nothing is copied after an exception.
        """
        slot = self._arena.acquire(self._slot_bytes, "new weights")
        yield slot.tensor(weights.dtype, weights.shape)
        if self._links.recorder is not None:
            self._links.recorder.use("new weights", writes=[slot.range], lane=HOST, also=RETURNED)
        self._unordered.append(self._links.device_copies.load(slot, weights))
        self.num_copies += 1

    def order(self) -> None:
        """What the device is given from now on sees the new weights. Does not wait for it; raises what a copy raised.

        Not while somebody is inside `room_for`.
        """
        while self._unordered:
            self._links.wait(self._unordered.popleft())
