"""The forward of a layer by chunks: each goes up to attention, the next begins inside it, and all of them return."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from offload_rt.random_state import RandomState
from offload_rt.tokenwise.attention import QKV_TOKEN_DIM, AttentionCall, Handler, intercepted
from offload_rt.tokenwise.graphs import edge, enter
from offload_rt.tokenwise.saved import Held, dense
from offload_rt.tokenwise.slicing import NotTokenLocal
from offload_rt.tokenwise.tiles import PassState, Tile
from planners.plans.activations import Group

_SPARE_FRAMES = 200
"""Python frames left to the layer below the deepest chunk."""


class Forward:
    """One forward. `run` it once."""

    def __init__(self, state: PassState) -> None:
        self.attention_bytes = 0
        """What the attention call has saved besides its operands and its result."""
        self._state = state
        self._current = state.tiles[0]
        self._outputs: list[torch.Tensor] = []
        self._depth = 0
        self._random: RandomState | None = None

    def run(self) -> list[torch.Tensor]:
        """The layer's outputs, without a graph. Raises `NotTokenLocal` where the layer cannot be cut."""
        state = self._state
        versions = [tensor._version for tensor in state.inputs]
        self._depth = _depth()
        limit = sys.getrecursionlimit()
        try:
            with intercepted(self._handler()), state.autocast():
                self._run(state.tiles[0])
        finally:
            sys.setrecursionlimit(limit)
        if [tensor._version for tensor in state.inputs] != versions:
            raise NotTokenLocal("it changes its input in place")
        if state.is_cut:
            places = [(t.span.start, t.span.end, state.place(t, Group.RESULT)) for t in state.tiles]
            state.middle.hold(places, state.counters)
        return self._outputs

    def _handler(self) -> Handler | None:
        """What an attention call meets; None lets it run as it is, where all groups of a single chunk wait together."""
        if self._state.is_cut:
            return self._at_attention
        return self._inside_one_graph if self._state.tiles[0].span.groups else None

    def _run(self, tile: Tile) -> None:
        """One chunk from the layer's input to its output; on its way, at attention, all chunks after it."""
        state = self._state
        self._current = tile
        tile.random_at_start = self._random_state()
        tensors = state.rows(tile)
        hooks: Any = contextlib.nullcontext()
        has_graph = not tile.recomputes(Group.BEFORE) and not (state.is_whole and tile.recomputes(Group.AFTER))
        if has_graph:
            place = state.place(tile, Group.BEFORE)
            tile.saved = state.new_saved(place if self._handler() is not None else replace(place, group="chunk"))
            tile.saved.known = state.known()
            if state.needs_input:
                tensors[state.hidden], tile.input = enter(tensors[state.hidden])
            hooks = tile.saved.hooks()
        with torch.set_grad_enabled(has_graph), hooks:
            outputs = state.call.run(tensors)
        if tile.saved is not None:
            tile.outputs = [edge(output) for output in outputs]
            tile.saved.seal()
        self._collect(tile, outputs)

    def _at_attention(self, call: AttentionCall) -> torch.Tensor:
        """What a chunk meets at attention: the others, and then its rows of the result."""
        state, tile = self._state, self._current
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
        if not self._puts_away_qkv(tile):
            self._hold_qkv(tile, (dense(tensor.detach()) for tensor in call.qkv))
        state.middle.gather(call.qkv, tile.span.start, empty=not state.is_whole)
        if tile.saved is not None:
            tile.saved.seal()
        if tile.index + 1 < len(state.tiles):
            self._make_room_for_frames(tile)
            self._run(state.tiles[tile.index + 1])
        else:
            for each in state.tiles:
                if self._puts_away_qkv(each):
                    self._hold_qkv(each, state.middle.operands(each.span.start, each.span.end))
            state.counters.num_attentions += 1
            with_input = state.places.with_input("attention")
            self.attention_bytes = state.middle.attend(call, state.whole, lambda: state.new_saved(with_input))
        goes_on_with_graph = tile.saved is not None and not tile.recomputes(Group.AFTER)
        torch.set_grad_enabled(goes_on_with_graph)
        tile.random_at_resume = self._random_state()
        self._current = tile
        rows = state.middle.rows(tile.span.start, tile.span.end)
        if tile.saved is not None and goes_on_with_graph:
            tile.saved.place = state.place(tile, Group.AFTER)
            tile.saved.known = state.known()
            rows, tile.attended = enter(rows)
        return rows

    def _puts_away_qkv(self, tile: Tile) -> bool:
        """Whether a chunk's queries, keys and values go to a stash: see [Note: last put away, first wanted]."""
        return self._state.place(tile, Group.QKV).stash is not None

    def _hold_qkv(self, tile: Tile, qkv: Iterable[torch.Tensor]) -> None:
        """Has a chunk's dense queries, keys and values, made one by one, wait for backward, if it wants them."""
        if not self._state.is_whole and not tile.recomputes(Group.QKV):
            place = self._state.place(tile, Group.QKV)
            tile.held_qkv = [Held(tensor, place, self._state.counters) for tensor in qkv]

    def _inside_one_graph(self, call: AttentionCall) -> torch.Tensor:
        """The attention of a single chunk with a graph: as it is, but that what it saves has places of its own."""
        state, tile = self._state, self._current
        saved = tile.saved
        if saved is None:
            raise RuntimeError(f"{state.block.name}: a chunk without a graph came to the attention of one with it")
        of_qkv = state.place(tile, Group.BEFORE if tile.recomputes(Group.QKV) else Group.QKV)
        saved.places = {tensor.untyped_storage().data_ptr(): of_qkv for tensor in call.qkv}
        saved.place = state.places.with_input("attention")
        with intercepted(None):
            result = call.run(*call.qkv, *call.arguments)
        saved.move(result, state.place(tile, Group.RESULT))
        saved.places = {}
        saved.place = state.place(tile, Group.AFTER)
        return result

    def _collect(self, tile: Tile, outputs: list[torch.Tensor]) -> None:
        """Puts a chunk's rows into the layer's outputs."""
        given = self._state.inputs[self._state.hidden]
        if self._state.is_whole:
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
        self._state.places.between_chunks()

    def _random_state(self) -> RandomState:
        """The state now; moments between which nothing random happened share it."""
        state = RandomState.now(self._state.call.device)
        if self._random is None or not self._random.equals(state):
            self._random = state
        return self._random

    def _make_room_for_frames(self, tile: Tile) -> None:
        """Chunks nest: the first raises Python's recursion limit, until the pass is over, to what all of them need."""
        if tile.index == 0:
            deep = _depth()
            needed = deep + (deep - self._depth) * (len(self._state.tiles) - 1) + _SPARE_FRAMES
            sys.setrecursionlimit(max(needed, sys.getrecursionlimit()))


def _depth() -> int:
    """How many Python frames are in use."""
    depth, frame = 0, sys._getframe().f_back
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
