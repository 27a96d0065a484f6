"""What becomes of a layer's activations, by tokens: kept, swapped out, or computed again in backward.

Data only. A policy cuts the sequence into chunks of tokens, and says for each what is done with what autograd would
save of it; the attention call in a layer's middle sees all tokens at once and never runs twice. Two policies with the
same chunks give the same numbers, whatever they do with them. After MEMO (arXiv 2407.12117): its alpha is the share of
tokens in chunks that are swapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from planners.placement import Tier

MAX_CHUNKS = 512
"""Chunks of a sequence nest in each other's stack frames; more were not tried."""


class Action(str, Enum):
    """What is done with what autograd saves of one chunk."""

    KEEP = "keep"
    """It stays in DEVICE memory."""
    SWAP = "swap"
    """It waits in another tier."""
    RECOMPUTE = "recompute"
    """Nothing is saved; the chunk runs again in backward, up to the attention call and from there."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of every row of a batch."""

    num_tokens: int
    action: Action
    tier: Tier | None = None
    """Where a swapped chunk waits: HOST or NVME. None for the others, which wait nowhere."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"activations: a chunk of {self.num_tokens} tokens; at least 1")
        if self.action is Action.SWAP and self.tier not in (Tier.HOST, Tier.NVME):
            where = "nowhere" if self.tier is None else f"to {self.tier.value}, where it is"
            raise ValueError(f"activations: a chunk is swapped {where}; its tier must be host or nvme, or keep it")
        if self.action is not Action.SWAP and self.tier is not None:
            raise ValueError(f"activations: a chunk to {self.action.value} has tier {self.tier.value}; it must be null")


class Span(NamedTuple):
    """Tokens [start, end) of every row of a batch, and what becomes of them."""

    start: int
    end: int
    action: Action
    tier: Tier | None = None


@dataclass(frozen=True, kw_only=True)
class ActivationPolicy:
    """How one layer treats the tokens of a batch."""

    chunks: tuple[Chunk, ...]
    """From the first token on. In a longer sequence the last one repeats; of a shorter one the rest falls off."""
    store_qkv: bool = True
    """Whether kept and swapped chunks save queries, keys and values; otherwise what leads up to them runs again."""

    attention_groups: int = 1
    """Groups of heads of keys and values that attention takes one after the other; at most one for each head. Bounds
    what its kernel needs besides operands and result. None in a single chunk with a graph, which is not cut."""

    def __post_init__(self) -> None:
        if self.attention_groups < 1:
            raise ValueError(f"activations: attention in {self.attention_groups} groups of heads; at least 1")
        if not self.chunks:
            raise ValueError("activations: a policy without chunks; at least one")

    def spans(self, num_tokens: int) -> tuple[Span, ...]:
        """The half-open ranges into which `num_tokens` are cut. ValueError if they are more than `MAX_CHUNKS`."""
        spans: list[Span] = []
        while not spans or spans[-1].end < num_tokens:
            chunk = self.chunks[min(len(spans), len(self.chunks) - 1)]
            start = spans[-1].end if spans else 0
            spans.append(Span(start, min(start + chunk.num_tokens, num_tokens), chunk.action, chunk.tier))
            if len(spans) > MAX_CHUNKS:
                raise ValueError(
                    f"activations: {num_tokens} tokens are more than {MAX_CHUNKS} chunks; make them larger"
                )
        return tuple(spans)

    def num_swapped(self, num_tokens: int, tier: Tier | None = None) -> int:
        """How many of `num_tokens` lie in chunks that are swapped, to `tier` or anywhere."""
        swapped = [span for span in self.spans(num_tokens) if span.action is Action.SWAP]
        return sum(span.end - span.start for span in swapped if tier in (None, span.tier))

    @staticmethod
    def from_json(data: dict[str, Any]) -> ActivationPolicy:
        """Reads what `dataclasses.asdict` gave."""
        return ActivationPolicy(**{**data, "chunks": tuple(_chunk(chunk) for chunk in data["chunks"])})


def _chunk(data: dict[str, Any]) -> Chunk:
    tier = data.get("tier")
    return Chunk(**{**data, "action": Action(data["action"]), "tier": None if tier is None else Tier(tier)})
