"""One pass of a layer by chunks of tokens, cut at its attention call.

When a chunk reaches attention, its queries, keys and values are stored and the next chunk starts, by plain recursion;
the last one makes the original call once, over all tokens; then each chunk goes on with its own rows of the result.

    forward    seg1(0) seg1(1) .. seg1(n-1)  ->  attention(all)  ->  seg2(n-1) .. seg2(1) seg2(0)
    backward   seg2 of 0 .. n-1  ->  queries, keys, values again  ->  attention  ->  seg1 of n-1 .. 0

seg1 leads from the layer's input to queries, keys and values; seg2 from the attention's result to the output. Either
runs with a graph, whose saved tensors `saved` takes, or without, and again in backward.

[Note: last put away, first wanted]
Stashes bring back ahead what was put away before the tensor that is asked for. So forward puts away in the reverse of
the order in which backward asks: what seg1 saves chunk by chunk, then, when all chunks are at attention, their queries,
keys and values, and then what seg2 saves, of the last chunk first. Within a graph, by when a tensor was saved last.

[Note: one chunk]
The graph of a whole layer is not cut, so that its backward adds gradients in the order in which plain autograd does:
kept or swapped, attention is an operation like any other; recomputed, `InPlaceOfAttention` stands in its place.
"""

from __future__ import annotations

import torch

from offload_rt.tokenwise.backward import Backward
from offload_rt.tokenwise.forward import Forward
from offload_rt.tokenwise.graphs import Gradients
from offload_rt.tokenwise.tiles import PassState, Tile


class TiledPass:
    """One forward of a layer by chunks, and its backward. Whoever runs either has the layer's block open."""

    def __init__(self, state: PassState) -> None:
        self._state = state
        self.attention_bytes = 0
        """What the attention call has saved besides its operands and its result."""

    def forward(self, inputs: list[torch.Tensor], *, needs_input: bool) -> list[torch.Tensor]:
        """Runs the layer; returns its outputs, without a graph. needs_input: its input wants a gradient.

        Raises `NotTokenLocal` where the layer cannot be cut.
        """
        state = self._state
        state.counters.num_passes += 1
        state.counters.num_chunks += len(state.tiles)
        state.needs_input = needs_input
        state.inputs = inputs
        state.look_at_storages()
        run = Forward(state)
        outputs = run.run()
        self.attention_bytes = run.attention_bytes
        state.let_go()
        return outputs

    @property
    def runs_once(self) -> bool:
        """Whether the layer was called once, and is not called in backward: all of it has one graph, which waits."""
        return self._state.is_whole and self._state.tiles[0].saved is not None

    def backward(
        self, inputs: list[torch.Tensor], grads: Gradients, *, keep_graph: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Gradients of the layer's input and of its parameters. `grads`: of its outputs; None where there is none.

        keep_graph: another backward may follow; otherwise everything stored is given back.
        """
        state = self._state
        state.inputs = inputs
        try:
            return Backward(state, keep_graph=keep_graph).run(grads)
        finally:
            state.let_go()
            state.middle.drop()
            if not keep_graph:
                state.middle.release()
                state.tiles = [Tile(tile.index, tile.span) for tile in state.tiles]
