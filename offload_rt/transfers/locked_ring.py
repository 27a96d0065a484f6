"""A few pieces of locked memory through which a device's copies of pageable HOST memory go, one way.

    pageable arena   |....|....|....|....|....|
                         \\ copied by the CPU
    locked ring           [ 0 ][ 1 ][ 2 ]              a piece is filled again when the device has read it
                                  \\ copied by the device
    device memory            |....|....|....|

A device's own copy of pageable memory holds up the thread that gives it until everything given before is over. Through
the ring, that thread is one of the copier's, and whoever asked for the copy goes on: see rule 4 of [Note: streams].
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from offload_rt.memory.arena import Slot
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.transfers.device_streams import Ends, Event, Give, Stream

NUM_PIECES = 4
"""One is filled or emptied, one is copied by the device, and two keep either from waiting for a late thread."""


class LockedRing:
    """Used by one thread at a time. Holds its memory, `num_bytes` of which have passed so far."""

    def __init__(self, memory: Slot) -> None:
        """`memory` is locked; it takes at least a page for each piece."""
        self.num_bytes = 0
        self.piece_bytes = memory.num_bytes // NUM_PIECES // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES
        if not self.piece_bytes:
            raise ValueError(f"locked ring: {NUM_PIECES} pieces of {memory.num_bytes} bytes")
        whole = memory.tensor(torch.uint8, (NUM_PIECES * self.piece_bytes,))
        self._pieces = deque(whole[at : at + self.piece_bytes] for at in range(0, whole.numel(), self.piece_bytes))
        """The next one to be used is the first."""
        self._under_way: deque[Event] = deque()
        """Behind what the device copies out of the last pieces, oldest first."""

    def send(self, stream: Stream, ends: Sequence[Ends], copy: Give) -> Event:
        """Gives `stream`, by `copy`, the copies of `ends` from HOST, which has been read when this returns. Blocks
        while all pieces wait for the device. Raises what the device raised. The event is behind all of it.
        """
        for source, destination in self._parts(ends):
            if len(self._under_way) == NUM_PIECES:
                self._under_way.popleft().wait()
            piece = self._next(source.numel())
            _copy(source, piece)
            copy([(piece, destination)])
            self._under_way.append(stream.record())
        return stream.record()

    def receive(self, stream: Stream, ends: Sequence[Ends], copy: Give, given: Callable[[Event], None]) -> None:
        """Copies `ends` to HOST. Blocks until they are there; raises as `send`. `given` is called with the event behind
        what the device does of it, which reads no source any more then.
        """
        landing: deque[tuple[Event, Tensor, Tensor]] = deque()

        def land() -> None:
            event, piece, destination = landing.popleft()
            event.wait()
            _copy(piece, destination)

        for source, destination in self._parts(ends):
            if len(landing) == NUM_PIECES:
                land()
            piece = self._next(source.numel())
            copy([(source, piece)])
            landing.append((stream.record(), piece, destination))
        given(stream.record())
        while landing:
            land()

    def _parts(self, ends: Sequence[Ends]) -> Iterator[Ends]:
        for source, destination in ends:
            self.num_bytes += source.numel()
            for at in range(0, source.numel(), self.piece_bytes):
                yield source[at : at + self.piece_bytes], destination[at : at + self.piece_bytes]

    def _next(self, num_bytes: int) -> Tensor:
        piece = self._pieces[0]
        self._pieces.rotate(-1)
        return piece[:num_bytes]


def _copy(source: Tensor, destination: Tensor) -> None:
    """By this thread alone: torch's would be at work on a layer."""
    ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.numel())
