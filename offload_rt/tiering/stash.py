"""Where the inputs of layers, and activations, wait between forward and backward, when that is not DEVICE memory.

A stashed input is copied out right after its layer's forward has begun to use it and fetched back before its layer's
backward; while one layer is recomputed, the input of the one before it is on its way. In HOST it lies in an arena, on
NVME in the scratch file, through staging slots. Tensors come back in the order in which backward wants them, the last
one first.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

from offload_rt.errors import StorageError, StorageFull, StoreCorrupt
from offload_rt.memory.arena import Arena, Slot
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.storage.scratch import Scratch, ScratchRange
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer

GRANULE_BYTES = 64
"""A tensor in HOST takes a multiple of so much, and begins at one: a line of cache."""


class Stashed(Protocol):
    """A tensor that is put away."""

    def load(self) -> torch.Tensor:
        """The tensor again, in memory of its own. Blocks until it has arrived. May be called more than once."""

    def release(self) -> None:
        """Gives its place back; it cannot be loaded any more. Neither blocks nor takes a lock: a finalizer may call it,
        of any thread, whatever that one holds.
        """


class Stash(Protocol):
    """A place to put tensors away."""

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """Takes a copy of `tensor`, which the caller may then let go of; None where there is no room left.

        Room is planned for one micro-batch. A loop that holds the graphs of several keeps the rest in memory.
        """

    @property
    def latest(self) -> weakref.ref[Any] | None:
        """What was put away last, for `start_from`; None where nothing was, or nothing needs to be started."""

    def start_from(self, latest: weakref.ref[Any] | None) -> None:
        """A backward has begun: starts fetching what was `latest` in its forward, and before that, as far as there is
        room now.

        Nothing where that is under way, or has been used. Does not block.
        """


class _Chained(Protocol):
    @property
    def previous(self) -> weakref.ref[Any] | None:
        """What its stash took before it; None where it is the first."""


ChainedT = TypeVar("ChainedT", bound=_Chained)


def put_away_up_to(latest: weakref.ref[ChainedT] | None) -> Iterator[ChainedT]:
    """What the stash took up to `latest`, which is first: backward wants them in this order. Ends where somebody has
    let go of one.
    """
    while latest is not None and (stashed := latest()) is not None:
        yield stashed
        latest = stashed.previous


class HostStash:
    """Tensors in an arena of HOST memory. Copies are made in place: on the CPU device both ends are RAM."""

    def __init__(self, arena: Arena, links: Links) -> None:
        self._arena = arena
        self._links = links

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        slot = self._arena.try_acquire(tensor.numel() * tensor.element_size(), "layer input")
        if slot is None:
            return None
        with self._links.meter.inline(DEVICE_TO_HOST, slot.owner, slot.num_bytes):
            slot.tensor(tensor.dtype, tensor.shape).copy_(tensor)
        self._links.meter.moved(DEVICE_TO_HOST, slot.num_bytes)
        self._links.counters.bytes_copied += slot.num_bytes
        return _HostStashed(slot, tensor.shape, tensor.dtype, self._links)

    @property
    def latest(self) -> None:
        """Nothing to start: a load copies at once."""

    def start_from(self, latest: weakref.ref[Any] | None) -> None:
        """As `latest`."""


class _HostStashed:
    def __init__(self, slot: Slot, shape: torch.Size, dtype: torch.dtype, links: Links) -> None:
        self._slot: Slot | None = slot
        self._shape = shape
        self._dtype = dtype
        self._links = links

    def load(self) -> torch.Tensor:
        if self._slot is None:
            raise RuntimeError("stash: loaded after its release")
        self._links.counters.bytes_copied += self._slot.num_bytes
        self._links.meter.moved(HOST_TO_DEVICE, self._slot.num_bytes)
        with self._links.meter.inline(HOST_TO_DEVICE, self._slot.owner, self._slot.num_bytes):
            return self._slot.tensor(self._dtype, self._shape).clone()

    def release(self) -> None:
        self._slot = None


class NvmeStash:
    """Tensors in a scratch file. Half of `staging` is for those on their way out, half for those on their way in.

    A tensor that is larger than `piece_bytes` (None: a quarter of the staging) goes in pieces, so that staging need not
    grow with what is put away. While one is used, the one before it is on its way, and further ones as far as
    `ahead_bytes` reach, which is at most half of the staging.
    """

    def __init__(
        self, scratch: Scratch, staging: Arena, links: Links, *, piece_bytes: int | None = None, ahead_bytes: int = 0
    ) -> None:
        most = staging.num_bytes // 4 if piece_bytes is None else piece_bytes
        self._scratch = scratch
        self._staging = staging
        self._piece_bytes = max(most // IO_ALIGNMENT_BYTES, 1) * IO_ALIGNMENT_BYTES
        self._ahead_bytes = min(ahead_bytes, staging.num_bytes // 2)
        self._links = links
        self.latest: weakref.ref[_NvmeStashed] | None = None
        self._reading: weakref.WeakSet[_Piece] = weakref.WeakSet()
        self._writing: deque[_Piece] = deque()
        self._writing_bytes = 0
        self.num_given_up = 0
        """How often what was read ahead was given up."""

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        stashed = _NvmeStashed(self, tensor.shape, tensor.dtype)
        for part in torch.split(source, self._piece_bytes):
            piece = self._write(part)
            if piece is None:
                stashed.release()
                return None
            stashed.pieces.append(piece)
            stashed.stored_bytes += piece.stored_bytes
        stashed.previous = self.latest
        self.latest = weakref.ref(stashed)
        return stashed

    def _write(self, part: torch.Tensor) -> _Piece | None:
        """Starts writing `part` out of a slot; None where there is no slot or no room on the drive."""
        num_bytes = align_up(part.numel(), IO_ALIGNMENT_BYTES)
        while self._writing and self._writing_bytes + num_bytes > self._staging.num_bytes // 2:
            self._finish_a_write()
        slot = self._staging.try_acquire(num_bytes, "activations on their way out")
        if slot is None:
            self.free_staging()
            slot = self._staging.try_acquire(num_bytes, "activations on their way out")
        if slot is None:
            return None
        try:
            place = self._scratch.acquire(num_bytes)
        except StorageFull:
            return None
        slot.tensor(part.dtype, part.shape).copy_(part)
        if self._links.recorder is not None:
            self._links.recorder.use("stash", writes=[slot.range])
        piece = _Piece(self, place, place.write(slot), part.numel())
        self._writing.append(piece)
        self._writing_bytes += piece.stored_bytes
        return piece

    def start_read(self, piece: _Piece, place: ScratchRange) -> tuple[Slot, Transfer] | None:
        """Starts reading `place` back, if there is a free slot."""
        slot = self._staging.try_acquire(place.num_bytes, "activations on their way in")
        if slot is None:
            return None
        self._reading.add(piece)
        return slot, place.read(slot)

    def free_staging(self) -> None:
        """Waits for writes under way, and gives up what was read ahead: another tensor is wanted than foreseen. What
        nobody wants any more may hold slots, too.
        """
        while self._writing:
            self._finish_a_write()
        for piece in list(self._reading):
            piece.drop_read()
        self._scratch.take_back()
        self.num_given_up += 1

    def start_previous(self, stashed: _NvmeStashed) -> None:
        """Starts reading what was stashed before this tensor: backward will want it next.

        Waits for the write of the first one at most; what has left later is read when it is the first.
        """
        self._start(stashed.previous, at_least_one=True)

    def start_from(self, latest: weakref.ref[_NvmeStashed] | None) -> None:
        """As `Stash.start_from`: as far as `ahead_bytes` reach."""
        self._start(latest, at_least_one=False)

    def _start(self, latest: weakref.ref[_NvmeStashed] | None, *, at_least_one: bool) -> None:
        ahead_bytes = 0
        for before in put_away_up_to(latest):
            if not before.pieces or before.was_loaded:
                continue
            ahead_bytes += before.stored_bytes
            if at_least_one:
                before.start_read()
            elif ahead_bytes > self._ahead_bytes or not before.read_ahead():
                return
            at_least_one = False

    def _finish_a_write(self) -> None:
        piece = self._writing.popleft()
        self._writing_bytes -= piece.stored_bytes
        with suppress(StorageError):  # whoever wants the piece raises it
            piece.finish_write()

    def wait(self, transfer: Transfer) -> None:
        self._links.wait(transfer)


class _Piece:
    """A range of a stashed tensor's bytes that moves at once."""

    def __init__(self, stash: NvmeStash, place: ScratchRange, write: Transfer, num_bytes: int) -> None:
        self._stash = stash
        self._place: ScratchRange | None = place
        self._write: Transfer | None = write
        self._read: tuple[Slot, Transfer] | None = None
        self.num_bytes = num_bytes
        self.stored_bytes = place.num_bytes

    def finish_write(self) -> None:
        if self._write is not None:
            self._stash.wait(self._write)  # raises again, as often as it is asked, if the write failed
            self._write = None

    def has_left(self) -> bool:
        """Whether its write is over, whatever became of it."""
        return self._write is None or self._write.is_over()

    def start_read(self) -> bool:
        """Whether it is on its way; not where there is no free slot."""
        self.finish_write()
        if self._read is None and self._place is not None:
            self._read = self._stash.start_read(self, self._place)
        return self._read is not None

    def drop_read(self) -> None:
        """Gives up a read, which must be over before its place or its slot is used again."""
        if self._read is not None:
            with suppress(StorageError, StoreCorrupt):  # nobody has asked for the piece: whoever does reads it again
                self._stash.wait(self._read[1])
            self._read = None

    def load_into(self, part: torch.Tensor) -> None:
        """Blocks until its bytes are in `part`."""
        if not self.start_read():
            self._stash.free_staging()
            self.start_read()
        if self._read is None:
            raise RuntimeError("stash: loaded after its release, or no staging slot for it")
        slot, read = self._read
        self._stash.wait(read)
        part.copy_(slot.tensor(part.dtype, part.shape))
        self._read = None

    def release(self) -> None:
        self._place = self._write = self._read = None


class _NvmeStashed:
    def __init__(self, stash: NvmeStash, shape: torch.Size, dtype: torch.dtype) -> None:
        self.previous: weakref.ref[_NvmeStashed] | None = None
        self.pieces: list[_Piece] = []
        self.stored_bytes = 0
        self.was_loaded = False
        self._stash = stash
        self._shape = shape
        self._dtype = dtype
        self._read_ahead_at: int | None = None
        """How often the stash had given up what it read ahead when all of it was on its way."""

    def start_read(self) -> None:
        """Starts reading as much as has room on its way in."""
        for piece in self.pieces[:2]:
            if not piece.start_read():
                return

    def read_ahead(self) -> bool:
        """Starts reading all of it, without waiting for anything; whether it could."""
        if self._read_ahead_at == self._stash.num_given_up:
            return True  # as for each that is loaded before it
        if not all(p.has_left() for p in self.pieces) or not all([p.start_read() for p in self.pieces]):
            return False
        self._read_ahead_at = self._stash.num_given_up
        return True

    def load(self) -> torch.Tensor:
        if not self.pieces:
            raise RuntimeError("stash: loaded after its release")
        tensor = torch.empty(self._shape, dtype=self._dtype)
        flat = tensor.view(-1).view(torch.uint8)
        parts = torch.split(flat, [piece.num_bytes for piece in self.pieces])
        for index, (piece, part) in enumerate(zip(self.pieces, parts, strict=True)):
            if piece.start_read() and index + 1 < len(self.pieces):
                self.pieces[index + 1].start_read()
            piece.load_into(part)
        self.was_loaded = True
        self._stash.start_previous(self)
        return tensor

    def release(self) -> None:
        for piece in self.pieces:
            piece.release()
        self.pieces = []
