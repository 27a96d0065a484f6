"""What a device whose work is asynchronous offers as the tier DEVICE: memory, streams, and events that order them.

`streams` says how they are used, `device_cuda` what they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from offload_rt.memory.arena import Arena, Region

Ends = tuple[Tensor, Tensor]
"""Source and destination of a copy: both uint8, contiguous, of one size, one of them in HOST."""


class Event(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Blocks the calling thread until the device has passed it, without spinning. Raises what the device raised."""


class Mark(Protocol):
    """A place in a stream at which the device notes the time. Made once, recorded again and again by one at a time."""

    def record(self, stream: Stream) -> None:
        """Behind everything that `stream` was given so far. Returns at once."""

    def has_passed(self) -> bool:
        """Whether the device has, since it was recorded the last time. Does not wait."""

    def seconds_since(self, other: Mark) -> float:
        """From `other`, of any stream, which is later where that is negative. Both were passed."""


class Stream(Protocol):
    """Work that runs in order. Every method returns at once, and may be called from any thread."""

    def record(self) -> Event:
        """The place behind everything given so far."""

    def wait(self, event: Event) -> None:
        """What is given from now on begins when `event`, of any stream of the device, was passed."""

    def copy(self, ends: Sequence[Ends]) -> None:
        """Copies bytes, one pair after the other. The caller keeps all of them alive."""

    def run(self, launch: Callable[[], None]) -> None:
        """Runs the kernels that `launch` launches. The caller keeps alive what they use."""


Give = Callable[[Sequence[Ends]], None]
"""Gives a stream the copies of these ends, as its own `copy`."""


class Ring(Protocol):
    """What copies of pageable memory go through: `locked_ring.LockedRing`."""

    def send(self, stream: Stream, ends: Sequence[Ends], copy: Give) -> Event: ...

    def receive(self, stream: Stream, ends: Sequence[Ends], copy: Give, given: Callable[[Event], None]) -> None: ...


class Device(Protocol):
    """What a tier DEVICE with streams of its own offers."""

    @property
    def compute(self) -> Stream: ...

    @property
    def to_device(self) -> Stream: ...

    @property
    def to_host(self) -> Stream: ...

    @property
    def updates(self) -> Stream: ...

    def arena(self, name: str, num_bytes: int, *, poison: bool) -> Arena:
        """An arena in one allocation of the device's memory. Its poison is written by `compute`."""

    def mark(self) -> Mark:
        """A mark, with all that it needs of the device."""

    def check_stream(self) -> None:
        """Raises `ConfigError` where the caller's kernels do not go to `compute`, or do not run when they are given."""

    def on_compute(self) -> AbstractContextManager[None]:
        """Inside, the kernels of the calling thread, which may be a new one, go to `compute`."""

    def lock(self, name: str, region: Region) -> None:
        """Makes the memory of `name`, a HOST arena, reachable for the device's own copies, where the system lets us:
        otherwise it `is_pageable`.
        """

    @property
    def rings(self) -> tuple[Ring, Ring] | None:
        """What copies of pageable memory go through, inward and back; None where they go by themselves."""
