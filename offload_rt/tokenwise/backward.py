"""The backward of a layer by chunks: what follows attention, attention itself, what leads to it."""

from __future__ import annotations

import torch
from torch.autograd.graph import GradientEdge

from offload_rt.random_state import kept_random_state
from offload_rt.tokenwise.attention import QKV_TOKEN_DIM, AttentionCall
from offload_rt.tokenwise.graphs import Gradients, edge, enter, share
from offload_rt.tokenwise.middle import InPlaceOfAttention
from offload_rt.tokenwise.replays import restore, run_again, run_again_from_attention, run_again_to_attention
from offload_rt.tokenwise.tiles import PassState, Tile
from planners.plans.activations import Group


class Backward:
    """One backward. `run` it once."""

    def __init__(self, state: PassState, *, keep_graph: bool) -> None:
        """keep_graph: another backward may follow."""
        self._state = state
        self._middle = state.middle
        self._keeps_graph = keep_graph
        self._sums = state.new_sums()

    def run(self, grads: Gradients) -> tuple[torch.Tensor | None, Gradients]:
        """Gradients of the layer's input and of its parameters. `grads`: of its outputs; None where there is none."""
        state = self._state
        self._middle.load()
        with kept_random_state(state.call.device):
            of_input = self._whole(grads) if state.is_whole else self._by_chunks(grads)
        return of_input, self._sums.gradients()

    def _whole(self, grads: Gradients) -> torch.Tensor | None:
        """Of a single chunk, whose graph is not cut."""
        (tile,) = self._state.tiles
        outputs, entry = tile.outputs, tile.input
        if tile.saved is not None:
            tile.saved.known = self._state.known()
        else:

            def put_back(call: AttentionCall) -> torch.Tensor:
                self._middle.gather(call.qkv, 0, empty=False)
                restore(tile.random_at_resume)
                result: torch.Tensor = InPlaceOfAttention.apply(  # type: ignore[no-untyped-call]
                    self._middle, self._sums, self._keeps_graph, *call.qkv
                )
                return result

            outputs, entry = run_again(self._state, tile, put_back)
        return self._sums.backward(outputs, grads, [entry], keep_graph=self._keeps_graph)[0]

    def _by_chunks(self, grads: Gradients) -> torch.Tensor | None:
        state = self._state
        of_input = torch.zeros_like(state.inputs[state.hidden]) if state.needs_input else None
        of_result = self._middle.new_gradient()
        for tile in state.tiles:
            attended, rows = self._second(tile, grads)
            if attended is not None:
                self._middle.rows_of(of_result, tile.span.start, tile.span.end).copy_(attended)
            if of_input is not None and rows is not None:
                tile.rows(of_input).copy_(rows)
            del attended, rows
            state.places.between_chunks()
        for tile in reversed(state.tiles):
            self._gather(tile)
        of_qkv = self._middle.backward(of_result, self._sums, keep_graph=self._keeps_graph)
        del of_result
        for tile in reversed(state.tiles):
            rows = self._first(tile, of_qkv)
            if of_input is not None and rows is not None:
                tile.rows(of_input).add_(rows)
            del rows
            state.places.between_chunks()
        return of_input

    def _second(self, tile: Tile, grads: Gradients) -> Gradients:
        """Gradients of a chunk's rows of the attention's result and, as far as they do not lead there, of its input."""
        of_outputs = [tile.rows(grad) for grad in grads]
        if tile.recomputes(Group.AFTER):
            return self._second_again(tile, of_outputs)
        if tile.saved is not None:
            tile.saved.known = self._state.known()
        # Parallel blocks: a norm that leads to attention and past it. Its part of the graph is used again.
        keep = self._keeps_graph or share(tile.outputs, tile.qkv)
        gradients = self._sums.backward(tile.outputs, of_outputs, [tile.attended, tile.input], keep_graph=keep)
        if not self._keeps_graph:
            tile.outputs, tile.attended = [], None
        return gradients

    def _second_again(self, tile: Tile, of_outputs: Gradients) -> Gradients:
        """The same where nothing was saved: the chunk runs again, all of it where its q, k and v are wanted as well."""
        attended: list[GradientEdge] = []

        def resume(call: AttentionCall) -> torch.Tensor:
            if tile.recomputes(Group.QKV):
                self._middle.gather(call.qkv, tile.span.start, empty=True)
            restore(tile.random_at_resume)
            rows, rows_edge = enter(self._middle.rows(tile.span.start, tile.span.end))
            attended[:] = [rows_edge]
            return rows

        run = run_again if tile.recomputes(Group.QKV) else run_again_from_attention
        outputs, entry = run(self._state, tile, resume)
        return self._sums.backward(outputs, of_outputs, [*attended, entry], keep_graph=False)

    def _gather(self, tile: Tile) -> None:
        """Puts a chunk's queries, keys and values among those of all tokens, if they are not there."""
        if not tile.recomputes(Group.QKV):
            loaded = tuple(held.load() for held in tile.held_qkv)
            self._middle.gather(loaded, tile.span.start, empty=False)
            if not self._keeps_graph:
                for held in tile.held_qkv:
                    held.release()
        elif not tile.recomputes(Group.AFTER):
            qkv, _ = run_again_to_attention(self._state, tile, with_graph=False)
            self._middle.gather(qkv, tile.span.start, empty=False)

    def _first(self, tile: Tile, of_qkv: Gradients) -> torch.Tensor | None:
        """What the way to attention adds to the gradient of a chunk's input."""
        rows = [tile.rows(gradient, QKV_TOKEN_DIM) for gradient in of_qkv]
        if tile.saved is not None:
            tile.saved.known = self._state.known()
            (of_input,) = self._sums.backward(tile.qkv, rows, [tile.input], keep_graph=self._keeps_graph)
            if not self._keeps_graph:
                tile.qkv, tile.input = [], None
            return of_input
        qkv, entry = run_again_to_attention(self._state, tile, with_graph=True)
        edges = [edge(tensor) for tensor in qkv]
        del qkv
        return self._sums.backward(edges, rows, [entry], keep_graph=False)[0]
