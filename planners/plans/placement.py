"""Where the bytes of a class of equal blocks rest, and what moves when. Data only.

A *class* is a set of blocks of equal shape that are treated alike: fractions of a class are byte ranges of every one
of its blocks, not whole blocks, which loses nothing and needs no choice of which block is the lucky one. All ranges
are half-open and follow each other in the order of the fields:

    weights of a block     [0, device) DEVICE   [device, +host) HOST   [.., +nvme) NVME            bytes
    a saved tensor         [0, recompute) again   [.., +nvme)   [.., +host)   [.., +device)        tokens of a sequence
    parameters to update   one range for each `Update`, in order                                   parameters of a block
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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


class UpdateMode(str, Enum):
    """When the optimizer steps. What each needs besides time is in docs/planner.md."""

    BACKWARD = "backward"
    """Each block as its gradients arrive. The global norm is not known then: not for clipping."""
    SPECULATIVE = "speculative"
    """As BACKWARD, on the assumption that the norm needs no clipping; redone before the commit where it did.
    Gradients stay until the commit, and what is updated has a second copy."""
    AFTER = "after"
    """All blocks after the last backward, when the norm is known. Gradients stay until then."""
    DEFERRED = "deferred"
    """A share during backward, the rest during the next forward, each block before it is used. The commit moves."""


class UpdatePlace(str, Enum):
    """Whose arithmetic steps the parameters."""

    CPU = "cpu"
    DEVICE = "device"


def check_not_negative(record: object, what: str, names: tuple[str, ...]) -> None:
    """Raises ValueError where one of these fields of a part of a plan is no whole number of at least 0."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"plan: {what}: {name} must be a whole number of at least 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The weights of one block by tier, in bytes."""

    device_bytes: int
    host_bytes: int
    nvme_bytes: int

    def __post_init__(self) -> None:
        check_not_negative(self, "weights", ("device_bytes", "host_bytes", "nvme_bytes"))

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes + self.nvme_bytes

    @property
    def streamed_bytes(self) -> int:
        """What a fetch brings into a slot."""
        return self.host_bytes + self.nvme_bytes


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One saved tensor of every block of a class: which tokens of each sequence go where between the passes."""

    name: str
    recompute_tokens: int
    nvme_tokens: int
    host_tokens: int
    device_tokens: int
    bytes_per_token: float = 0.0
    """What the planner was told that it takes, in each sequence of a batch."""

    def __post_init__(self) -> None:
        check_not_negative(self, f"tokens of {self.name!r}", _TOKEN_FIELDS)
        if not 0 <= self.bytes_per_token < 1 << 60:
            raise ValueError(f"plan: tokens of {self.name!r}: {self.bytes_per_token!r} bytes per token")

    @property
    def total_tokens(self) -> int:
        return self.recompute_tokens + self.nvme_tokens + self.host_tokens + self.device_tokens


_TOKEN_FIELDS = ("recompute_tokens", "nvme_tokens", "host_tokens", "device_tokens")


@dataclass(frozen=True, kw_only=True)
class Update:
    """A range of the parameters of every block of a class: where their state rests, who steps them, when."""

    params: int
    tier: Tier
    """Of master weights and moments."""
    place: UpdatePlace
    deferred: bool = False
    """During the next forward (`UpdateMode.DEFERRED` only)."""

    def __post_init__(self) -> None:
        check_not_negative(self, "update", ("params",))
        if self.tier is Tier.DEVICE and self.place is UpdatePlace.CPU:
            raise ValueError("plan: update: state that rests in DEVICE is stepped there, not on the CPU")


@dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """What is decided for every block of one class."""

    name: str
    blocks: tuple[str, ...]
    weights: Split
    tokens: tuple[TokenSplit, ...] = ()
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """How many of each transient buffer there are. Slots of weight rings are in `Ring`."""

    host_slots: int = 3
    """HOST staging of weights that come from NVME, in blocks."""
    swap_slots: int = 2
    """Chunks of swapped activations on their way in either direction, the one in use included."""
    gradient_slots: int = 2
    """Blocks' gradients in DEVICE memory."""
    host_gradient_slots: int = 3
    """Blocks' gradients in HOST memory, where they do not stay until the commit."""
    state_slots: int = 4
    """Buckets (or pieces, see `Workload.state_piece_bytes`) of optimizer state in HOST memory, on their way from and to
    NVME."""
    buckets_per_block: int = 1
    """Pieces in which a block's optimizer state moves."""
    weight_slots: int = 2
    """Blocks' new weights in HOST memory on their way to NVME, where weights that train rest as a whole."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"plan: buffers: {name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Choices that change the order of a sum, and so the last bits of a result."""

    chunk_tokens: int
    """Tokens that go through a block together: whole sequences (micro-batches), or a part of one."""
    attention_groups: int = 1
    """Groups of heads that attention takes one after the other, where a chunk is less than a sequence. More than one:
    queries, keys, values and results pass through HOST between the groups."""

    def __post_init__(self) -> None:
        check_not_negative(self, "cuts", ("chunk_tokens", "attention_groups"))
        if self.chunk_tokens < 1 or self.attention_groups < 1:
            raise ValueError("plan: cuts: chunk_tokens and attention_groups are at least 1")
