"""A device's own copies, between HOST and its memory, as transfers: `streams.Copier` starts them, counted here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from offload_rt.memory.arena import WAIT_SECONDS, Slot
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, Meter
from offload_rt.transfers.file_io import wait_future
from offload_rt.transfers.streams import Copier, Copy, Place
from offload_rt.transfers.transfer import Transfer, TransferCounters


class DeviceCopies:
    """Starts transfers that are the device's own copies. One per engine; none where DEVICE is RAM."""

    def __init__(self, copier: Copier, meter: Meter, counters: TransferCounters) -> None:
        """`counters` are those of the engine's other transfers too."""
        self._copier = copier
        self._meter = meter
        self._counters = counters

    def copy(
        self,
        source: Slot,
        destination: Slot,
        *,
        after: Transfer | None = None,
        check: Callable[[], None] | None = None,
        places: Sequence[Place] | None = None,
    ) -> Transfer:
        """Starts copying `source` to `destination` (equal sizes), one of them in the device's memory; see `Links.copy`.

        Does not block. `places`: see `Copier.start`.
        """
        if source.on_device and destination.on_device:
            raise ValueError(f"copy: {source.range} and {destination.range} are both in the device's memory")
        self._counters.bytes_copied += source.num_bytes
        self._meter.moved(HOST_TO_DEVICE if destination.on_device else DEVICE_TO_HOST, source.num_bytes)

        def arrived() -> None:
            if after is not None:
                after.wait()
            if check is not None:
                check()

        copy = self._copier.start(
            f"copy of {source.range.arena} to {destination.range.arena}",
            [(source.tensor(torch.uint8, (source.num_bytes,)), destination.tensor(torch.uint8, (source.num_bytes,)))],
            inward=destination.on_device,
            reads=[source],
            writes=[destination],
            after=arrived if after is not None or check is not None else None,
            after_operations=[] if after is None or after.operation is None else [after.operation],
            places=places,
        )
        return self._transfer(copy, source.num_bytes, after)

    def save(self, *saved: tuple[torch.Tensor, Slot]) -> Transfer:
        """Starts copying tensors, contiguous, that `compute` was given to make, each to its slot in HOST, all of them
        as one transfer. Does not block.
        """
        ends = []
        for source, destination in saved:
            flat = _bytes_of(source)
            ends.append((flat, destination.tensor(torch.uint8, (flat.numel(),))))
        num_bytes = sum(flat.numel() for flat, _ in ends)
        self._counters.bytes_copied += num_bytes
        self._meter.moved(DEVICE_TO_HOST, num_bytes)
        writes = [destination for _, destination in saved]
        copy = self._copier.start(f"save to {writes[0].range.arena}", ends, inward=False, writes=writes)
        return self._transfer(copy, num_bytes)

    def load(
        self,
        source: Slot,
        destination: torch.Tensor,
        *,
        saved: Transfer | None = None,
        after: Transfer | None = None,
    ) -> Transfer:
        """Starts copying `source` to `destination`, contiguous and of the device, in place of what it holds.

        `saved` is the copy, `after` the read from a drive, that fills `source`, where that may be under way. Does not
        block.
        """
        flat = _bytes_of(destination)
        self._counters.bytes_copied += flat.numel()
        self._meter.moved(HOST_TO_DEVICE, flat.numel())
        copy = self._copier.start(
            f"load from {source.range.arena}",
            [(source.tensor(torch.uint8, (flat.numel(),)), flat)],
            inward=True,
            reads=[source],
            behind=None if saved is None else saved.copy,
            after=None if after is None else after.wait,
            after_operations=[] if after is None or after.operation is None else [after.operation],
        )
        return self._transfer(copy, flat.numel(), after)

    def place(self, copied: Transfer) -> Place:
        """Behind `copied`, a device's own copy. Blocks until that has been given: at once, but for pageable memory.

        Raises why it could not be, and `StorageTimeout`.
        """
        if copied.copy is None:
            raise ValueError(f"{copied.name}: is no copy of a device's")
        return self._copier.place(copied.copy, WAIT_SECONDS)

    def behind(self, saved: Transfer, start: Callable[[], Transfer]) -> Transfer:
        """What `start` starts when `saved`, a device's own copy, is over: by the thread that sees it. Never blocks.

        Either is waited for as long as one alone, see `Links.join`.
        """
        if saved.copy is None:
            raise ValueError(f"{saved.name}: is no copy of a device's")
        begun: Future[Transfer] = Future()
        to_start = [start]  # emptied when it begins: what a copy that is over refers to must hold no memory

        def begin(copied: Future[None]) -> None:
            try:
                copied.result()
                begun.set_result(to_start.pop()())
            except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                to_start.clear()
                begun.set_exception(error.with_traceback(None))

        def wait(timeout_seconds: float) -> None:
            started = wait_future(begun, timeout_seconds, self._copier.outstanding)
            transfer.operation = started.operation
            started.wait(timeout_seconds)

        transfer = Transfer(f"what follows {saved.name}", saved.num_bytes, wait, ())
        transfer.moves = saved.moves
        saved.copy.done.add_done_callback(begin)
        return transfer

    def _transfer(self, copy: Copy, num_bytes: int, after: Transfer | None = None) -> Transfer:
        copier = self._copier
        self._counters.num_transfers += 1
        transfer = Transfer(copy.name, num_bytes, lambda seconds: copier.wait(copy, seconds), (copy,))
        transfer.copy, transfer.operation, transfer.moves = copy, copy.operation, copy.moves
        transfer.legs_before = () if after is None else after.legs
        return transfer


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
