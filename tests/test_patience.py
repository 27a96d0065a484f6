"""Waits count time in which the process ran: one that was stopped for long goes on waiting."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from offload_rt import patience
from offload_rt.errors import StorageTimeout
from offload_rt.patience import SLICE_SECONDS, Patience
from offload_rt.transfers import file_io
from offload_rt.transfers.file_io import wait_future


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stop_of_an_hour_counts_as_one_slice() -> None:
    clock = Clock()
    waits = Patience(3.5, clock=clock)
    assert waits.slice_seconds() == SLICE_SECONDS
    clock.now += 3600
    assert waits.slice_seconds() == SLICE_SECONDS
    clock.now += 2 * SLICE_SECONDS
    clock.now -= SLICE_SECONDS
    assert waits.slice_seconds() == SLICE_SECONDS
    clock.now += 1.0
    assert waits.slice_seconds() == 0.5
    clock.now += 0.5
    assert waits.slice_seconds() == 0


class Stopped(Future[int]):
    """Whose waiter is stopped for an hour in its first slice; it is done `after` slices later."""

    def __init__(self, clock: Clock, after: int) -> None:
        super().__init__()
        self.clock, self.left = clock, after

    def result(self, timeout: float | None = None) -> int:
        if self.done():
            return super().result()
        assert timeout is not None and timeout <= SLICE_SECONDS
        self.clock.now += 3600 if self.clock.now == 100 else timeout
        if not self.left:
            self.set_result(7)
            return super().result()
        self.left -= 1
        raise file_io.FutureTimeout


def test_who_was_stopped_while_it_waited_waits_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(patience.Patience.__init__, "__kwdefaults__", {"clock": clock})
    assert wait_future(Stopped(clock, 2), 3.0, lambda: "a copy") == 7
    clock.now = 100.0
    with pytest.raises(StorageTimeout, match="not finished after 3 s; outstanding: a copy"):
        wait_future(Stopped(clock, 99), 3.0, lambda: "a copy")
    assert clock.now < 100 + 3600 + 3
