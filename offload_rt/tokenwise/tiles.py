"""One pass of a layer by chunks of tokens, cut at its attention call.

When a chunk reaches attention, its queries, keys and values are stored and the next chunk starts, by plain recursion;
the last one makes the original call once, over all tokens; then each chunk goes on with its own rows of the result.

    forward    seg1(0) seg1(1) .. seg1(n-1)  ->  attention(all)  ->  seg2(n-1) .. seg2(1) seg2(0)
    backward   seg2 of 0 .. n-1  ->  queries, keys, values again  ->  attention  ->  seg1 of n-1 .. 0

seg1 leads from the layer's input to queries, keys and values; seg2 from the attention's result to the output. A chunk
that is kept or swapped runs with a graph of its own, whose saved tensors `saved` takes; one that is recomputed runs
without, and again in backward: twice up to the attention call, once from there on.

[Note: one chunk]
The graph of a whole layer is not cut, so that its backward adds gradients in the order in which plain autograd does:
kept or swapped, attention is an operation like any other; recomputed, `InPlaceOfAttention` stands in its place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from offload_rt.autograd import Call
from offload_rt.block import Block
from offload_rt.random_state import RandomState, kept_random_state
from offload_rt.stash import Stash
from offload_rt.tokenwise.attention import QKV_TOKEN_DIM, AttentionCall, Handler, intercepted
from offload_rt.tokenwise.graphs import Gradients, Sums, edge, enter, share
from offload_rt.tokenwise.middle import InPlaceOfAttention, Middle
from offload_rt.tokenwise.saved import Held, SavedCounters, SavedTensors, dense
from offload_rt.tokenwise.slicing import NotTokenLocal, cut
from planners.activations import Action, Span
from planners.placement import Tier

_SPARE_FRAMES = 200
"""Python frames left to the layer below the deepest chunk."""


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
    """For the layer's input, the attention's result and what the attention call saves besides."""
    swapped: Mapping[Tier, Stash] = field(default_factory=dict)
    """For swapped chunks, by the tier that they wait in."""
    between_chunks: Callable[[], None] = lambda: None
    """Called when a chunk's memory is free again."""


@dataclass(eq=False)
class _Tile:
    """One chunk, and what its forward leaves for its backward."""

    index: int
    start: int
    end: int
    action: Action
    tier: Tier | None
    random_at_start: RandomState | None = None
    random_at_resume: RandomState | None = None
    saved: SavedTensors | None = None
    """What its graph has saved; None for a chunk that is recomputed."""
    input: GradientEdge | None = None
    qkv: list[GradientEdge | None] = field(default_factory=list)
    attended: GradientEdge | None = None
    outputs: list[GradientEdge | None] = field(default_factory=list)
    held_qkv: list[Held] = field(default_factory=list)
    reached_attention: bool = False

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    def rows(self, tensor: torch.Tensor | None, dim: int = 1) -> Any:
        """Its tokens of `tensor`, as a view; None of None."""
        return None if tensor is None else tensor.narrow(dim, self.start, self.num_tokens)


class _Cut(Exception):
    """Ends a replay at the attention call. An Exception, so that hooks that must run at a module's end do."""

    def __init__(self, qkv: tuple[torch.Tensor, ...]) -> None:
        self.qkv = qkv


class TiledPass:
    """One forward of a layer by chunks, and its backward. Whoever runs either has the layer's block open."""

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
        store_qkv: bool = True,
        attention_groups: int = 1,
    ) -> None:
        """dims: of each tensor of the call, the one that counts tokens. hidden: which of them is the layer's input."""
        self._call = call
        self._block = block
        self._tiles = [_Tile(index, *span) for index, span in enumerate(spans)]
        self._dims = dims
        self._hidden = hidden
        self._places = places
        self._counters = counters
        self._store_qkv = store_qkv
        self._middle = Middle(spans[-1].end, attention_groups)
        self.attention_bytes = 0
        """What the attention call has saved besides its operands and its result."""
        self._needs_input = False
        self._keeps_graph = False
        self._stays: frozenset[int] = frozenset()
        # Of a forward or backward under way:
        self._current = self._tiles[0]
        self._inputs: list[torch.Tensor] = []
        self._whole: dict[int, torch.Tensor] = {}
        self._outputs: list[torch.Tensor] = []
        self._depth = 0
        self._random: RandomState | None = None
        self._sums = self._new_sums()

    @property
    def _is_whole(self) -> bool:
        """Whether there is one chunk. See [Note: one chunk]."""
        return len(self._tiles) == 1

    # forward

    def forward(self, inputs: list[torch.Tensor], *, needs_input: bool) -> list[torch.Tensor]:
        """Runs the layer; returns its outputs, without a graph. needs_input: its input wants a gradient.

        Raises `NotTokenLocal` where the layer cannot be cut.
        """
        self._counters.num_passes += 1
        self._counters.num_chunks += len(self._tiles)
        self._inputs = inputs
        self._needs_input = needs_input
        self._stays = self._addresses()
        versions = [tensor._version for tensor in inputs]
        is_cut = not (self._is_whole and self._tiles[0].action is not Action.RECOMPUTE)
        self._depth = _depth()
        limit = sys.getrecursionlimit()
        try:
            with intercepted(self._at_attention if is_cut else None), self._autocast():
                self._run(self._tiles[0])
        finally:
            sys.setrecursionlimit(limit)
        if [tensor._version for tensor in inputs] != versions:
            raise NotTokenLocal("it changes its input in place")
        if is_cut:
            self._middle.hold(self._places.layer_inputs, self._counters)
        outputs, self._outputs, self._inputs, self._whole = self._outputs, [], [], {}
        return outputs

    def _run(self, tile: _Tile) -> None:
        """One chunk from the layer's input to its output; on its way, at attention, all chunks after it."""
        self._current = tile
        tile.random_at_start = self._random_state()
        tensors = self._rows(tile)
        hooks: Any = contextlib.nullcontext()
        if tile.action is not Action.RECOMPUTE:
            tile.saved = self._new_saved(self._swapped(tile))
            tile.saved.known = self._known()
            if self._needs_input:
                tensors[self._hidden], tile.input = enter(tensors[self._hidden])
            hooks = tile.saved.hooks()
        with torch.set_grad_enabled(tile.saved is not None), hooks:
            outputs = self._call.run(tensors)
        if tile.saved is not None:
            tile.outputs = [edge(output) for output in outputs]
            tile.saved.seal()
        self._collect(tile, outputs)

    def _at_attention(self, call: AttentionCall) -> torch.Tensor:
        """What a chunk meets at attention in forward: the others, and then its rows of the result."""
        tile = self._current
        if tile.reached_attention:
            raise NotTokenLocal("it calls the attention function more than once")
        tile.reached_attention = True
        for tensor in call.qkv:
            if tensor.shape[QKV_TOKEN_DIM] != tile.num_tokens:
                raise NotTokenLocal(
                    f"its attention call has {tensor.shape[QKV_TOKEN_DIM]} tokens for a chunk of {tile.num_tokens}"
                )
        if tile.saved is not None:
            tile.qkv = [edge(tensor) for tensor in call.qkv]
            if self._store_qkv:
                stash = self._swapped(tile)
                tile.held_qkv = [Held(dense(tensor.detach()), stash, self._counters) for tensor in call.qkv]
        self._middle.gather(call.qkv, tile.start, empty=not self._is_whole)
        if tile.saved is not None:
            tile.saved.seal()
        grads_on = torch.is_grad_enabled()
        if tile.index + 1 < len(self._tiles):
            self._make_room_for_frames(tile)
            self._run(self._tiles[tile.index + 1])
        else:
            self._counters.num_attentions += 1
            self.attention_bytes = self._middle.attend(
                call, self._whole, lambda: self._new_saved(self._places.layer_inputs)
            )
        torch.set_grad_enabled(grads_on)
        tile.random_at_resume = self._random_state()
        self._current = tile
        rows = self._middle.rows(tile.start, tile.end)
        if tile.saved is not None:
            tile.saved.known = self._known()
            rows, tile.attended = enter(rows)
        return rows

    def _collect(self, tile: _Tile, outputs: list[torch.Tensor]) -> None:
        """Puts a chunk's rows into the layer's outputs."""
        given = self._inputs[self._hidden]
        if self._is_whole:
            address = given.untyped_storage().data_ptr()
            for output in outputs:
                is_input = output.untyped_storage().data_ptr() == address
                self._outputs.append(output.detach().clone() if is_input else output.detach())
            return
        for output in outputs:
            if not output.is_floating_point() or tuple(output.shape[:2]) != (given.shape[0], tile.num_tokens):
                raise NotTokenLocal(f"it returns a tensor of shape {tuple(output.shape)}, which does not go by tokens")
        if not self._outputs:
            self._outputs = [o.new_empty((*given.shape[:2], *o.shape[2:])) for o in outputs]
        with torch.no_grad():
            for whole, rows in zip(self._outputs, outputs, strict=True):
                tile.rows(whole).copy_(rows)
        self._places.between_chunks()

    # backward

    def backward(
        self, inputs: list[torch.Tensor], grads: Gradients, *, keep_graph: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Gradients of the layer's input and of its parameters. `grads`: of its outputs; None where there is none.

        keep_graph: another backward may follow; otherwise everything stored is given back.
        """
        self._inputs = inputs
        self._keeps_graph = keep_graph
        self._sums = self._new_sums()
        try:
            self._middle.load()
            with kept_random_state(self._call.device), self._autocast():
                of_input = self._backward_whole(grads) if self._is_whole else self._backward_tiles(grads)
            return of_input, self._sums.gradients()
        finally:
            self._inputs, self._whole = [], {}
            self._sums = self._new_sums()
            self._middle.drop()
            if not keep_graph:
                self._middle.release()
                self._tiles = [_Tile(t.index, t.start, t.end, t.action, t.tier) for t in self._tiles]

    def _backward_whole(self, grads: Gradients) -> torch.Tensor | None:
        (tile,) = self._tiles
        outputs, entry = tile.outputs, tile.input
        if tile.saved is not None:
            tile.saved.known = self._known()
        else:

            def put_back(call: AttentionCall) -> torch.Tensor:
                self._middle.gather(call.qkv, 0, empty=False)
                _restore(tile.random_at_resume)
                result: torch.Tensor = InPlaceOfAttention.apply(  # type: ignore[no-untyped-call]
                    self._middle, self._sums, self._keeps_graph, *call.qkv
                )
                return result

            outputs, entry = self._replay(tile, put_back)
        return self._sums.backward(outputs, grads, [entry], keep_graph=self._keeps_graph)[0]

    def _backward_tiles(self, grads: Gradients) -> torch.Tensor | None:
        of_input = torch.zeros_like(self._inputs[self._hidden]) if self._needs_input else None
        of_result = self._middle.new_gradient()
        for tile in self._tiles:
            attended, rows = self._backward_second(tile, grads)
            if attended is not None:
                self._middle.rows_of(of_result, tile.start, tile.end).copy_(attended)
            if of_input is not None and rows is not None:
                tile.rows(of_input).copy_(rows)
            del attended, rows
            self._places.between_chunks()
        for tile in self._tiles:
            if tile.saved is not None:
                self._middle.gather(self._stored_qkv(tile), tile.start, empty=False)
        of_qkv = self._middle.backward(of_result, self._sums, keep_graph=self._keeps_graph)
        del of_result
        for tile in reversed(self._tiles):
            rows = self._backward_first(tile, of_qkv)
            if of_input is not None and rows is not None:
                tile.rows(of_input).add_(rows)
            del rows
            self._places.between_chunks()
        return of_input

    def _backward_second(self, tile: _Tile, grads: Gradients) -> Gradients:
        """Gradients of a chunk's rows of the attention's result and, as far as they do not lead there, of its input."""
        of_outputs = [tile.rows(grad) for grad in grads]
        if tile.saved is not None:
            tile.saved.known = self._known()
            # Parallel blocks: a norm that leads to attention and past it. Its part of the graph is used again.
            keep = self._keeps_graph or share(tile.outputs, tile.qkv)
            gradients = self._sums.backward(tile.outputs, of_outputs, [tile.attended, tile.input], keep_graph=keep)
            if not self._keeps_graph:
                tile.outputs, tile.attended = [], None
            return gradients
        attended: list[GradientEdge] = []

        def resume(call: AttentionCall) -> torch.Tensor:
            self._middle.gather(call.qkv, tile.start, empty=True)
            _restore(tile.random_at_resume)
            rows, rows_edge = enter(self._middle.rows(tile.start, tile.end))
            attended.append(rows_edge)
            return rows

        outputs, entry = self._replay(tile, resume)
        return self._sums.backward(outputs, of_outputs, [*attended, entry], keep_graph=False)

    def _backward_first(self, tile: _Tile, of_qkv: Gradients) -> torch.Tensor | None:
        """What the way to attention adds to the gradient of a chunk's input."""
        rows = [tile.rows(gradient, QKV_TOKEN_DIM) for gradient in of_qkv]
        if tile.saved is not None:
            tile.saved.known = self._known()
            (of_input,) = self._sums.backward(tile.qkv, rows, [tile.input], keep_graph=self._keeps_graph)
            if not self._keeps_graph:
                tile.qkv, tile.input = [], None
            return of_input
        qkv, entry = self._replay_first(tile, with_graph=True)
        edges = [edge(tensor) for tensor in qkv]
        del qkv
        return self._sums.backward(edges, rows, [entry], keep_graph=False)[0]

    def _stored_qkv(self, tile: _Tile) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a chunk that has a graph."""
        if not tile.held_qkv:
            return self._replay_first(tile, with_graph=False)[0]
        loaded = tuple(held.load() for held in tile.held_qkv)
        if not self._keeps_graph:
            for held in tile.held_qkv:
                held.release()
        return loaded

    # replays

    def _replay(self, tile: _Tile, at_attention: Handler) -> tuple[list[GradientEdge | None], GradientEdge | None]:
        """Runs a chunk again with a graph whose backward follows at once; the edges of its outputs and its input."""
        self._counters.num_second_replays += 1
        tensors, entry = self._begin_replay(tile, with_graph=True)
        with intercepted(at_attention), torch.enable_grad(), self._new_saved(None, transient=True).hooks():
            return [edge(output) for output in self._call.run(tensors)], entry

    def _replay_first(self, tile: _Tile, *, with_graph: bool) -> tuple[tuple[torch.Tensor, ...], GradientEdge | None]:
        """Runs a chunk again up to its attention call; queries, keys, values, and the edge of its input."""
        tensors, entry = self._begin_replay(tile, with_graph=with_graph)

        def stop(call: AttentionCall) -> torch.Tensor:
            raise _Cut(call.qkv)

        try:
            saved = self._new_saved(None, transient=True)
            with intercepted(stop), torch.set_grad_enabled(with_graph), saved.hooks():
                self._call.run(tensors)
        except _Cut as reached:
            return reached.qkv, entry
        raise RuntimeError(f"{self._block.name}: a chunk did not reach its attention call again in backward")

    def _begin_replay(self, tile: _Tile, *, with_graph: bool) -> tuple[list[torch.Tensor], GradientEdge | None]:
        self._counters.num_first_replays += 1
        tensors, entry = self._rows(tile), None
        if with_graph and self._needs_input:
            tensors[self._hidden], entry = enter(tensors[self._hidden])
        _restore(tile.random_at_start)
        return tensors, entry

    # both ways

    def _rows(self, tile: _Tile) -> list[torch.Tensor]:
        """A chunk's part of the layer's arguments, as views."""
        if self._is_whole:
            return list(self._inputs)
        rows, self._whole = cut(self._inputs, self._dims, tile.start, tile.end)
        return rows

    def _known(self) -> dict[str, torch.Tensor]:
        """What a chunk's graph need not save itself."""
        given, result = self._inputs[self._hidden], self._middle.result
        known = {"input": given} if given.is_contiguous() else {}
        return known if result is None else {**known, "result": result}

    def _swapped(self, tile: _Tile) -> Stash | None:
        return None if tile.tier is None else self._places.swapped.get(tile.tier)

    def _new_saved(self, stash: Stash | None, *, transient: bool = False) -> SavedTensors:
        return SavedTensors(self._block, self._stays, stash, self._counters, transient=transient)

    def _new_sums(self) -> Sums:
        return Sums(self._call.trainable, in_fp32=not self._is_whole)

    def _addresses(self) -> frozenset[int]:
        """Storages that stay anyway: the layer's own parameters and buffers, and the arguments beside its input."""
        owned = [*self._call.owner.layer.parameters(), *self._call.owner.layer.buffers()]
        owned += [tensor for index, tensor in enumerate(self._inputs) if index != self._hidden]
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in owned if tensor.numel())

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        """Autocast as the layer was called; without its cache, in which casts with and without a graph would mix."""
        enabled, dtype = self._call.autocast
        with torch.autocast(self._call.device.type, enabled=enabled, dtype=dtype, cache_enabled=False):
            yield

    def _random_state(self) -> RandomState:
        """The state now; moments between which nothing random happened share it."""
        state = RandomState.now(self._call.device)
        if self._random is None or not self._random.equals(state):
            self._random = state
        return self._random

    def _make_room_for_frames(self, tile: _Tile) -> None:
        """Chunks nest: the first raises Python's recursion limit, until the pass is over, to what all of them need."""
        if tile.index == 0:
            deep = _depth()
            needed = deep + (deep - self._depth) * (len(self._tiles) - 1) + _SPARE_FRAMES
            sys.setrecursionlimit(max(needed, sys.getrecursionlimit()))


def _restore(state: RandomState | None) -> None:
    if state is not None:
        state.restore()


def _depth() -> int:
    """How many Python frames are in use."""
    depth, frame = 0, sys._getframe().f_back
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
