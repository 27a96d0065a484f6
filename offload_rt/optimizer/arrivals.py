"""Gradients on their way from a device to the HOST memory in which they wait.

[Note: gradients behind the device]
The host is ahead of the device: when it has given a layer's backward, that layer's gradients are not there yet. So
their copies are asked for, which the device orders behind what computes them, and what is to be done with the bytes
(sums over micro-batches, norms) is left to an `Arrival`: for the thread that steps blocks, or for whoever else wants
the gradients first. The host waits only so that the device's memory is bounded: before the copies of one block are
asked for, those of the block before it must be over. Its memory then has the gradients of one block on their way and
those of the next, which are being computed.

    compute    backward 5 | backward 4          | backward 3
    to_host               | gradients 5 -> HOST | gradients 4 -> HOST
    updates                                     | sum, norm, step 5  | sum, norm, step 4
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.meter import CPU, DEVICE_TO_HOST
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer

ALIGNMENT_BYTES = 64
"""Of a gradient in staging: a cache line."""
ARRIVING_SLOTS = 2
"""Of staging: the gradients of one block arrive while those of another are added to what waits."""


def largest_arrival_bytes(blocks: Sequence[TrainedBlock]) -> int:
    """HOST memory through which one micro-batch's gradients of any block come, each in its parameter's dtype."""
    sizes = [sum(align_up(t.parameter.nbytes, ALIGNMENT_BYTES) for t in block.parameters) for block in blocks]
    return align_up(max(sizes), IO_ALIGNMENT_BYTES)


class Arrival:
    """One micro-batch's gradients of one block. `settle` may be called by any thread, and again."""

    def __init__(self, copy: Transfer, then: Callable[[], None]) -> None:
        self._copy = copy
        self._then: Callable[[], None] | None = then
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Blocks until the copy is over: the device needs the gradients no more. Raises what it raised."""
        self._copy.wait()

    def settle(self, wait: Callable[[Transfer], None]) -> None:
        """Waits for the copy, by `wait`, and does what was to be done with the gradients. Blocks."""
        with self._lock:
            if self._then is None:
                return
            wait(self._copy)
            self._then()
            self._then = None  # and with it the lease of the memory that they came through


class Arrivals:
    """Starts the copies of gradients, one block after the other. Used by one thread."""

    def __init__(self, links: Links, staging: Arena | None, staging_bytes: int = 0) -> None:
        """With `staging`, gradients come through slots of it of `staging_bytes`: those that are added to others."""
        self._links = links
        self._staging = staging
        self._staging_bytes = staging_bytes
        self._unsettled: deque[Arrival] = deque()
        self._last: Arrival | None = None

    def start(
        self,
        block: TrainedBlock,
        gradients: Mapping[int, Tensor],
        places: Mapping[int, Slot],
        take: Callable[[Mapping[int, Tensor]], None],
    ) -> Arrival:
        """Starts copying `gradients`, by parameter index, to `places`, or to staging where there is some.

        `take` is called with them, in HOST, by whoever settles the arrival. Blocks until the copies of the block before
        are over, and while there is no room.
        """
        if self._last is not None:
            with self._links.stalled(f"gradients before {block.name}", DEVICE_TO_HOST):
                self._last.wait()
        if self._staging is not None:
            places = self._stage(block, gradients, self._staging)
        arrived, saved = {}, []
        for index, gradient in gradients.items():
            trained, place = block.parameters[index], places[index]
            source = gradient.to(trained.parameter.dtype).contiguous()
            saved.append((source, place))
            arrived[index] = place.tensor(source.dtype, source.shape)

        def taken() -> None:
            with self._links.meter.busy(CPU, f"gradients of {block.name}"):  # which a plan counts
                take(arrived)

        # One copy for the block: each has its event, and wakes the thread that reports it and the one that waits.
        arrival = Arrival(self._links.device_copies.save(*saved), taken)
        self._last = arrival
        self._unsettled.append(arrival)
        return arrival

    def drop(self) -> None:
        """Forgets all, when the copies under way are over. Blocks; their errors are nobody's."""
        for arrival in self._unsettled:
            with suppress(OffloadError):
                arrival.wait()
        self._unsettled.clear()
        self._last = None

    def _stage(self, block: TrainedBlock, gradients: Mapping[int, Tensor], staging: Arena) -> dict[int, Slot]:
        owner = f"gradients of {block.name} arriving"
        while (slot := staging.try_acquire(self._staging_bytes, owner)) is None and self._unsettled:
            self._unsettled.popleft().settle(self._links.wait)
        if slot is None:
            slot = staging.acquire(self._staging_bytes, owner)
        places, offset = {}, 0
        for index in gradients:
            num_bytes = block.parameters[index].parameter.nbytes
            places[index] = slot.part(offset, num_bytes)
            offset += align_up(num_bytes, ALIGNMENT_BYTES)
        return places
