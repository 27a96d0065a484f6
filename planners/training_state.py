"""Full fine-tuning as the fixed rule sees it: what trains, and where its state and gradients are placed. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planners.placement import Tier


@dataclass(frozen=True, kw_only=True)
class TrainedSize:
    """A block that trains. Bytes."""

    name: str
    state_bytes: int
    """Masters and moments."""
    gradient_bytes: int
    weight_bytes: int
    """Of weights that stream; 0 where they stay in memory."""


@dataclass(frozen=True, kw_only=True)
class TrainingSizes:
    """All that trains."""

    blocks: tuple[TrainedSize, ...]
    piece_bytes: int
    """The most state that moves as one."""
    clips: bool
    """A norm to clip to was declared."""
    commits_each_step: bool
    """False: commits come less often, and no block can be stepped before the norm is known. So it is for adapters."""
    adapters: bool = False
    """Only adapters train: their weights and gradients stay in DEVICE memory, their state alone rests in a tier."""
    landing_bytes: int = 0
    """HOST memory through which new weights come to a device whose own memory holds them."""
    arriving_bytes: int = 0
    """HOST memory through which gradients come from a device to be added to those of other micro-batches."""

    @property
    def state_bytes(self) -> int:
        return sum(block.state_bytes for block in self.blocks)

    @property
    def gradient_bytes(self) -> int:
        return sum(block.gradient_bytes for block in self.blocks)

    @property
    def largest_gradient_bytes(self) -> int:
        return max((block.gradient_bytes for block in self.blocks), default=0)

    @property
    def largest_weight_bytes(self) -> int:
        return max((block.weight_bytes for block in self.blocks), default=0)


@dataclass(frozen=True, kw_only=True)
class StatePlacement:
    """Where the state of what trains rests, and through how much memory it moves."""

    in_memory: tuple[str, ...]
    """Blocks whose masters and moments rest in HOST memory; those of the others rest on NVME."""
    gradients: Tier
    """Where gradients wait for the update: HOST or NVME."""
    state_slots: int = 0
    """Pieces of state in HOST memory, on their way from and to NVME."""
    weight_slots: int = 0
    """Blocks' new weights in HOST memory, on their way to NVME."""
    gradient_slots: int = 0
    """Blocks' gradients in HOST memory, where they wait on NVME."""

    def __post_init__(self) -> None:
        if self.gradients is Tier.DEVICE:
            raise ValueError("plan: state: gradients wait in HOST or on NVME")
        for name in ("state_slots", "weight_slots", "gradient_slots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"plan: state: {name} must be a whole number of at least 0, got {value!r}")
        if self.gradients is Tier.NVME and self.gradient_slots < 1:
            raise ValueError("plan: state: gradients that wait on NVME need gradient_slots of at least 1")

    @staticmethod
    def from_json(data: dict[str, Any]) -> StatePlacement:
        return StatePlacement(**{**data, "in_memory": tuple(data["in_memory"]), "gradients": Tier(data["gradients"])})

    def memory_bytes(self, sizes: TrainingSizes) -> dict[str, int]:
        """What lies in HOST memory, itemised."""
        in_memory = sum(block.state_bytes for block in sizes.blocks if block.name in self.in_memory)
        waiting = sizes.gradient_bytes
        if self.gradients is Tier.NVME:
            waiting = self.gradient_slots * sizes.largest_gradient_bytes
        items = {
            "optimizer state": in_memory,
            "optimizer state on its way": self.state_slots * sizes.piece_bytes,
            "new weights on their way": self.weight_slots * sizes.largest_weight_bytes,
            "gradients": waiting,
        }
        on_a_device = {
            "new weights on their way to DEVICE": sizes.landing_bytes,
            "gradients arriving": sizes.arriving_bytes,
        }
        return items | {name: num_bytes for name, num_bytes in on_a_device.items() if num_bytes}

    def nvme_bytes(self, sizes: TrainingSizes) -> dict[str, int]:
        """What lies on NVME, itemised: two slots of everything that changes."""
        weights = sum(block.weight_bytes for block in sizes.blocks)
        waiting = sizes.gradient_bytes if self.gradients is Tier.NVME else 0
        return {
            "masters, moments and weights that train, twice": 2 * (sizes.state_bytes + weights),
            "gradients": waiting,
        }
