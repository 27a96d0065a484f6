"""What becomes of a layer's activations, by tokens and by groups: kept, swapped out, or computed again in backward.

Data only. A policy cuts the sequence into chunks of tokens, and says for each what is done with what autograd would
save of it; the attention call in a layer's middle sees all tokens at once and never runs twice. Two policies with the
same chunks give the same numbers, whatever they do with them. After MEMO (arXiv 2407.12117): its alpha is the share of
tokens in chunks that are swapped.

    layer     input ─ norm, projections ─ q, k, v ─ attention ─ its result ─ projection, residual, norm, MLP ─ output
    group             before              qkv                   result       after

[Note: what each group costs to compute again]
`before` and `qkv`: the way up to attention once more, each; together twice. `after`: the way from there on once more,
which begins at the attention's result, unless the layer uses more of the way up to attention than its input (a gate):
then that runs as well. `result`: never. What follows attention may also hold on to the graph of what precedes it (one
norm for attention and MLP), hence `before` is computed again only where `after` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from planners.plans.placement import Tier

ALL_TOKENS = 1 << 40
"""More than any sequence has."""
MAX_CHUNKS = 512
"""Chunks of a sequence nest in each other's stack frames; more were not tried."""

POLICY_VERSION = 2
"""Of the JSON form. Version 1 had no groups and no field for its version; it is read as well."""


class Action(str, Enum):
    """What is done with what autograd saves."""

    KEEP = "keep"
    """It stays in DEVICE memory."""
    SWAP = "swap"
    """It waits in another tier."""
    RECOMPUTE = "recompute"
    """Nothing is saved; it is made again in backward."""


class Group(str, Enum):
    """What autograd saves of a chunk, by where in the layer it is made."""

    BEFORE = "before"
    """On the way from the layer's input to queries, keys and values."""
    QKV = "qkv"
    """Queries, keys and values, as the attention call gets them."""
    RESULT = "result"
    """The attention's result."""
    AFTER = "after"
    """From there on: mostly what the MLP saves."""


GROUP_SHARES = {Group.BEFORE: 0.5, Group.QKV: 0.25, Group.RESULT: 0.25, Group.AFTER: 1.0}
"""Of what a layer's recompute is estimated to need at once, at most so much is saved in a group. Counted over eight
architectures, with and without adapters: 0.36, 0.10, 0.03 and 0.92; together no more than all of it."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What becomes of one group of a chunk."""

    action: Action
    tier: Tier | None = None
    """Where it waits if it is swapped: HOST or NVME. None for the others, which wait nowhere."""

    def __post_init__(self) -> None:
        _check_tier("a group", self.action, self.tier)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of every row of a batch."""

    num_tokens: int
    action: Action
    """For all groups that have no treatment of their own."""
    tier: Tier | None = None
    """Where a swapped chunk waits: HOST or NVME. None for the others, which wait nowhere."""
    before: Treatment | None = None
    qkv: Treatment | None = None
    result: Treatment | None = None
    """None: with the layer's input, wherever the plan puts that."""
    after: Treatment | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"activations: a chunk of {self.num_tokens} tokens; at least 1")
        _check_tier("a chunk", self.action, self.tier)
        if self.result is not None and self.result.action is Action.RECOMPUTE:
            raise ValueError("activations: result: keep or swap it; attention never runs twice")
        before, after = (self.action if own is None else own.action for own in (self.before, self.after))
        if before is Action.RECOMPUTE and after is not Action.RECOMPUTE:
            raise ValueError(
                f"activations: before: cannot be recomputed where after is to {after.value}: what follows attention "
                f"may need the graph of what precedes it. Recompute both, or keep or swap before"
            )


def _check_tier(what: str, action: Action, tier: Tier | None) -> None:
    if action is Action.SWAP and tier not in (Tier.HOST, Tier.NVME):
        where = "nowhere" if tier is None else f"to {tier.value}, where it is"
        raise ValueError(f"activations: {what} is swapped {where}; its tier must be host or nvme, or keep it")
    if action is not Action.SWAP and tier is not None:
        raise ValueError(f"activations: {what} to {action.value} has tier {tier.value}; it must be null")


class Span(NamedTuple):
    """Tokens [start, end) of every row of a batch, and what becomes of them."""

    start: int
    end: int
    action: Action
    tier: Tier | None = None
    groups: tuple[tuple[Group, Treatment], ...] = ()
    """Those that are treated in another way."""

    def of(self, group: Group) -> Treatment | None:
        """What becomes of a group; None for the attention's result where it waits with the layer's input."""
        own = dict(self.groups).get(group)
        return own if own is not None or group is Group.RESULT else Treatment(action=self.action, tier=self.tier)

    def share(self, treatment: Treatment) -> float:
        """At most how much of what the chunk saves is treated so; see `GROUP_SHARES`."""
        return min(1.0, sum(share for group, share in GROUP_SHARES.items() if self.of(group) == treatment))

    def treatments(self) -> tuple[Treatment, ...]:
        """Those of its groups, without what waits with the layer's input."""
        return tuple(found for group in Group if (found := self.of(group)) is not None)


@dataclass(frozen=True, kw_only=True)
class ActivationPolicy:
    """How one layer treats the tokens of a batch."""

    chunks: tuple[Chunk, ...]
    """From the first token on. In a longer sequence the last one repeats; of a shorter one the rest falls off. A
    sequence that is a single chunk is one graph, as in plain PyTorch: it is recomputed as a whole where `after` is."""
    store_qkv: bool = True
    """Whether kept and swapped chunks save queries, keys and values with the rest, where they do not say it."""
    attention_groups: int = 1
    """Groups of heads of keys and values that attention takes one after the other; at most one for each head. Bounds
    what its kernel needs besides operands and result. None in a single chunk with a graph, which is not cut."""
    version: int = POLICY_VERSION

    def __post_init__(self) -> None:
        if self.version != POLICY_VERSION:
            raise ValueError(f"activations: version {self.version} is not readable here, which reads {POLICY_VERSION}")
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
            end = min(start + chunk.num_tokens, num_tokens)
            spans.append(Span(start, end, chunk.action, chunk.tier, self._groups(chunk)))
            if len(spans) > MAX_CHUNKS:
                raise ValueError(
                    f"activations: {num_tokens} tokens are more than {MAX_CHUNKS} chunks; make them larger"
                )
        return tuple(spans)

    def _groups(self, chunk: Chunk) -> tuple[tuple[Group, Treatment], ...]:
        own = {group: getattr(chunk, group.value) for group in Group}
        if own[Group.QKV] is None and not self.store_qkv:
            own[Group.QKV] = Treatment(action=Action.RECOMPUTE)
        same = Treatment(action=chunk.action, tier=chunk.tier)
        return tuple(
            (group, treatment) for group, treatment in own.items()
            if treatment is not None and (treatment != same or group is Group.RESULT)
        )  # fmt: skip

    @property
    def tiers(self) -> frozenset[Tier]:
        """Those in which something of a chunk waits, besides the layer's input."""
        spans = (Span(0, 1, chunk.action, chunk.tier, self._groups(chunk)) for chunk in self.chunks)
        return frozenset(one.tier for span in spans for one in span.treatments() if one.tier is not None)

    def num_swapped(self, num_tokens: int, tier: Tier | None = None) -> int:
        """How many of `num_tokens` lie in chunks of which something is swapped, to `tier` or anywhere."""
        return sum(
            span.end - span.start for span in self.spans(num_tokens)
            if any(one.action is Action.SWAP and tier in (None, one.tier) for one in span.treatments())
        )  # fmt: skip

    @staticmethod
    def from_json(data: dict[str, Any]) -> ActivationPolicy:
        """Reads what `dataclasses.asdict` gave, in this version and in version 1. ValueError for another one."""
        version = data.get("version", 1)
        if version not in (1, POLICY_VERSION):
            raise ValueError(f"activations: version {version} is not readable here, which reads 1 and {POLICY_VERSION}")
        chunks = tuple(_chunk(chunk) for chunk in data["chunks"])
        return ActivationPolicy(**{**data, "chunks": chunks, "version": POLICY_VERSION})


def whole_batch(action: Action, tier: Tier | None = None) -> ActivationPolicy:
    """All tokens alike, in one chunk however many they are: no cut."""
    return ActivationPolicy(chunks=(Chunk(num_tokens=ALL_TOKENS, action=action, tier=tier),))


def _chunk(data: dict[str, Any]) -> Chunk:
    groups = {group.value: _treatment(data[group.value]) for group in Group if data.get(group.value) is not None}
    return Chunk(**{**data, **_action_and_tier(data), **groups})


def _treatment(data: dict[str, Any]) -> Treatment:
    return Treatment(**{**data, **_action_and_tier(data)})


def _action_and_tier(data: dict[str, Any]) -> dict[str, Any]:
    tier = data.get("tier")
    return {"action": Action(data["action"]), "tier": None if tier is None else Tier(tier)}
