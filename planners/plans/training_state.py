"""Full fine-tuning as the fixed rule sees it: what trains, and where its state and gradients are placed. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planners.plans.placement import Tier


@dataclass(frozen=True, kw_only=True)
class TrainedSize:
    """A block that trains. Bytes."""

    name: str
    pieces: tuple[int, ...]
    """Of masters and moments, each of which moves as one."""
    gradient_bytes: int
    weight_bytes: int
    """Of weights that stream; 0 where they stay in memory."""

    @property
    def state_bytes(self) -> int:
        return sum(self.pieces)


@dataclass(frozen=True, kw_only=True)
class TrainingSizes:
    """All that trains."""

    blocks: tuple[TrainedSize, ...]
    """In the order of the model."""
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
    stepping_bytes: int = 0
    """DEVICE memory of a piece that is stepped there, with its gradients and new weights. 0 where none can be."""
    log_bytes: int = 0
    """HOST memory of the log that commits go to. 0 without one."""
    saving_bytes: int = 0
    """HOST memory through which state is saved and loaded, between steps."""

    @property
    def state_bytes(self) -> int:
        return sum(block.state_bytes for block in self.blocks)

    @property
    def piece_bytes(self) -> int:
        """The most state that moves as one."""
        return max(max(block.pieces) for block in self.blocks)

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

    in_memory: Mapping[str, int]
    """How many pieces of a block's masters and moments rest in HOST memory: the first ones. The others rest on NVME."""
    gradients: Tier
    """Where gradients wait for the update: HOST or NVME."""
    state_slots: int = 0
    """Pieces of state in HOST memory, on their way from and to NVME."""
    weight_slots: int = 0
    """Blocks' new weights in HOST memory, on their way to NVME."""
    gradient_slots: int = 0
    """Blocks' gradients in HOST memory, where they wait on NVME."""
    on_device: Mapping[str, int] = field(default_factory=dict)
    """How many pieces of a block the device steps, wherever they rest: the last ones. The CPU steps the others."""
    device_slots: int = 0
    """Pieces in DEVICE memory, on their way in, being stepped, or on their way out."""

    def __post_init__(self) -> None:
        if self.gradients is Tier.DEVICE:
            raise ValueError("plan: state: gradients wait in HOST or on NVME")
        for counts, where in ((self.in_memory, "in memory"), (self.on_device, "stepped on the device")):
            for block, count in counts.items():
                if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                    raise ValueError(f"plan: state: pieces of {block} {where} must be a whole number of at least 1")
        for name in ("state_slots", "weight_slots", "gradient_slots", "device_slots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"plan: state: {name} must be a whole number of at least 0, got {value!r}")
        if self.gradients is Tier.NVME and self.gradient_slots < 1:
            raise ValueError("plan: state: gradients that wait on NVME need gradient_slots of at least 1")
        if bool(self.on_device) != bool(self.device_slots):
            raise ValueError(
                f"plan: state: {sum(self.on_device.values())} pieces are stepped on the device through "
                f"{self.device_slots} device_slots: both, or neither"
            )

    @staticmethod
    def from_json(data: dict[str, Any]) -> StatePlacement:
        if not isinstance(data["in_memory"], dict):
            raise ValueError("plan: state: in_memory must be an object: a number of pieces by block")
        if not isinstance(data.get("on_device", {}), dict):
            raise ValueError("plan: state: on_device must be an object: a number of pieces by block")
        return StatePlacement(**{**data, "gradients": Tier(data["gradients"])})

    def in_memory_bytes(self, sizes: TrainingSizes) -> int:
        """Of the masters and moments that rest in HOST memory."""
        return sum(sum(block.pieces[: self.in_memory.get(block.name, 0)]) for block in sizes.blocks)

    def is_all_in_memory(self, sizes: TrainingSizes) -> bool:
        """Whether no masters and moments rest on NVME."""
        return all(self.in_memory.get(block.name, 0) == len(block.pieces) for block in sizes.blocks)

    def stepped_on_device(self, sizes: TrainingSizes, share: float, *, slots: int) -> StatePlacement:
        """With a share, 0 to 1, of each block's pieces stepped on the device, through so many slots of its memory.

        Whole pieces, the nearest number; half a piece counts as one.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"plan: state: a share of {share} of the updates on the device; allowed: 0 to 1")
        counts = {block.name: int(share * len(block.pieces) + 0.5) for block in sizes.blocks}
        on_device = {name: count for name, count in counts.items() if count}
        return replace(self, on_device=on_device, device_slots=slots if on_device else 0)

    def device_bytes(self, sizes: TrainingSizes) -> int:
        """DEVICE memory through which state moves that is stepped there."""
        return self.device_slots * sizes.stepping_bytes

    def filled(self, sizes: TrainingSizes, left_bytes: int) -> StatePlacement:
        """With as many pieces in memory as fit into `left_bytes`, of the first blocks first.

        One piece stays on NVME: so each step is committed, whatever fits.
        """
        in_memory: dict[str, int] = {}
        for block in sizes.blocks:
            for number, piece_bytes in enumerate(block.pieces[: -1 if block is sizes.blocks[-1] else None], 1):
                if piece_bytes > left_bytes:
                    break
                left_bytes -= piece_bytes
                in_memory[block.name] = number
        return replace(self, in_memory=in_memory)

    def memory_bytes(self, sizes: TrainingSizes) -> dict[str, int]:
        """What lies in HOST memory, itemised."""
        waiting = sizes.gradient_bytes
        if self.gradients is Tier.NVME:
            waiting = self.gradient_slots * sizes.largest_gradient_bytes
        items = {
            "optimizer state": self.in_memory_bytes(sizes),
            "optimizer state on its way": self.state_slots * sizes.piece_bytes,
            "new weights on their way": self.weight_slots * sizes.largest_weight_bytes,
            "gradients": waiting,
        }
        not_always = {
            "new weights on their way to DEVICE": sizes.landing_bytes,
            "gradients arriving": sizes.arriving_bytes,
            "commit log": sizes.log_bytes,
        }
        return items | {name: num_bytes for name, num_bytes in not_always.items() if num_bytes}

    def nvme_bytes(self, sizes: TrainingSizes) -> dict[str, int]:
        """What lies on NVME, itemised: two slots of everything that changes."""
        weights = sum(block.weight_bytes for block in sizes.blocks)
        waiting = sizes.gradient_bytes if self.gradients is Tier.NVME else 0
        return {
            "masters, moments and weights that train, twice": 2 * (sizes.state_bytes + weights),
            "gradients": waiting,
        }
