"""The chunks of a pass, and what its forward, its replays and its backward have in common.

See `tiled_pass` for the order in which they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from offload_rt.layers.block import Block
from offload_rt.layers.layer_call import Call
from offload_rt.random_state import RandomState
from offload_rt.tiering.stash import Stash
from offload_rt.tokenwise.first_products import FirstProducts
from offload_rt.tokenwise.graphs import Sums
from offload_rt.tokenwise.middle import Middle
from offload_rt.tokenwise.saved import Held, Place, SavedCounters, SavedTensors
from offload_rt.tokenwise.slicing import cut
from planners.plans.activations import Action, Group, Span, Treatment
from planners.plans.placement import Tier


@dataclass
class TileCounters(SavedCounters):
    """What passes did since the start; bytes in `SavedCounters`."""

    num_passes: int = 0
    num_chunks: int = 0
    num_attentions: int = 0
    """Attention calls over all tokens: one a pass. That of a single chunk with a graph is its own, and not counted."""
    num_first_replays: int = 0
    """Chunks whose way up to the attention call ran again."""
    num_second_replays: int = 0
    """Chunks whose way from there on ran again."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a pass puts what it stores; None leaves it in DEVICE memory."""

    layer_inputs: Stash | None = None
    """For the layer's input and what the attention call saves; for its result, where chunks do not say it."""
    layer_inputs_tier: Tier = Tier.HOST
    """Where that stash is."""
    swapped: Mapping[Tier, Stash] = field(default_factory=dict)
    """For what is swapped, by the tier that it waits in."""
    between_chunks: Callable[[], None] = lambda: None
    """Called when a chunk's memory is free again."""

    def latest(self) -> list[weakref.ref[Any] | None]:
        """As `Stash.latest`, of each stash."""
        return [stash.latest for stash in self._stashes()]

    def start_from(self, latest: Sequence[weakref.ref[Any] | None]) -> None:
        """As `Stash.start_from`, of each stash."""
        for stash, last in zip(self._stashes(), latest, strict=True):
            stash.start_from(last)

    def _stashes(self) -> list[Stash]:
        return [stash for stash in (self.layer_inputs, *self.swapped.values()) if stash is not None]

    def with_input(self, group: str) -> Place:
        """Where `group` waits that goes with the layer's input."""
        return Place(group, self.layer_inputs, self.layer_inputs_tier)

    def of(self, group: Group, treatment: Treatment | None) -> Place:
        """Where a group waits that is treated so; None: with the layer's input."""
        if treatment is None:
            return self.with_input(group.value)
        if treatment.tier is None or treatment.tier not in self.swapped:
            return Place(group.value)
        return Place(group.value, self.swapped[treatment.tier], treatment.tier)


@dataclass(eq=False)
class Tile:
    """One chunk, and what its forward leaves for its backward."""

    index: int
    span: Span
    random_at_start: RandomState | None = None
    random_at_resume: RandomState | None = None
    saved: SavedTensors | None = None
    """What its graph has saved; None for a chunk that has none, as all of it is recomputed."""
    input: GradientEdge | None = None
    qkv: list[GradientEdge | None] = field(default_factory=list)
    attended: GradientEdge | None = None
    outputs: list[GradientEdge | None] = field(default_factory=list)
    held_qkv: list[Held] = field(default_factory=list)
    reached_attention: bool = False

    @property
    def num_tokens(self) -> int:
        return self.span.end - self.span.start

    def recomputes(self, group: Group) -> bool:
        """Whether nothing of `group` is saved."""
        treatment = self.span.of(group)
        return treatment is not None and treatment.action is Action.RECOMPUTE

    def rows(self, tensor: torch.Tensor | None, dim: int = 1) -> Any:
        """Its tokens of `tensor`, as a view; None of None."""
        return None if tensor is None else tensor.narrow(dim, self.span.start, self.num_tokens)


class PassState:
    """One pass: the layer's call, its chunks, its attention, and the arguments while forward or backward run."""

    def __init__(
        self,
        call: Call,
        block: Block,
        spans: tuple[Span, ...],
        dims: list[int | None],
        hidden: int,
        places: Places,
        counters: TileCounters,
        *,
        first_products: FirstProducts | None = None,
        attention_groups: int = 1,
    ) -> None:
        """dims: of each tensor of the call, the one that counts tokens. hidden: which of them is the layer's input.
        first_products: those of the layer; what is found out about them in one pass is of use to the next.
        """
        self.call = call
        self.block = block
        self.tiles = [Tile(index, span) for index, span in enumerate(spans)]
        self.hidden = hidden
        self.places = places
        self.counters = counters
        self.first_products = FirstProducts() if first_products is None else first_products
        self.middle = Middle(spans[-1].end, attention_groups)
        self.needs_input = False
        """Whether a gradient of the layer's input is wanted."""
        self.inputs: list[torch.Tensor] = []
        """The tensors of the call, while a forward or backward is under way."""
        self.whole: dict[int, torch.Tensor] = {}
        """By identity of a part for a chunk, what it was cut from."""
        self._dims = dims
        self._stays: frozenset[int] = frozenset()

    @property
    def is_whole(self) -> bool:
        """Whether there is one chunk. See [Note: one chunk] in `tiled_pass`."""
        return len(self.tiles) == 1

    @property
    def is_cut(self) -> bool:
        """Whether chunks have graphs of their own on either side of attention, or none."""
        return not self.is_whole or self.tiles[0].recomputes(Group.AFTER)

    def let_go(self) -> None:
        """A forward or backward is over: nothing of the call's tensors is held."""
        self.inputs, self.whole = [], {}

    def look_at_storages(self) -> None:
        """Takes note of those that stay anyway: what the layer has beside its block, and the arguments beside its
        input.
        """
        owned = self.call.owner.beside_block()
        owned += [tensor for index, tensor in enumerate(self.inputs) if index != self.hidden]
        self._stays = frozenset(tensor.untyped_storage().data_ptr() for tensor in owned if tensor.numel())

    def rows(self, tile: Tile) -> list[torch.Tensor]:
        """A chunk's part of the layer's arguments, as views."""
        if self.is_whole:
            return list(self.inputs)
        rows, self.whole = cut(self.inputs, self._dims, tile.span.start, tile.span.end)
        return rows

    def known(self) -> dict[str, torch.Tensor]:
        """What a chunk's graph need not save itself."""
        given, result = self.inputs[self.hidden], self.middle.result
        known = {"input": given} if given.is_contiguous() else {}
        return known if result is None else {**known, "result": result}

    def place(self, tile: Tile, group: Group) -> Place:
        """Where a group of a chunk waits."""
        return self.places.of(group, tile.span.of(group))

    def new_saved(self, place: Place | None) -> SavedTensors:
        """See `SavedTensors`."""
        return SavedTensors(self.block, self._stays, place, self.counters)

    def new_sums(self) -> Sums:
        """For the gradients of the layer's parameters."""
        return Sums(self.call.trainable, in_fp32=not self.is_whole)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as the layer was called; without its cache, in which casts with and without a graph would mix."""
        return self.call.autocasting(cache_enabled=False)
