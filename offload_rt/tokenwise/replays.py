"""A chunk runs again in backward: from its input up to attention, or from attention's result to its output."""

from __future__ import annotations

import contextlib

import torch
from torch.autograd.graph import GradientEdge

from offload_rt.random_state import RandomState
from offload_rt.tokenwise.attention import AttentionCall, Handler, intercepted
from offload_rt.tokenwise.first_products import ProductWanted
from offload_rt.tokenwise.graphs import edge, enter
from offload_rt.tokenwise.tiles import PassState, Tile

Entry = GradientEdge | None
"""Where the gradient of a chunk's input is had; None where nobody wants it."""


class _Cut(Exception):
    """Ends a replay at the attention call. An Exception, so that hooks that must run at a module's end do."""

    def __init__(self, qkv: tuple[torch.Tensor, ...]) -> None:
        self.qkv = qkv


def run_again(state: PassState, tile: Tile, at_attention: Handler) -> tuple[list[GradientEdge | None], Entry]:
    """Runs a chunk with a graph, whose backward follows at once; the edges of its outputs and its input.

    `at_attention` takes queries, keys and values, and gives what the layer goes on with.
    """
    state.counters.num_first_replays += 1
    state.counters.num_second_replays += 1
    return _run(state, tile, at_attention)


def run_again_from_attention(
    state: PassState, tile: Tile, at_attention: Handler
) -> tuple[list[GradientEdge | None], Entry]:
    """As `run_again`, without what leads to queries, keys and values alone. `at_attention` gets none of their values.

    See [Note: nobody wants q, k and v] in `first_products`. `at_attention` may be called twice.
    """
    products = state.first_products

    def come_to_attention(call: AttentionCall) -> torch.Tensor:
        products.at_attention()
        return at_attention(call)

    if not products.wanted:
        with contextlib.suppress(ProductWanted), products.left_out():
            found = _run(state, tile, come_to_attention)
            state.counters.num_second_replays += 1
            return found
    return run_again(state, tile, at_attention)


def run_again_to_attention(state: PassState, tile: Tile, *, with_graph: bool) -> tuple[tuple[torch.Tensor, ...], Entry]:
    """Runs a chunk up to its attention call; queries, keys, values, and the edge of its input."""
    state.counters.num_first_replays += 1
    tensors, entry = _begin(state, tile, with_graph=with_graph)

    def stop(call: AttentionCall) -> torch.Tensor:
        raise _Cut(call.qkv)

    try:
        with (
            intercepted(stop), torch.set_grad_enabled(with_graph), state.autocast(), state.new_saved(None).hooks(),
        ):  # fmt: skip
            state.call.run(tensors)
    except _Cut as reached:
        return reached.qkv, entry
    raise RuntimeError(f"{state.block.name}: a chunk did not reach its attention call again in backward")


def restore(random_state: RandomState | None) -> None:
    """Puts the generators back to where they were in forward."""
    if random_state is not None:
        random_state.restore()


def _run(state: PassState, tile: Tile, at_attention: Handler) -> tuple[list[GradientEdge | None], Entry]:
    tensors, entry = _begin(state, tile, with_graph=True)
    with intercepted(at_attention), torch.enable_grad(), state.autocast(), state.new_saved(None).hooks():
        return [edge(output) for output in state.call.run(tensors)], entry


def _begin(state: PassState, tile: Tile, *, with_graph: bool) -> tuple[list[torch.Tensor], Entry]:
    tensors, entry = state.rows(tile), None
    if with_graph and state.needs_input:
        tensors[state.hidden], entry = enter(tensors[state.hidden])
    restore(tile.random_at_start)
    return tensors, entry
