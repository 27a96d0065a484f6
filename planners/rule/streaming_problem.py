"""The fixed streaming rule's question: a model's blocks, its head with the loss, its cuts and the budgets, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from planners.plans.plan import Tier
from planners.plans.products import PackedProducts
from planners.plans.training_state import TrainingSizes
from planners.plans.vocabulary import RowsSize
from planners.units import whole_pages

INPUTS_OF_CHUNKS = 3
"""Layer inputs' sizes that a layer in chunks puts away: its input, and attention's result, which may be wider."""


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """A block as the planner sees it."""

    name: str
    stored_bytes: int
    largest_module_bytes: int
    """Decoded bytes of the module that decodes most at once; 0 where nothing is quantized."""
    decoded_bytes: int
    """Decoded bytes of all quantized tensors of the block."""
    streams: bool
    """False: it holds what cannot be fetched on use (buffers and parameters read outside their module)."""
    rows: RowsSize | None = None
    """Of an embedding that is one block by itself; None otherwise."""
    product: RowsSize | None = None
    """Of a linear without a bias that is one block by itself; None otherwise. Both: they are tied."""


@dataclass(frozen=True, kw_only=True)
class LossHeadSize:
    """Final norm, head and loss as the planner sees them."""

    num_tokens: int
    """Of the largest batch."""
    bytes_per_token: int
    """Logits, their gradients and what the loss makes of them, for one token."""
    hidden_bytes_per_token: int
    """Of a hidden state. Tiling holds the gradients of all, besides a tile's logits."""
    tiles: bool
    """False: the model takes its loss in a way that the runtime cannot cut."""
    trains: bool = False
    """The head's own weights do."""

    def peak_bytes(self, chunk_tokens: int | None) -> int:
        """Transient memory for tiles of `chunk_tokens`, for all tokens at once where it is None."""
        if chunk_tokens is None or chunk_tokens >= self.num_tokens:
            return self.num_tokens * self.bytes_per_token
        return chunk_tokens * self.bytes_per_token + self.num_tokens * self.hidden_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class ChunkedSize:
    """Layers by chunks of tokens as the planner sees them, for the largest batch."""

    num_tokens: int
    """Of a sequence."""
    sequence_bytes: int
    """What a layer's backward holds of all tokens: its input, attention's operands and result, and their gradients."""
    pairs_bytes: int = 0
    """Part of it, and of `StreamingProblem.activation_bytes`: what attention takes of pairs of tokens, no chunk's."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """What of a plan decides in which order sums are taken, and random numbers drawn: plans that have it in common give
    the same bits. A run that goes on under other budgets keeps it.
    """

    head_chunk_tokens: int | None
    """Of a tile of the loss; None takes it at once."""
    chunk_tokens: int | None
    """Of the chunks in which layers run; None: whole."""
    layer_major: bool | None
    """Micro-batches go through the layers together; None where that changes nothing, as no layer draws numbers."""
    packed_products: PackedProducts = field(default_factory=dict)
    """See `Plan.packed_products`."""
    head_tile_rows: int | None = None
    """Of the tiles of a head that is never in memory as a whole; None: it is."""

    def describe(self) -> str:
        head, layers = (
            f"{what} by {tokens} tokens" if tokens is not None else f"{what} at once"
            for what, tokens in (("the loss", self.head_chunk_tokens), ("layers", self.chunk_tokens))
        )
        order = {None: "", True: ", micro-batches layer by layer", False: ", micro-batches one after the other"}
        tiles = "" if self.head_tile_rows is None else f", the head by {self.head_tile_rows} rows"
        packed = ", products of few tokens by packed weights" if self.packed_products else ""
        return f"{head}, {layers}{order[self.layer_major]}{tiles}{packed}"


@dataclass(frozen=True, kw_only=True)
class StreamingProblem:
    """What the rule decides from. Bytes; None as a capacity means that the tier is not limited."""

    fingerprint: str
    layers: tuple[BlockSize, ...]
    edges: tuple[BlockSize, ...]
    """Blocks outside the layers, in the order of use."""
    trainable_bytes: int
    """Of what trains, its gradients and optimizer state, what is in DEVICE whatever the plan; and what is
    frozen outside blocks.
    """
    layer_input_bytes: int
    """One layer's input for the largest batch."""
    activation_bytes: int
    """Peak of transient activations of one layer's recompute."""
    passing_bytes: int = 0
    """Part of it: another layer's input, on its way to where it waits or back, on a device whose copies are
    asynchronous."""
    attention_bytes: int = 0
    """What one layer holds while attention's backward runs, whole or by chunks: there is nothing else of it then. On
    the CPU each thread has its part of it."""
    allocator_slack_bytes: int = 0
    """Freed memory that the allocator should be able to hold back; a tight plan grants a quarter of it at most."""
    loss_head: LossHeadSize | None = None
    """None where the model has no head that could be found."""
    device_capacity_bytes: int | None
    host_capacity_bytes: int | None
    nvme_capacity_bytes: int | None
    """None here means that there is no drive."""
    beside_plan_bytes: int = 0
    """Of a budget of DEVICE memory, what no plan may have: on a GPU, CUDA's own."""
    unified: bool
    """DEVICE and HOST are one tier (the CPU device without `host_memory`)."""
    training: TrainingSizes | None = None
    """Of layers that train; None where only adapters do."""
    num_micro_batches: int = 1
    """Of a step, as declared."""
    thread_bytes: int = 0
    """DEVICE memory that libraries keep for each of them but one, where they go through the layers together."""

    stages_pieces: bool = True
    """What waits on NVMe goes there in pieces; False: whole, as on a GPU."""
    fills: bool = False
    """Layers may rest in all memory that is left: it was granted for that, or is a device's own."""
    chunked: ChunkedSize | None = None
    """None where layers cannot run by chunks of tokens."""
    cuts: Cuts | None = None
    """Those that the plan must have; None leaves them to the rule."""

    def layer_bytes(self, chunk_tokens: int | None) -> int:
        """Peak of transient activations of one layer, by chunks of so many tokens or, with None, whole.

        A chunk has half as much again: what the formula for a layer lacks (adapters) counts for more in a small one.
        While attention's backward runs there is none.
        """
        chunked = self.chunked
        if chunk_tokens is None or chunked is None or chunk_tokens >= chunked.num_tokens:
            return max(self.activation_bytes, self.attention_bytes)
        by_tokens = self.activation_bytes - self.passing_bytes - chunked.pairs_bytes
        of_chunk = by_tokens * chunk_tokens // chunked.num_tokens
        return max(chunked.sequence_bytes + of_chunk * 3 // 2, self.attention_bytes)

    def on_their_way_bytes(self, home: Tier, *, by_chunks: bool) -> int:
        """DEVICE memory of what layers in chunks put away in `home`, while copies hold it: a layer's, in both ways
        together (the window of `offload_rt.tiering.device_stash`). Of whole layers `passing_bytes` are.
        """
        if not by_chunks or home is Tier.DEVICE or not self.passing_bytes:
            return 0
        return INPUTS_OF_CHUNKS * whole_pages(self.layer_input_bytes)

    def slack_bytes(self, chunk_tokens: int | None) -> int:
        """Freed memory that the allocator may hold back where a budget has room: at most twice what is in use."""
        if chunk_tokens is None:
            return self.allocator_slack_bytes
        return min(self.allocator_slack_bytes, 2 * (self.trainable_bytes + self.layer_bytes(chunk_tokens)))

    def transient_bytes(self, head_chunk_tokens: int | None, chunk_tokens: int | None = None) -> int:
        """Peak of transient activations: one layer's recompute, or the head with the loss, whichever is more. In whole
        pages, as their arena is.
        """
        head = 0 if self.loss_head is None else self.loss_head.peak_bytes(head_chunk_tokens)
        return whole_pages(max(self.layer_bytes(chunk_tokens), head))
