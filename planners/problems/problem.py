"""The planner's question: a machine, a workload in classes of equal blocks, and what the runtime can do.

    Problem = Hardware + Workload + Capabilities

A workload says per token and block what must be computed, what backward needs again, and what trains. `model_workload`
makes one from a model's shape, the runtime from a model at hand.

[Note: trains in DEVICE]
Adapters are small. Their weights and gradients stay in DEVICE memory; their optimizer state rests where the plan says.

[Note: micro-batches]
A step may have several, one after the other: each goes forward and backward through all blocks, with the same weights,
which it fetches by itself. Or they go through each block together, so that one fetch serves all, and the layer inputs
of all of them wait. Gradients are added up in HOST (DEVICE, where that is the same) and all of them wait there; updates
come with the last one's backward, or after it. What a plan says of activations holds for each.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import Enum

from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.plans.vocabulary import HeadTiles, Lookups, RowsSize
from planners.problems.hardware import Hardware
from planners.problems.measured import MeasuredSeconds
from planners.shapes.trace import ITEM_BYTES, Saved, Transient

HEAD_TILE_TOKENS = 1024
"""The loss is computed over so many tokens at a time, so that logits never exist whole."""


class Training(str, Enum):
    """What trains."""

    FULL = "full"
    ADAPTERS = "adapters"


@dataclass(frozen=True, kw_only=True)
class BlockClass:
    """Equal blocks. All rates are per token and block."""

    name: str
    blocks: tuple[str, ...]
    positions: tuple[int, ...]
    """Of the blocks, in the order in which forward visits all blocks of the model."""
    is_layer: bool
    stored_bytes: int
    """Of the weights, as they rest and stream."""
    decoded_bytes: int
    """16-bit bytes of the quantized weights; 0 where nothing is."""
    largest_linear_bytes: int
    """The most that one module decodes; 0 where nothing is quantized."""
    trainable_params: int
    forward_flops: float
    backward_flops: float
    attention_flops: float
    """Forward, the mean over a sequence."""
    moved_bytes: float
    """By the element-wise operations of forward."""
    saved: tuple[Saved, ...]
    attention_bytes: float
    """Queries, keys, values and attention's result; 0 without attention."""
    attention_groups: int
    """Into how many groups attention can be cut (key heads)."""
    transients: tuple[Transient, ...]
    """What comes and goes within a pass, per token of a chunk."""
    num_operations: int = 1
    """Of forward, in which `saved` and `transients` count ticks."""
    tile_bytes: int = 0
    """Transient, whatever the chunk (a tile of logits)."""
    attention_tiles_bytes: int = 0
    """Transient, whatever the chunk, while attention's backward runs (tiles of a CPU's threads)."""
    alone_bytes: int = 0
    """Transient, in a tick of backward's own in which nothing is there that is computed again (attention's backward, of
    a layer that is one operation)."""
    visits_backward: bool = True
    """Its weights are needed in backward."""
    weight_cuts: tuple[int, ...] = ()
    """How many of a block's first bytes can stay in DEVICE memory while the rest streams, ascending from 0; then HOST
    holds whole pages. Empty: bytes are cut anywhere."""
    measured: MeasuredSeconds | None = None
    """Counts in place of FLOPs, moved bytes and the rates of decoding."""
    weights_stay: bool = False
    """In DEVICE memory, whatever the plan."""
    state_cuts: tuple[tuple[int, int], ...] = ()
    """(parameters, bytes): how many of a block's first parameters can have their state in memory while that of the
    others rests on NVME, and what it takes; ascending from (0, 0) to all. Empty: it is cut anywhere, at
    `Workload.state_bytes_per_param`."""
    rows: RowsSize | None = None
    """Of a frozen embedding; None of all else. See `Workload.rows_of`."""
    product: RowsSize | None = None
    """Of the matrix of a frozen head without a bias; None of all else. See `Workload.tiles_of`. Both: they are tied."""
    in_tiles: bool = False
    """It goes by tiles, be there room for the whole or not: a cut that all plans have in common."""
    tile_rows: int | None = None
    """Of a tile, whole pages, as a run that goes on has begun; None: as the matrix says (`RowsSize.tile_rows`)."""

    @property
    def count(self) -> int:
        return len(self.blocks)

    @property
    def streamed_bytes(self) -> int:
        """Of a block's weights, the most that can stream."""
        return 0 if self.weights_stay else self.stored_bytes

    @property
    def beside_product_bytes(self) -> int:
        """What stays of a head that goes by tiles. A block that is cut at pages is its matrix, and rests whole."""
        return 0 if self.product is None or self.weight_cuts else self.stored_bytes - self.product.num_bytes


@dataclass(frozen=True, kw_only=True)
class DeviceSteps:
    """How a device steps pieces of state that rest elsewhere, where gradients go to HOST and come back with it."""

    num_slots: int
    """Pieces in DEVICE memory, on their way in, being stepped, or on their way out."""
    slot_bytes: int
    """Of a piece with its gradients and its new weights."""
    cpu_seconds_per_param: float = 0.0
    """What a parameter that the device steps costs the processor, which takes its gradients as they arrive, and whose
    memory the copies use."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step computes."""

    name: str
    training: Training
    classes: tuple[BlockClass, ...]
    hidden: int
    batch_size: int
    seq_len: int
    state_bytes_per_param: int
    """Master weight (where it is not the weight itself) and moments."""
    gradient_bytes_per_param: int
    weight_bytes_per_param: int
    """Of a parameter that trains."""
    clips: bool = False
    """A global norm is asked for."""
    redo_probability: float = 0.02
    """That a speculative step has to be done again."""
    commit_every: int | None = None
    """Steps between durable commits; None: none."""
    slab_bytes: int = 32 << 20
    """Of a model that is read in or saved, at once; two of them are in memory."""
    state_piece_bytes: int | None = None
    """The most state that moves as one; `Buffers.state_slots` are of this size then. None: see
    `optimizer_state.buckets`."""
    head_tile_tokens: int = HEAD_TILE_TOKENS
    """That go through the head at once."""
    log_bytes: int | None = None
    """What NVME holds of everything that changes, wherever it rests. None: two copies of what rests there, and of what
    is committed."""
    input_staging_bytes: int | None = None
    """HOST memory through which layer inputs pass to and from NVMe, where they have a way of their own: then DEVICE
    memory holds the one in use. None: like all else that is swapped they go by swap slots, and as many in HOST."""
    device_steps: DeviceSteps | None = None
    """None: what the device steps has its gradients there, and its state moves in buckets."""
    micro_batches: int = 1
    """Of a step, each of `batch_size` sequences: [Note: micro-batches]."""
    layer_major: bool = False
    """They go through each block together, in one pass."""
    summed_gradient_bytes_per_param: int = 0
    """Of a gradient that waits to be added to, where there are several and the streamed weights train."""
    summing_seconds_per_param: float = 0.0
    """For which a gradient keeps the processor that takes it from a device before the last micro-batch."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def passes(self) -> int:
        """That a step makes through all blocks, forward and backward."""
        return 1 if self.layer_major else self.micro_batches

    @property
    def together(self) -> int:
        """Micro-batches that a pass has."""
        return self.micro_batches // self.passes

    @property
    def pass_rows(self) -> int:
        """Sequences of a pass."""
        return self.together * self.batch_size

    @property
    def pass_tokens(self) -> int:
        return self.together * self.tokens

    @property
    def sums_gradients(self) -> bool:
        """Whether those of streamed weights wait for further micro-batches. Adapters' do where they are made."""
        return self.mutable and self.micro_batches > 1

    @property
    def waiting_gradient_bytes_per_param(self) -> int:
        """Of a gradient that waits for its update."""
        return self.summed_gradient_bytes_per_param if self.sums_gradients else self.gradient_bytes_per_param

    @property
    def num_blocks(self) -> int:
        return sum(entry.count for entry in self.classes)

    @property
    def trainable_params(self) -> int:
        return sum(entry.count * entry.trainable_params for entry in self.classes)

    @property
    def pinned(self) -> bool:
        """What trains stays in DEVICE memory. See [Note: trains in DEVICE]."""
        return self.training is Training.ADAPTERS

    @property
    def mutable(self) -> bool:
        """The streamed weights themselves change."""
        return self.training is Training.FULL

    def in_host(self, tier: Tier, place: UpdatePlace) -> bool:
        """Whether gradients wait in HOST that update state in `tier`."""
        return place is UpdatePlace.CPU or (self.device_steps is not None and tier is not Tier.DEVICE)

    @property
    def boundary_bytes(self) -> int:
        """Activations between two layers, of a pass."""
        return ITEM_BYTES * self.hidden * self.pass_tokens

    @property
    def measured_chunk_tokens(self) -> int | None:
        """Of the chunks in which its layers were timed, and so have to run; None: they were timed whole, or not."""
        timed = (entry.measured for entry in self.classes if entry.is_layer)
        return next((one.chunks.num_tokens for one in timed if one is not None and one.chunks is not None), None)

    @property
    def is_measured(self) -> bool:
        """Whether its layers were timed, and what they hold was counted."""
        return any(entry.is_layer and entry.measured is not None for entry in self.classes)

    def goes_apart(self, saved: Saved) -> bool:
        """Whether a saved tensor has a way of its own, see `input_staging_bytes`."""
        return self.input_staging_bytes is not None and not saved.recomputable

    def rows_of(self, entry: BlockClass) -> RowsSize | None:
        """Of a class that is read by rows where it is not resident, for this batch; None where it streams whole, or is
        multiplied with, too.

        Rows move no more than the whole does, through a smaller room, and what streams by itself is no faster than what
        is resident: so a slot for the whole is not offered.
        """
        if entry.rows is None or entry.product is not None:
            return None
        size = replace(entry.rows, most_rows=self.tokens)
        return size if size.is_worth_it() else None

    def tiles_of(self, entry: BlockClass, rest: Tier = Tier.HOST) -> HeadTiles | None:
        """Of a head that is multiplied with by tiles where it is not resident; None where it streams whole, as it does
        if another block shares its slot. By itself in a slot it would stay there, and be as good as resident.
        """
        others = [other for other in self.classes if not other.is_layer and other.stored_bytes and other != entry]
        if entry.product is None:
            return None
        if not entry.in_tiles and any(self.rows_of(other) is None for other in others):
            return None
        tile_rows = entry.product.tile_rows() if entry.tile_rows is None else entry.tile_rows
        tiles = HeadTiles.of(
            entry.blocks[0], entry.product, rest, tile_rows=tile_rows,
            num_tokens=min(self.head_tile_tokens, self.tokens), batch_tokens=self.tokens,
        )  # fmt: skip
        rooms = tiles.slots_bytes + tiles.product_bytes
        if entry.rows is not None:
            rooms += Lookups.of({entry.name: replace(entry.rows, most_rows=self.tokens)}, rest).most_room_bytes
        return tiles if rooms < entry.product.num_bytes or entry.in_tiles else None

    def looked_up_of(self, entry: BlockClass) -> RowsSize | None:
        """Of a class whose rows are looked up where it is not resident: read by rows, or tied to a head by tiles."""
        if entry.rows is None or (self.rows_of(entry) is None and self.tiles_of(entry) is None):
            return None
        return replace(entry.rows, most_rows=self.tokens)

    def in_ring(self, entry: BlockClass) -> bool:
        """Whether the blocks of a class go through slots of their whole size where they do not stay."""
        return entry.streamed_bytes > 0 and self.rows_of(entry) is None and self.tiles_of(entry) is None

    @property
    def useful_flops(self) -> float:
        """Of one step, nothing counted twice: what recomputation costs is not useful."""
        return (
            self.micro_batches
            * self.tokens
            * sum(
                entry.count * (entry.forward_flops + entry.backward_flops + 3 * entry.attention_flops)
                for entry in self.classes
            )
        )

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the runtime that will run the plan can do. The default is all that a plan can say."""

    update_modes: tuple[UpdateMode, ...] = tuple(UpdateMode)
    device_updates: bool = True
    """Optimizer states can be stepped on the device, wherever they rest."""
    token_chunks: bool = True
    """A sequence can go through a block in chunks."""
    token_policy: bool = True
    """Saved tensors other than layer inputs can be kept and swapped."""
    batch_cuts: bool = True
    """A batch can go through a block in parts, be they whole sequences. False: all its sequences go together, and a
    chunk has its tokens of each of them."""
    input_shares: bool = True
    """Layer inputs can wait in several tiers, by tokens. False: all of them in one."""
    token_shares: bool = True
    """Any tokens of a sequence can be treated differently. False: what a block saves of a chunk beside its input is
    kept, swapped to one tier, or computed again as a whole; other chunks and other blocks of its class may differ.
    """
    state_tiers: tuple[Tier, ...] = tuple(Tier)
    """Where optimizer state can rest. Restricts full fine-tuning and adapters alike."""
    reads_ahead: bool = True
    """A block can be read into HOST before it has a slot in DEVICE memory."""
    whole_weights: bool = False
    """Weights that train rest as a whole in one tier, those of all blocks that can stream in the same."""
    memory_steps_after: bool = False
    """State in memory has one copy, which is stepped after the last backward in every update mode. If there is any,
    gradients of all blocks wait for that, and weights do not rest on NVME unless all updates come after."""
    gradients_apart: bool = False
    """Gradients that wait until the end of a step have memory of their own. False: it may be that of activations which
    their block's backward was the last to need."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The whole question."""

    hardware: Hardware
    workload: Workload
    capabilities: Capabilities = Capabilities()
    max_written_bytes: int | None = None
    """To the drives, per step. None: wear has a small price, and no limit."""
    slack_bytes: int = 0
    """Of what is reserved in DEVICE memory, for freed memory that an allocator holds back."""

    @property
    def machine(self) -> str:
        """Fingerprint of the hardware."""
        return _fingerprint(self.hardware)


def _fingerprint(record: Hardware | Workload) -> str:
    text = json.dumps(asdict(record), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
