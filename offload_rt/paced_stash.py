"""Layer inputs and swapped activations over an emulated link: put away behind the computation, back ahead of it.

Where DEVICE and HOST are RAM, a stash copies at once. Here each copy takes the link's time besides: on the way out
nobody waits for it; on the way back it begins one tensor ahead, when the one that backward wants first has come.
"""

from __future__ import annotations

import weakref

import torch

from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE, Meter
from offload_rt.stash import Stash, Stashed
from offload_rt.throttle import IN, OUT, Pipe, Ticket


class PacedStash:
    """A stash on the other side of `link`. Waits for it are counted by `meter`."""

    def __init__(self, inner: Stash, link: Pipe, meter: Meter) -> None:
        self._inner = inner
        self.link = link
        self._meter = meter
        self._last: weakref.ref[_PacedStashed] | None = None

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """As the stash inside; the way out is begun, and not waited for."""
        stashed = self._inner.put(tensor)
        if stashed is None:
            return None
        num_bytes = tensor.numel() * tensor.element_size()
        paced = _PacedStashed(stashed, self, self.link.submit(OUT, num_bytes), num_bytes, self._last)
        self._last = weakref.ref(paced)
        return paced

    def wait(self, ticket: Ticket) -> None:
        """Blocks until `ticket` is through."""
        start = self._meter.clock()
        self.link.wait(ticket)
        self._meter.stalled(HOST_TO_DEVICE if ticket.way == IN else DEVICE_TO_HOST, self._meter.clock() - start)


class _PacedStashed:
    def __init__(
        self,
        inner: Stashed,
        stash: PacedStash,
        out: Ticket,
        num_bytes: int,
        previous: weakref.ref[_PacedStashed] | None,
    ) -> None:
        self._inner = inner
        self._stash = stash
        self._out = out
        self._num_bytes = num_bytes
        self._previous = previous
        self._back: Ticket | None = None
        self._is_held = True

    def begin(self) -> None:
        """Puts it on its way back, if it is not."""
        if self._back is None:
            self._stash.wait(self._out)
            self._back = self._stash.link.submit(IN, self._num_bytes)

    def load(self) -> torch.Tensor:
        """The tensor again; blocks until the link has brought it. A second one takes the way once more."""
        self.begin()
        tensor = self._inner.load()
        if self._back is not None:
            self._stash.wait(self._back)
        self._back = None
        before = self._previous
        while before is not None and (stashed := before()) is not None:
            if stashed._is_held:
                stashed.begin()
                break
            before = stashed._previous
        return tensor

    def release(self) -> None:
        self._is_held = False
        self._inner.release()
