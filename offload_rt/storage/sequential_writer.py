"""Writes bytes that come one behind the other to stripes over drives, through two staging pieces, and sums them up.

One piece is filled while the other is on its way: a model's weights are converted while the drive writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from offload_rt.checksum import crc32c
from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena
from offload_rt.storage.stripes import Stripe, parts
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer


class SequentialWriter:
    """Collects bytes into aligned staging slots, writes each when full, and runs the checksum over them."""

    def __init__(
        self, links: Links, staging: Arena, piece_bytes: int, files: Sequence[OpenFile], stripes: Sequence[Stripe]
    ) -> None:
        """staging: room for two pieces of `piece_bytes`."""
        self._links = links
        self._staging = staging
        self._piece_bytes = piece_bytes
        self._files = files
        self._stripes = stripes
        self._flushed = 0
        self._position = 0
        self._crc = 0
        self._slot = staging.acquire(piece_bytes, "ingest")
        self._filled = 0
        self._in_flight: Transfer | None = None

    def append(self, position: int, tensor: torch.Tensor) -> None:
        """Takes a contiguous tensor that begins at byte `position`; a gap before it becomes zeros. Blocks."""
        if position < self._position:
            raise ValueError(f"store: piece at {position} behind {self._position}")
        self._zeros(position - self._position)
        self._bytes(tensor.detach().reshape(-1).view(torch.uint8))

    def finish(self, length_bytes: int) -> int:
        """Zeros up to `length_bytes`; waits for all writes, syncs none. Returns the CRC32C of all pages."""
        self._zeros(length_bytes - self._position)
        if self._filled:
            self._flush()
        if self._in_flight is not None:
            self._links.wait(self._in_flight)
        return self._crc

    def abort(self) -> None:
        """Waits for the write under way, whose descriptor may be closed next, whatever came of it."""
        if self._in_flight is not None:
            with contextlib.suppress(OffloadError):
                self._in_flight.wait()

    def _zeros(self, num_bytes: int) -> None:
        while num_bytes:
            step = min(num_bytes, 1 << 20)
            self._bytes(torch.zeros(step, dtype=torch.uint8))
            num_bytes -= step

    def _bytes(self, data: torch.Tensor) -> None:
        done = 0
        while done < data.numel():
            take = min(data.numel() - done, self._piece_bytes - self._filled)
            self._slot.tensor(torch.uint8, (take,), self._filled).copy_(data[done : done + take])
            self._filled += take
            done += take
            self._position += take
            if self._filled == self._piece_bytes:
                self._flush()

    def _flush(self) -> None:
        piece = self._slot.part(0, align_up(self._filled, IO_ALIGNMENT_BYTES))
        self._crc = crc32c(piece.buffer(), self._crc)
        if self._in_flight is not None:
            self._links.wait(self._in_flight)
        writes = [
            self._links.write(
                self._files[part.drive], part.offset_bytes, piece.part(part.begin_bytes, part.length_bytes)
            )
            for part in parts(self._stripes, self._flushed, piece.num_bytes)
        ]
        self._in_flight = self._links.join("write of a piece", writes)
        self._flushed += piece.num_bytes
        self._filled = 0
        del piece
        self._slot = self._staging.acquire(self._piece_bytes, "ingest")
