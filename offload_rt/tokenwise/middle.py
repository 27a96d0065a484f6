"""The middle of a layer: its attention call over all tokens, made once, whose backward needs no second one.

Queries, keys and values are gathered chunk by chunk. The call is a black box under saved-tensor hooks, between the
beginning of a graph and its result: no kernel is known here. What it saves of its operands and of its result it saves
by reference, so that between forward and backward there is only the result, and what else the kernel wants (say, a
log-sum-exp). Before backward the operands are gathered again, in the same memory layout, or the references would lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from offload_rt.stash import Stash
from offload_rt.tokenwise.attention import QKV_TOKEN_DIM, AttentionCall, intercepted
from offload_rt.tokenwise.graphs import Gradients, Sums, enter
from offload_rt.tokenwise.saved import Held, SavedCounters, SavedTensors, dense, memory_order
from offload_rt.tokenwise.slicing import NotTokenLocal


class Middle:
    """One attention call, from forward to backward."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._token_dim = 0
        self._orders: list[list[int]] = []
        self._qkv: list[torch.Tensor] = []
        self._result: torch.Tensor | None = None
        self._held: Held | None = None
        self._saved: SavedTensors | None = None
        self._edge: GradientEdge | None = None
        self._inputs: list[GradientEdge] = []

    def gather(self, qkv: tuple[torch.Tensor, ...], start: int, *, empty: bool) -> None:
        """Puts a chunk's queries, keys and values, from token `start` on, among those of all tokens.

        empty: the frames of the layer hold its own until it returns, so their memory is taken from them.
        """
        if not self._orders:
            self._orders = [memory_order(tensor) for tensor in qkv]
        if not self._qkv:
            for tensor, order in zip(qkv, self._orders, strict=True):
                shape = list(tensor.shape)
                shape[QKV_TOKEN_DIM] = self._num_tokens
                self._qkv.append(torch.empty_permuted(shape, order, dtype=tensor.dtype, device=tensor.device))
        with torch.no_grad():
            for whole, tensor in zip(self._qkv, qkv, strict=True):
                whole.narrow(QKV_TOKEN_DIM, start, tensor.shape[QKV_TOKEN_DIM]).copy_(tensor)
        if empty:
            for tensor in qkv:
                tensor.data = tensor.new_empty(0)

    def attend(self, call: AttentionCall, whole: dict[int, torch.Tensor], saved: SavedTensors) -> int:
        """Makes the call over all tokens. `whole`: by identity, what its other arguments were cut from.

        Returns the bytes that it saves besides operands and result. Raises `NotTokenLocal` where it is more than a
        function of queries, keys, values, arguments and parameters.
        """
        args, kwargs = _arguments(call, whole)
        saved.known = self._known()
        versions = [tensor._version for tensor in self._qkv]
        entered = [enter(tensor) for tensor in self._qkv]
        with intercepted(None), torch.enable_grad(), saved.hooks():
            result = call.run(*[tensor for tensor, _ in entered], args, kwargs)
        if [tensor._version for tensor in self._qkv] != versions:
            raise NotTokenLocal("its attention function changes its operands in place")
        if result.shape[call.out_token_dim] != self._num_tokens:
            raise NotTokenLocal(f"its attention gives {tuple(result.shape)} for {self._num_tokens} tokens")
        self._saved = saved
        self._inputs = [edge for _, edge in entered]
        self._edge = get_gradient_edge(result)
        self._token_dim = call.out_token_dim
        self._result = dense(result.detach())
        saved.recognise("result", self._result)
        self._qkv = []
        return saved.seal()

    @property
    def result(self) -> torch.Tensor | None:
        """What the call has given, while a pass is under way."""
        return self._result

    def rows(self, start: int, end: int, of: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [start, end) of the result, or of a tensor like it, as a view."""
        tensor = self._result if of is None else of
        if tensor is None:
            raise RuntimeError("activations: the attention's result is not in memory")
        return tensor.narrow(self._token_dim, start, end - start)

    def hold(self, stash: Stash | None, counters: SavedCounters) -> None:
        """Forward is over: the result goes to `stash`."""
        if self._result is None:
            raise NotTokenLocal("it never calls the attention function")
        self._held = Held(self._result, stash, counters)
        self._result = None

    def load(self) -> None:
        """Backward begins: the result comes back."""
        if self._held is not None:
            self._result = self._held.load()

    def backward(self, of_result: torch.Tensor, sums: Sums, *, keep_graph: bool) -> Gradients:
        """Gradients of queries, keys and values, which `gather` has put together again."""
        if self._edge is None or self._saved is None:
            raise RuntimeError("activations: a second backward through a graph that was not retained")
        self._saved.known = self._known()
        gradients = sums.backward([self._edge], [of_result], self._inputs, keep_graph=keep_graph)
        self._saved.known = {}
        self._qkv = []
        if not keep_graph:
            self._edge = None
        return gradients

    def drop(self) -> None:
        """Lets go of what only a pass under way needs."""
        self._qkv, self._result = [], None

    def release(self) -> None:
        """No backward follows: gives everything back."""
        self.drop()
        if self._held is not None:
            self._held.release()
        self._held = self._saved = self._edge = None
        self._inputs = []

    def _known(self) -> dict[str, torch.Tensor]:
        known = {f"qkv{index}": tensor for index, tensor in enumerate(self._qkv)}
        if self._result is not None:
            known["result"] = self._result
        return known


class InPlaceOfAttention(torch.autograd.Function):
    """In a layer that is replayed whole: the stored result, and the backward of the call that gave it."""

    @staticmethod
    def forward(ctx: Any, middle: Middle, sums: Sums, keep_graph: bool, *qkv: torch.Tensor) -> torch.Tensor:
        ctx.middle, ctx.sums, ctx.keep_graph = middle, sums, keep_graph
        if middle.result is None:
            raise RuntimeError("activations: the attention's result is not in memory")
        return middle.result.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *ctx.middle.backward(grad, ctx.sums, keep_graph=ctx.keep_graph)


def _arguments(call: AttentionCall, whole: dict[int, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's other arguments, with what was cut for the chunk that makes it whole again."""

    def restore(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = whole.get(id(value), value)
            if value.requires_grad and not value.is_leaf:
                raise NotTokenLocal("it computes more for its attention call than queries, keys and values")
        return value

    args, kwargs = call.arguments
    return tuple(restore(value) for value in args), {name: restore(value) for name, value in kwargs.items()}
