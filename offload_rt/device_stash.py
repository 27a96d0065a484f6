"""Layer inputs in HOST memory, for a device whose work is asynchronous: out and back by the device's own copies.

A tensor that is put away stays in the device's memory until its copy is done, whoever lets go of it. When one is
fetched back, the one put away before it is asked for too: backward wants it next, and its copy runs under the layer
that is recomputed meanwhile. So two are in the device's memory at a time. (`stash` has the same where DEVICE is RAM.)
"""

from __future__ import annotations

import weakref

import torch

from offload_rt.arena import Arena, Slot
from offload_rt.stash import Stashed
from offload_rt.transfer import Links, Transfer


class DeviceStash:
    """A `Stash` in an arena of HOST memory."""

    def __init__(self, arena: Arena, links: Links) -> None:
        self._arena = arena
        self.links = links
        self._last: weakref.ref[_DeviceStashed] | None = None

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """As `Stash.put`. Does not block: the copy runs behind what computes `tensor`."""
        source = _bytes_of(tensor.contiguous())
        slot = self._arena.try_acquire(source.numel(), "layer input")
        if slot is None:
            return None
        stashed = _DeviceStashed(self.links, slot, self.links.save(source, slot), tensor, self._last)
        self._last = weakref.ref(stashed)
        return stashed


class _DeviceStashed:
    def __init__(
        self,
        links: Links,
        slot: Slot,
        written: Transfer,
        like: torch.Tensor,
        previous: weakref.ref[_DeviceStashed] | None,
    ) -> None:
        self._links = links
        self._slot: Slot | None = slot
        self._written = written
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device
        self._previous = previous
        self._ahead: tuple[torch.Tensor, Transfer] | None = None

    def load(self) -> torch.Tensor:
        """The tensor again; kernels given from now on are ordered after its arrival. Does not block."""
        tensor, arrival = self._start()
        self._ahead = None
        self._links.wait(arrival)
        before = self._previous() if self._previous is not None else None
        if before is not None and before._slot is not None:
            before._ahead = before._start()
        return tensor

    def release(self) -> None:
        self._slot = None

    def _start(self) -> tuple[torch.Tensor, Transfer]:
        if self._ahead is not None:
            return self._ahead
        if self._slot is None:
            raise RuntimeError("stash: loaded after its release")
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return tensor, self._links.load(self._slot, _bytes_of(tensor), saved=self._written)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
