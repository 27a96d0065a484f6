"""What a plan says: where each block rests, through how many slots it streams, where layer inputs wait for backward.

Data only, frozen, with a versioned JSON form. The same plan runs on a fake device and on a real one; two plans with the
same cuts never differ in the numbers that training gives.

A plan of whole blocks says all in `resident`, `rings` and `layer_inputs`. A plan of byte fractions has `classes`
besides, which then are the truth about where bytes rest; `rings` still say who streams, and through how many slots.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planners.plans.activations import ActivationPolicy
from planners.plans.layout import Arena, Buffer
from planners.plans.placement import (
    Buffers,
    ClassPlan,
    Cuts,
    TokenSplit,
    Update,
    UpdateMode,
    UpdatePlace,
)
from planners.plans.placement import DecodeScope as DecodeScope
from planners.plans.placement import Split as Split
from planners.plans.placement import Tier as Tier
from planners.plans.products import PackedProducts, check_products, products_from_json
from planners.plans.training_state import StatePlacement as StatePlacement
from planners.plans.vocabulary import HeadTiles, Lookups

PLAN_VERSION = 7


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Blocks that stream through a fixed number of equal slots in DEVICE memory."""

    name: str
    blocks: tuple[str, ...]
    """In the order in which forward visits them."""
    num_slots: int
    slot_bytes: int
    """The most that a block streams: its stored bytes, less what of it stays in DEVICE memory."""
    rest: Tier
    """Where the blocks lie when they are in no slot: HOST or NVME. Where `Plan.classes` splits them, the lower one."""

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
    activations: dict[str, ActivationPolicy] | None = None
    """By block, or by the class of its module; a layer that neither names is recomputed whole. Chunks are a cut."""
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Predicted peak by tier, itemised."""
    machine: str = ""
    """Fingerprint of the hardware that the plan was made for; empty: any with the memory."""
    classes: tuple[ClassPlan, ...] = ()
    """Byte fractions, activation policy and updates by class of equal blocks; empty: whole blocks, as above."""
    buffers: Buffers = field(default_factory=Buffers)
    cuts: Cuts | None = None
    """None: a batch goes through whole."""
    update_mode: UpdateMode = UpdateMode.AFTER
    layer_major: bool = False
    """The micro-batches of a `train_batch` go through the model together, layer by layer: a fetch serves them all."""
    packed_products: PackedProducts = field(default_factory=dict)
    """Products with frozen NF4 weights that are not decoded first, by shape and number of tokens. A cut."""
    state: StatePlacement | None = None
    """Of what trains in blocks; None where only adapters train."""
    lookups: Lookups | None = None
    """Embeddings that are read by rows; None: none, blocks are resident or in a ring."""
    head_tiles: HeadTiles | None = None
    """A head that is multiplied with by tiles of its rows; None: none. A cut."""
    boundary: Tier = Tier.DEVICE
    """Where the activations between two layers lie: DEVICE, or HOST, chunk by chunk, where a batch is too long."""
    arenas: tuple[Arena, ...] = ()
    """Where everything lies, if `classes` say what there is: each tier over a step, each class over a chunk."""
    predicted: dict[str, Any] = field(default_factory=dict)
    """What the planner expects of a steady step; see docs/planner.md."""
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
        if self.boundary is Tier.NVME:
            raise ValueError("plan: boundary: activations between layers lie in DEVICE or HOST")
        check_products(self.packed_products)
        deferred = any(update.deferred for entry in self.classes for update in entry.updates)
        if deferred and self.update_mode is not UpdateMode.DEFERRED:
            raise ValueError(f"plan: a deferred update in update mode {self.update_mode.value!r}")

    def entry(self, name: str) -> ClassPlan:
        """The class `name`. KeyError if the plan has none."""
        for entry in self.classes:
            if entry.name == name:
                return entry
        raise KeyError(f"plan: no class {name!r}")

    def weights_of(self, block: str) -> Split | None:
        """Which bytes of `block` rest where; None if it is in no class and so whole."""
        return next((entry.weights for entry in self.classes if block in entry.blocks), None)

    def arena(self, name: str) -> Arena:
        """The arena `name`. ValueError if the plan has none."""
        for arena in self.arenas:
            if arena.name == name:
                return arena
        raise ValueError(f"plan: no arena {name!r}; it says {[arena.name for arena in self.arenas]}")

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
            if data.get("version") != PLAN_VERSION:
                raise ValueError(
                    f"plan: version {data.get('version')} is not readable here, which reads {PLAN_VERSION}"
                )
            rings = tuple(
                Ring(**{**ring, "blocks": tuple(ring["blocks"]), "rest": Tier(ring["rest"])})
                for ring in data.pop("rings")
            )
            cuts = data["cuts"]
            activations = data.get("activations")
            if data.get("state") is not None:
                data["state"] = StatePlacement.from_json(data["state"])
            if data.get("lookups") is not None:
                data["lookups"] = Lookups.from_json(data["lookups"])
            if data.get("head_tiles") is not None:
                data["head_tiles"] = HeadTiles.from_json(data["head_tiles"])
            if activations is not None:
                data["activations"] = {name: ActivationPolicy.from_json(one) for name, one in activations.items()}
            return Plan(
                **{
                    **data,
                    "rings": rings,
                    "resident": tuple(data["resident"]),
                    "layer_inputs": Tier(data["layer_inputs"]),
                    "decode_scope": DecodeScope(data["decode_scope"]),
                    "classes": tuple(_class_plan(entry) for entry in data["classes"]),
                    "buffers": Buffers(**data["buffers"]),
                    "cuts": None if cuts is None else Cuts(**cuts),
                    "packed_products": products_from_json(data.get("packed_products", {})),
                    "update_mode": UpdateMode(data["update_mode"]),
                    "boundary": Tier(data["boundary"]),
                    "arenas": tuple(_arena(entry) for entry in data["arenas"]),
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


def _class_plan(data: dict[str, Any]) -> ClassPlan:
    return ClassPlan(
        name=data["name"],
        blocks=tuple(data["blocks"]),
        weights=Split(**data["weights"]),
        tokens=tuple(TokenSplit(**tokens) for tokens in data["tokens"]),
        updates=tuple(
            Update(**{**update, "tier": Tier(update["tier"]), "place": UpdatePlace(update["place"])})
            for update in data["updates"]
        ),
    )


def _arena(data: dict[str, Any]) -> Arena:
    buffers = tuple(Buffer(**buffer) for buffer in data["buffers"])
    return Arena(**{**data, "tier": Tier(data["tier"]), "buffers": buffers})
