"""Tensors that wait in HOST memory or on NVMe, for a device whose work is asynchronous: by the device's own copies.

    put     compute ─► to_host: tensor -> HOST                      -> drive, when the copy is over
    load                              HOST <- drive ─► to_device: HOST -> tensor ─► compute

A tensor that is put away stays in the device's memory until its copy is done, whoever lets go of it; and the host,
which is ahead of the device, would put away more and more. So at most a *window* of bytes is on its way: `put` blocks
until the oldest copies are over. When a tensor is fetched back, those put away before it are asked for too, as far as
the window goes: backward wants them next, and their copies run under what is computed meanwhile. What a forward put
away last is asked for when its backward begins, as soon as it has left. (`stash` has the same where DEVICE is RAM.)

[Note: one window for both ways]
What leaves and what was fetched ahead share the window, so that the two never hold more of the device's memory than a
plan charges: where forward turns into backward, the first look ahead waits for what still leaves. A tensor that was
asked for is its user's, and in no window.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from functools import partial

import torch

from offload_rt.errors import OffloadError, StorageFull
from offload_rt.memory.arena import Arena, Slot
from offload_rt.meter import DEVICE_TO_HOST
from offload_rt.storage.scratch import Scratch, ScratchRange
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.stash import Stashed, put_away_up_to
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer


class DeviceStash:
    """A `Stash` in an arena of HOST memory; or in a scratch file, to and from which tensors come through the arena."""

    def __init__(self, arena: Arena, links: Links, *, window_bytes: int, scratch: Scratch | None = None) -> None:
        """`window_bytes`: of the device's memory that tensors on their way may hold; a single one may be larger.

        With `scratch`, `arena` has room for twice the window, and for two of the largest tensors besides.
        """
        self.links = links
        self._arena = arena
        self._window_bytes = window_bytes
        self._scratch = scratch
        self._leaving: deque[Transfer] = deque()
        self._leaving_bytes = 0
        self._writing: deque[tuple[Transfer, ScratchRange]] = deque()
        """Those that nobody may have waited for. Ranges are not leased again before their write has begun."""
        self._fetched_ahead: weakref.WeakSet[_DeviceStashed] = weakref.WeakSet()
        """Those fetched back that nobody has asked for yet."""
        self.latest: weakref.ref[_DeviceStashed] | None = None

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """As `Stash.put`; the copy runs behind what computes `tensor`. Blocks while the window is full."""
        source = tensor.contiguous()
        num_bytes = source.nbytes if self._scratch is None else align_up(source.nbytes, IO_ALIGNMENT_BYTES)
        self._wait_for_window(source.nbytes, self._ahead_bytes())
        # Room may be taken by what was fetched back and is done with, by a copy that is not known to be over.
        slot = self._arena.acquire_or_none(num_bytes, "put away") if self._scratch is None else self.room(num_bytes)
        if slot is None:
            return None
        place = None
        if self._scratch is not None and (place := self._place(self._scratch, num_bytes)) is None:
            return None
        saved = self.links.device_copies.save((source, slot))
        self._leaving.append(saved)
        self._leaving_bytes += saved.num_bytes
        if place is None:
            stashed = _DeviceStashed(self, tensor, self.latest, saved=saved, slot=slot)
        else:
            written = self.links.device_copies.behind(saved, partial(place.write, slot))
            while self._writing and self._writing[0][0].was_waited_for:
                self._writing.popleft()
            self._writing.append((written, place))
            stashed = _DeviceStashed(self, tensor, self.latest, saved=written, place=place)
        self.latest = weakref.ref(stashed)
        return stashed

    def room(self, num_bytes: int) -> Slot | None:
        """HOST memory on the way from or to the drive. Blocks until some is free; None if there is never so much."""
        if num_bytes > self._arena.num_bytes:
            return None
        while (slot := self.room_now(num_bytes)) is None and self._writing:
            self._finish_a_write()
        if slot is None and self._scratch is not None:
            self._scratch.take_back()  # what nobody wants any more may hold slots
        return slot if slot is not None else self._arena.acquire(num_bytes, "on its way")

    def room_now(self, num_bytes: int) -> Slot | None:
        """As `room`, but None where there is none at this moment."""
        return self._arena.try_acquire(num_bytes, "on its way")

    def look_ahead(self, stashed: _DeviceStashed) -> None:
        """Starts fetching those put away before `stashed`, one at least, as far as the window goes.

        Blocks until what leaves makes room: [Note: one window for both ways].
        """
        ahead_bytes = self._ahead_bytes()
        for before in put_away_up_to(stashed.previous):
            if not before.is_held or before in self._fetched_ahead:
                continue
            if self._fetched_ahead and ahead_bytes + before.num_bytes > self._window_bytes:
                return
            self._wait_for_window(before.num_bytes, ahead_bytes)
            before.start()
            self._fetched_ahead.add(before)
            ahead_bytes += before.num_bytes

    def start_from(self, latest: weakref.ref[_DeviceStashed] | None) -> None:
        """As `Stash.start_from`: as far as the window goes, beside what leaves."""
        ahead_bytes = self._ahead_bytes()
        for before in put_away_up_to(latest):
            if not before.is_held or before.was_loaded or before in self._fetched_ahead:
                continue
            while self._leaving and self._leaving[0].is_over():
                self._leaving_bytes -= self._leaving.popleft().num_bytes
            ahead_bytes += before.num_bytes
            if ahead_bytes + self._leaving_bytes > self._window_bytes or not before.start_at_once():
                return
            self._fetched_ahead.add(before)

    def asked_for(self, stashed: _DeviceStashed) -> None:
        """`stashed` is its user's from now on."""
        self._fetched_ahead.discard(stashed)

    def _place(self, scratch: Scratch, num_bytes: int) -> ScratchRange | None:
        while True:
            try:
                return scratch.acquire(num_bytes)
            except StorageFull:
                if not self._writing:
                    return None
                self._finish_a_write()

    def _finish_a_write(self) -> None:
        write, _ = self._writing[0]
        with contextlib.suppress(OffloadError):  # whoever wants what was written raises it
            self.links.wait(write)
        self._writing.popleft()

    def _wait_for_window(self, num_bytes: int, ahead_bytes: int) -> None:
        while self._leaving and num_bytes + ahead_bytes + self._leaving_bytes > self._window_bytes:
            oldest = self._leaving.popleft()
            self._leaving_bytes -= oldest.num_bytes
            with self.links.stalled(oldest.moves, DEVICE_TO_HOST):
                oldest.wait()

    def _ahead_bytes(self) -> int:
        return sum(stashed.num_bytes for stashed in self._fetched_ahead if stashed.is_held)


class _DeviceStashed:
    """Waits in `slot`, which `saved` fills, or in `place`, to which `saved` writes."""

    def __init__(
        self,
        stash: DeviceStash,
        like: torch.Tensor,
        previous: weakref.ref[_DeviceStashed] | None,
        *,
        saved: Transfer,
        slot: Slot | None = None,
        place: ScratchRange | None = None,
    ) -> None:
        self.num_bytes = like.nbytes
        self.was_loaded = False
        self._stash = stash
        self._saved = saved
        self._slot = slot
        self._place = place
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device
        self.previous = previous
        self._read: Transfer | None = None
        self._ahead: tuple[torch.Tensor, Transfer] | None = None

    @property
    def is_held(self) -> bool:
        return self._slot is not None or self._place is not None

    def load(self) -> torch.Tensor:
        """The tensor again; kernels given from now on are ordered after its arrival.

        Blocks for a drive, and for what still leaves: see `DeviceStash.look_ahead`.
        """
        tensor, arrival = self.start()
        self._ahead, self.was_loaded = None, True
        self._stash.asked_for(self)
        self._stash.links.wait(arrival)
        self._stash.look_ahead(self)
        return tensor

    def start(self) -> tuple[torch.Tensor, Transfer]:
        """Starts fetching it, once. Blocks until it has been written, where it waits on NVMe."""
        if self._ahead is None:
            links = self._stash.links
            if not self.is_held:
                raise RuntimeError("stash: loaded after its release")
            if self._slot is not None:
                tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
                self._ahead = tensor, links.device_copies.load(self._slot, tensor, saved=self._saved)
            elif self._place is not None:
                links.wait(self._saved)
                stage = self._stash.room(self._place.num_bytes)
                if stage is None:
                    raise RuntimeError(f"stash: no room for {self._place.num_bytes} bytes that were put away")
                self._read_through(stage, self._place)
        if self._ahead is None:
            raise RuntimeError("stash: loaded after its release")
        return self._ahead

    def start_at_once(self) -> bool:
        """As `start`, but where something would have to be waited for; whether it is on its way."""
        if self._ahead is None and self._place is not None:
            if not self._saved.is_over():
                return False
            self._stash.links.wait(self._saved)
            stage = self._stash.room_now(self._place.num_bytes)
            if stage is None:
                return False
            self._read_through(stage, self._place)
        self.start()
        return True

    def _read_through(self, stage: Slot, place: ScratchRange) -> None:
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._read = place.read(stage)
        self._ahead = tensor, self._stash.links.device_copies.load(stage, tensor, after=self._read)

    def release(self) -> None:
        """As `Stashed.release`. What is on its way to the device holds its memory there until it has arrived."""
        self._slot = self._place = self._read = self._ahead = None
