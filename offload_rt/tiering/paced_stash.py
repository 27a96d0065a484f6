"""Layer inputs and swapped activations over an emulated link: put away behind the computation, back ahead of it.

Where DEVICE and HOST are RAM, a stash copies at once. Here each copy takes the link's time besides. On the way back it
begins one tensor ahead, when the one that backward wants first has come. On the way out nobody waits for it. With a
window, which is what a device would have for tensors on their way, both reach as far as that: what leaves waits until
it has room in it, and what comes back begins as early as it has.
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial

import torch

from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, WAIT, Meter, Traced
from offload_rt.tiering.stash import Stash, Stashed, put_away_up_to
from offload_rt.transfers.throttle import IN, OUT, Pipe, Ticket

ACTIVATIONS = "activations"
"""As a trace calls them."""


class PacedStash:
    """A stash on the other side of `link`. Waits for it are counted by `meter`.

    `window_bytes`: on their way in one direction at most; None: see above.
    """

    def __init__(self, inner: Stash, link: Pipe, meter: Meter, *, window_bytes: int | None = None) -> None:
        self._inner = inner
        self.link = link
        self.window_bytes = window_bytes
        self._meter = meter
        self._leaving: deque[tuple[Ticket, int]] = deque()
        self.latest: weakref.ref[_PacedStashed] | None = None

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """As the stash inside; the way out is begun. Blocks while more leaves than has room."""
        stashed = self._inner.put(tensor)
        if stashed is None:
            return None
        num_bytes = tensor.numel() * tensor.element_size()
        out = self.submit(OUT, num_bytes)
        if self.window_bytes is not None:
            self._leaving.append((out, num_bytes))
            while sum(size for _, size in self._leaving) > max(self.window_bytes, num_bytes):
                self.wait(self._leaving.popleft()[0])
        paced = _PacedStashed(self, stashed, out, num_bytes, self.latest)
        self.latest = weakref.ref(paced)
        return paced

    def submit(self, way: int, num_bytes: int) -> Ticket:
        """Puts a tensor on its way."""
        told = None
        if (traced := self._meter.traced) is not None:
            told = partial(_tell, traced, _row(way), num_bytes)
        return self.link.submit(way, num_bytes, told)

    def wait(self, ticket: Ticket) -> None:
        """Blocks until `ticket` is through."""
        start = self._meter.clock()
        self.link.wait(ticket)
        end, row = self._meter.clock(), _row(ticket.way)
        self._meter.stalled(row, end - start)
        if self._meter.traced is not None:
            self._meter.traced.add(WAIT, ACTIVATIONS, start, end, of=row)

    def begin_before(self, stashed: _PacedStashed) -> None:
        """Puts on their way back what was put away before, the latest first."""
        self._begin(stashed.previous, at_least_one=True)

    def start_from(self, latest: weakref.ref[_PacedStashed] | None) -> None:
        """As `Stash.start_from`: as far as the window reaches."""
        if latest is not None and (stashed := latest()) is not None:
            self._inner.start_from(weakref.ref(stashed.inner))
        self._begin(latest, at_least_one=False)

    def _begin(self, latest: weakref.ref[_PacedStashed] | None, *, at_least_one: bool) -> None:
        ahead_bytes = 0
        for before in put_away_up_to(latest):
            if not before.is_expected:
                continue
            ahead_bytes += before.num_bytes
            has_room = ahead_bytes <= (self.window_bytes or 0) and self.link.is_through(before.out)
            if not (at_least_one or has_room):
                return
            before.begin()
            at_least_one = False


class _PacedStashed:
    def __init__(
        self,
        stash: PacedStash,
        inner: Stashed,
        out: Ticket,
        num_bytes: int,
        previous: weakref.ref[_PacedStashed] | None,
    ) -> None:
        self._stash = stash
        self.inner = inner
        self.out = out
        self.num_bytes = num_bytes
        self.previous = previous
        self.is_expected = True
        """It is held, and was not loaded yet."""
        self._back: Ticket | None = None

    def begin(self) -> None:
        """Puts it on its way back, if it is not. Blocks until it has left."""
        if self._back is None:
            self._stash.wait(self.out)
            self._back = self._stash.submit(IN, self.num_bytes)

    def load(self) -> torch.Tensor:
        """The tensor again; blocks until the link has brought it. A second one takes the way once more."""
        self.begin()
        tensor = self.inner.load()
        if self._back is not None:
            self._stash.wait(self._back)
        self._back, self.is_expected = None, False
        self._stash.begin_before(self)
        return tensor

    def release(self) -> None:
        self.is_expected = False
        self.inner.release()


def _row(way: int) -> str:
    return HOST_TO_DEVICE if way == IN else DEVICE_TO_HOST


def _tell(traced: Traced, row: str, num_bytes: int, begin_seconds: float, end_seconds: float) -> None:
    traced.add(row, ACTIVATIONS, begin_seconds, end_seconds, num_bytes, is_emulated=True)
