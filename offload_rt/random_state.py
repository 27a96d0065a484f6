"""Random numbers as they were: the states of the generators that a layer draws from, the CPU's and its device's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """Where the generators are. Taking it waits for no device: a GPU's state lies in the host's memory."""

    device: torch.device
    on_cpu: Tensor
    on_device: Tensor | None
    """None for the CPU, and for a device that has no generator of its own."""

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """The state that operations on `device` draw from now."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(device, torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """Makes the generators go on from here."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)

    def equals(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        if (self.on_device is None) != (other.on_device is None) or not torch.equal(self.on_cpu, other.on_cpu):
            return False
        return self.on_device is None or other.on_device is None or torch.equal(self.on_device, other.on_device)


class kept_random_state:
    """A context: what is drawn inside is not missing afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = RandomState.now(self._device)

    def __exit__(self, *exception: object) -> None:
        self._before.restore()
