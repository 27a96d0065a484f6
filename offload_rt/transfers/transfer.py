"""One asynchronous copy, from the call that starts it until it has been waited for: it owns the memory at both ends.

Whoever starts one is `links`; a device's own copies are begun by `device_copies`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from offload_rt.errors import OffloadError, StorageTimeout, again
from offload_rt.memory.arena import WAIT_SECONDS, Slot
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.transfers.streams import Copy


@dataclass(kw_only=True)
class TransferCounters:
    """What moved since the start, in bytes, operations and seconds."""

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_copied: int = 0
    num_transfers: int = 0
    stall_seconds: float = 0.0
    """Time in which a wait really waited."""


@dataclass
class Leg:
    """What a transfer has to wait for on one resource."""

    resource: str
    arrived_at: float | None = None
    """When whoever waited for it went on, by the meter's clock; None while nobody has."""


class Transfer:
    """One asynchronous copy of `num_bytes`. Holds both ends until `wait` has returned or raised.

    `wait` may be called again; it raises `StorageTimeout` where nothing of it arrives for `timeout_seconds` in
    which the process runs, and what the operation raised.
    """

    def __init__(self, name: str, num_bytes: int, wait: Callable[[float], None], owned: tuple[object, ...]) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self.operation: int | None = None
        """Its number in the recorder, if there is one."""
        self.copy: Copy | None = None
        """The device's own copy that this is, if it is one."""
        self.moves = name
        """What it moves, by the owner of its memory where that is known."""
        self.legs: tuple[Leg, ...] = ()
        """What it waits for, one after the other; empty where nobody measures that."""
        self.legs_before: tuple[Leg, ...] = ()
        """Of a device's own copy: what it is given to the device behind."""
        self._wait = wait
        self._owned: tuple[object, ...] | None = owned
        self._error: Exception | None = None
        self._lock = threading.RLock()

    def wait(self, timeout_seconds: float | None = None) -> None:
        with self._lock:
            if self._error is not None:
                raise again(self._error)
            if self._owned is None:
                return
            try:
                self._wait(WAIT_SECONDS if timeout_seconds is None else timeout_seconds)
            except StorageTimeout:
                raise  # still under way: both ends stay owned, and it can be waited for again
            except Exception as error:
                self._error = again(error)
                self._owned = None
                raise
            self._owned = None

    def waited_for(self, begin_seconds: float, end_seconds: float) -> str:
        """The resource that took most of a wait for it, that has returned; empty where nobody measures that."""
        legs = self.legs
        if self.copy is not None:
            legs = (*self.legs_before, Leg(HOST_TO_DEVICE if self.copy.inward else DEVICE_TO_HOST))
        seconds: dict[str, float] = {}
        for resource, part in _parts(legs, begin_seconds, end_seconds):
            seconds[resource] = seconds.get(resource, 0.0) + part
        return max(seconds, key=lambda resource: seconds[resource], default="")

    @property
    def was_waited_for(self) -> bool:
        """Whether a wait has returned, or raised what the operation raised: it holds nothing any more."""
        return self._owned is None

    def is_over(self) -> bool:
        """Whether `wait` would return or raise at once. Does not block, nor order anybody after it."""
        if not self._lock.acquire(blocking=False):
            return False  # somebody waits for it
        try:
            self.wait(0.0)
        except StorageTimeout:
            return False
        except OffloadError:
            return True
        finally:
            self._lock.release()
        return True

    def stalls(self, begin_seconds: float, end_seconds: float) -> Iterator[tuple[str, float]]:
        """How a wait for it, that has returned, divides into waits for its legs: resource and seconds."""
        return _parts(self.legs, begin_seconds, end_seconds)


def checked(
    arriving: Transfer, slot: Slot, check: Callable[[Slot], None], *, is_over: Callable[[], None] | None = None
) -> Transfer:
    """`arriving`, whose first wait behind it has `check` look at what has come into `slot`, and raises what that does.

    is_over: called once it is not under way any more, whatever became of it.
    """
    unchecked = [slot]  # emptied by the wait: a transfer that was waited for holds no memory

    def wait(timeout_seconds: float) -> None:
        try:
            arriving.wait(timeout_seconds)
        except StorageTimeout:
            raise  # still under way
        except OffloadError:
            unchecked.clear()
            if is_over is not None:
                is_over()
            raise
        if is_over is not None:
            is_over()
        check(unchecked.pop())

    transfer = Transfer(arriving.name, arriving.num_bytes, wait, ())
    transfer.moves = arriving.moves
    transfer.operation, transfer.legs = arriving.operation, arriving.legs
    return transfer


def _parts(legs: Sequence[Leg], begin_seconds: float, end_seconds: float) -> Iterator[tuple[str, float]]:
    """How a wait for `legs`, that has returned, divides into them: resource and seconds."""
    at = begin_seconds
    for number, leg in enumerate(legs):
        is_last = number + 1 == len(legs)
        until = end_seconds if is_last or leg.arrived_at is None else min(max(at, leg.arrived_at), end_seconds)
        yield leg.resource, until - at
        at = until
