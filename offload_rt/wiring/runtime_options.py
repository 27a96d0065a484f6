"""Switches that tests and the stress mode turn, and the device that they may put in place of the machine's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from offload_rt.errors import ConfigError
from offload_rt.memory.arena import Slot
from offload_rt.memory.transients import LEAST_BYTES
from offload_rt.optimizer.pieces import PIECE_ELEMENTS
from offload_rt.quantized.nf4_products import Way
from offload_rt.transfers.device_streams import Device
from planners.plans.activations import ActivationPolicy
from planners.plans.placement import UpdateMode
from planners.plans.plan import DecodeScope, Tier
from planners.plans.products import PackedProducts
from planners.plans.training_state import StatePlacement
from planners.rule.filling import Fill
from planners.rule.streaming_problem import Cuts


class MemoryMeter(Protocol):
    """A context manager that counts what torch allocates inside."""

    peak_bytes: int
    """The most that was live at once, of what was allocated inside. Once it is left."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...


class TensorDevice(Device, Protocol):
    """A device with streams whose memory torch computes in."""

    @property
    def device(self) -> torch.device: ...

    def meter(self) -> MemoryMeter:
        """Counts what its allocator hands out, arenas included."""

    def keep_within(self, budget_bytes: int) -> None:
        """Gives freed memory back where all that the process holds of the device is more than `budget_bytes`."""

    @property
    def pageable_bytes(self) -> int:
        """HOST memory, of what was not given back, that could not be made reachable for the device's own copies."""

    def pass_through(self, memory: Slot | None) -> None:
        """Locks HOST `memory`, which no copy has used, for `rings`; None takes them away. No copy may be under way.
        Raises `PinningRefused`: then there are none.
        """


DEVICE_SLOTS = 4
"""Pieces of `RuntimeOptions.device_share` in DEVICE memory: one comes, one is stepped, one goes, one to spare."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Switches that tests and the stress mode turn; none changes a number that training gives, but for cuts, which
    change the order of sums (tiles of the loss and of the head, activations by chunks, packed products).
    """

    record: bool = False
    """Keep every transfer and use for the happens-before check."""
    poison: bool = False
    """Fill memory with NaN before it is leased and after it is returned."""
    delay_seconds: float = 0.0
    """Start every transfer late by a random time up to this."""
    num_slots: int | None = None
    """Slots of the layer ring, in place of the plan's."""
    stream_edges: bool | None = None
    """Stream embedding and head although the budget would hold them."""
    look_up_rows: bool = True
    """Where `stream_edges` is set: embeddings are read by rows, not whole."""
    head_tile_rows: int | None = None
    """Where `stream_edges` is set: rows of the head in memory at a time, in place of all. Of one that is tied to the
    embedding only with `look_up_rows`."""
    room_bytes: int | None = None
    """Of rows of embeddings in DEVICE memory at a time, in place of the plan's; twice that of pages from NVMe."""
    layer_inputs: Tier | None = None
    """Where layer inputs wait, in place of the plan's choice."""
    decode_scope: DecodeScope | None = None
    leave_out_products: bool = True
    """Recompute layers without their last product, where nobody wants its result."""
    placed_bytes: int = LEAST_BYTES
    """The least result of an operation that lies in the activations' arena (see `transients`); 0 leaves all results to
    the allocator."""
    head_chunk_tokens: int | None = None
    """Rows of a tile of the loss head, in place of the plan's."""
    activations: ActivationPolicy | Mapping[str, ActivationPolicy] | None = None
    """Of all layers, or of some by their blocks' names (others are recomputed whole), in place of the plan's."""
    packed_products: PackedProducts | Literal["measured"] | None = None
    """In place of the plan's; "measured": the fastest that this device has, see `nf4_products`. A cut."""
    product_ways: Mapping[str, Way] | None = None
    """What these may be, in place of what is installed."""
    fill: bool = True
    """Layers, and what they save, rest in memory that the fixed rule's plan leaves."""
    rest: Tier | None = None
    """Where weights and state rest, all of them, in place of the rule's choice: in HOST or on NVME."""
    state: StatePlacement | None = None
    """Of what trains in blocks, in place of the plan's."""
    weight_shares: tuple[float, float] | None = None
    """Of each block that streams, how much of it stays in DEVICE and how much rests in HOST, in place of the plan's; as
    far as tensors and pages can be cut."""
    update_mode: UpdateMode | None = None
    device_share: float | None = None
    """Of every block's pieces, the share that the device steps, in place of the plan's."""
    layer_major: bool | None = None
    serial_updates: bool = False
    """Step blocks on the calling thread. On where transfers are recorded."""
    piece_elements: int = PIECE_ELEMENTS
    """Parameters whose state moves as one. Part of what training state is identified by."""
    device: TensorDevice | None = None
    """DEVICE, in place of the machine's."""
    replan: bool = True
    """Make the optimiser's plan again where the machine has drifted from it."""
    cuts: Cuts | None = None
    """Those that the plan must have; see `cuts`."""

    def __post_init__(self) -> None:
        if self.rest is Tier.DEVICE:
            raise ConfigError("rest: all weights and state can rest in HOST or NVME; in DEVICE they are where they fit")

    @property
    def fills(self) -> Fill:
        """What the fixed rule puts into memory that is left: nothing where something here changes what a plan takes."""
        says = (
            self.rest, self.num_slots, self.stream_edges, self.weight_shares, self.layer_inputs, self.decode_scope,
            self.head_chunk_tokens, self.activations, self.state, self.layer_major, self.device_share,
        )  # fmt: skip
        if not self.fill or any(each is not None for each in says):
            return Fill.NOTHING
        return Fill.LAYERS if self.packed_products else Fill.ALL  # which need layers that are computed again
