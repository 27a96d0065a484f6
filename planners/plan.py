"""What a plan says: where each block rests, through how many slots it streams, where layer inputs wait for backward.

Data only, frozen, with a versioned JSON form. The same plan runs on a fake device and on a real one; two plans never
differ in the numbers that training gives.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

PLAN_VERSION = 1


class Tier(str, Enum):
    """Where bytes are. On the CPU device without `host_memory`, DEVICE and HOST are one."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


class DecodeScope(str, Enum):
    """How much of a block's NF4 weights is decoded at once. A choice of speed against memory, not of numbers."""

    LINEAR = "linear"
    """One module's weights at a time; decoded again for its backward product."""
    LAYER = "layer"
    """Linear by linear in forward; in backward each is decoded once and held until the layer is done."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Blocks that stream through a fixed number of equal slots in DEVICE memory."""

    name: str
    blocks: tuple[str, ...]
    """In the order in which forward visits them."""
    num_slots: int
    slot_bytes: int
    """The largest block's stored bytes."""
    rest: Tier
    """Where the blocks lie when they are in no slot: HOST or NVME."""

    @property
    def device_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before the first step."""

    fingerprint: str
    """Of the workload the plan was made for; a plan runs only on that."""
    planner: str
    """Which rule made it."""
    resident: tuple[str, ...]
    """Blocks that stay in DEVICE memory from start to end."""
    rings: tuple[Ring, ...]
    layer_inputs: Tier = Tier.DEVICE
    """Where the input of each layer waits until its backward recomputes it."""
    decode_scope: DecodeScope = DecodeScope.LINEAR
    head_chunk_tokens: int | None = None
    """Hidden states that go through final norm, head and loss at a time; None takes all at once. A cut."""
    allocator_slack_bytes: int = 0
    """Freed memory that the allocator may hold back before it is told to give it back. Costs time where it is small."""
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Predicted peak by tier, itemised."""
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        if self.version != PLAN_VERSION:
            raise ValueError(f"plan: version {self.version} is not readable here, which reads {PLAN_VERSION}")
        if self.head_chunk_tokens is not None and self.head_chunk_tokens < 1:
            raise ValueError(f"plan: head_chunk_tokens is {self.head_chunk_tokens}; at least 1, or null")
        for ring in self.rings:
            if ring.num_slots < 1:
                raise ValueError(f"plan: ring {ring.name!r} has {ring.num_slots} slots; at least 1")
            if ring.rest is Tier.DEVICE:
                raise ValueError(f"plan: ring {ring.name!r} rests in DEVICE; list its blocks as resident")

    def predicted_bytes(self, tier: Tier) -> int:
        """Predicted peak of managed bytes in `tier`."""
        return sum(self.peak_bytes.get(tier.value, {}).values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what `to_json` wrote. ValueError names what is missing or unknown."""
        try:
            data: Any = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError(f"plan: expected an object, got {type(data).__name__}")
            rings = tuple(
                Ring(**{**ring, "blocks": tuple(ring["blocks"]), "rest": Tier(ring["rest"])})
                for ring in data.pop("rings")
            )
            return Plan(
                **{
                    **data,
                    "rings": rings,
                    "resident": tuple(data["resident"]),
                    "layer_inputs": Tier(data["layer_inputs"]),
                    "decode_scope": DecodeScope(data["decode_scope"]),
                }
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: malformed: {type(error).__name__}: {error}") from error

    @staticmethod
    def load(path: Path) -> Plan:
        """Reads a plan file. OSError if it cannot be opened, ValueError if it is not a plan."""
        try:
            return Plan.from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
