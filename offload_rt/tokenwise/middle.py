"""The middle of a layer: its attention call over all tokens, made once, whose backward needs no second one.

Queries, keys and values are gathered chunk by chunk. The call is a black box under saved-tensor hooks, between the
beginning of a graph and its result: no kernel is known here. What it saves of its operands and of its result it saves
by reference, so that between forward and backward there is only the result, and what else the kernel wants (say, a
log-sum-exp). Before backward the operands are gathered again, in the same memory layout, or the references would lie.

[Note: groups of heads]
Heads of keys and values, with the queries that share them, need nothing of each other: the call may be made for some of
them at a time. What a kernel takes besides (masks and probabilities of all pairs of tokens, copies of keys for each
query) is then that of a group; and as a group's operands are done with, its gradients take their place. Kernels without
dropout give the same bits for a head whichever others they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from offload_rt.tokenwise.attention import QKV_TOKEN_DIM, AttentionCall, intercepted
from offload_rt.tokenwise.graphs import Gradients, Sums, enter
from offload_rt.tokenwise.saved import Held, Place, SavedCounters, SavedTensors, dense, memory_order
from offload_rt.tokenwise.slicing import NotTokenLocal

_HEAD_DIM = 1
"""Of queries, keys and values."""


@dataclass(eq=False)
class _HeadGroup:
    """One attention call, of some heads of keys and values and the queries that belong to them."""

    heads: tuple[slice, slice, slice]
    """Of queries, keys and values."""
    saved: SavedTensors
    result: torch.Tensor | None
    edge: GradientEdge | None
    inputs: list[GradientEdge]
    held: list[tuple[int, int, Held]] = field(default_factory=list)
    """Tokens [start, end) of the result, each part in its own place."""
    order: list[int] = field(default_factory=list)
    """The result's dimensions from the slowest to the fastest in memory."""

    def of(self, tensor: torch.Tensor, index: int, dim: int = _HEAD_DIM) -> torch.Tensor:
        """Its heads of a tensor like queries (0), keys (1) or values (2), as a view."""
        heads = self.heads[index]
        return tensor.narrow(dim, heads.start, heads.stop - heads.start)


class Middle:
    """The attention of one pass, from forward to backward. See [Note: groups of heads]."""

    def __init__(self, num_tokens: int, num_groups: int = 1) -> None:
        self._num_tokens = num_tokens
        self._num_groups = num_groups
        self._token_dim = 0
        self._result_head_dim = 0
        self._orders: list[list[int]] = []
        self._qkv: list[torch.Tensor] = []
        self._groups: list[_HeadGroup] = []

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

    def operands(self, start: int, end: int) -> Iterator[torch.Tensor]:
        """Copies of tokens [start, end) of the queries, keys and values that are gathered, in their memory layout."""
        for tensor, order in zip(self._qkv, self._orders, strict=True):
            yield _copied(tensor.narrow(QKV_TOKEN_DIM, start, end - start), order)

    def attend(self, call: AttentionCall, whole: dict[int, torch.Tensor], new_saved: Callable[[], SavedTensors]) -> int:
        """Makes the call over all tokens. `whole`: by identity, what its other arguments were cut from.

        Returns the bytes that it saves besides operands and result. Raises `NotTokenLocal` where it is more than a
        function of queries, keys, values, arguments and parameters, or cannot be made for a group of heads.
        """
        args, kwargs = _arguments(call, whole)
        self._token_dim = call.out_token_dim
        self._result_head_dim = 2 if call.out_token_dim == 1 else 1
        versions = [tensor._version for tensor in self._qkv]
        num_bytes = 0
        for heads in self._cut_heads():
            saved = new_saved()
            saved.known = self._known()
            group = _HeadGroup(heads, saved, None, None, [])
            entered = [enter(group.of(tensor, index)) for index, tensor in enumerate(self._qkv)]
            with intercepted(None), torch.enable_grad(), saved.hooks():
                result = self._call(call, [tensor for tensor, _ in entered], args, kwargs, heads[0])
            group.inputs = [edge for _, edge in entered]
            group.edge = get_gradient_edge(result)
            group.result = dense(result.detach())
            saved.recognise(f"result{len(self._groups)}", group.result)
            self._groups.append(group)
            num_bytes += saved.seal()
        if [tensor._version for tensor in self._qkv] != versions:
            raise NotTokenLocal("its attention function changes its operands in place")
        self._qkv = []
        return num_bytes

    def _cut_heads(self) -> list[tuple[slice, slice, slice]]:
        """Heads of queries, keys and values by group; all of them for one group."""
        queries, keys, values = (tensor.shape[_HEAD_DIM] for tensor in self._qkv)
        if self._num_groups == 1:
            return [(slice(0, queries), slice(0, keys), slice(0, values))]
        if keys != values or queries % keys:
            raise NotTokenLocal(f"its {queries}, {keys} and {values} heads of q, k and v cannot be taken in groups")
        num_groups = min(self._num_groups, keys)
        edges = [keys * number // num_groups for number in range(num_groups + 1)]
        shared = queries // keys
        return [
            (slice(shared * begin, shared * end), slice(begin, end), slice(begin, end))
            for begin, end in itertools.pairwise(edges)
        ]

    def _call(
        self, call: AttentionCall, qkv: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], heads: slice
    ) -> torch.Tensor:
        try:
            result = call.run(*qkv, args, kwargs)
        except RuntimeError as error:
            if self._num_groups == 1:
                raise
            raise NotTokenLocal(f"its attention cannot be made for a group of heads: {error}") from None
        if result.shape[call.out_token_dim] != self._num_tokens:
            raise NotTokenLocal(f"its attention gives {tuple(result.shape)} for {self._num_tokens} tokens")
        if self._num_groups > 1 and result.shape[self._result_head_dim] != heads.stop - heads.start:
            raise NotTokenLocal(f"its attention gives {tuple(result.shape)} for {heads.stop - heads.start} heads")
        return result

    @property
    def result(self) -> torch.Tensor | None:
        """What the call has given, while a pass is under way, as one tensor; None where it was made by groups."""
        return self._groups[0].result if len(self._groups) == 1 else None

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Tokens [start, end) of the result: a view of it, or a copy where it was made by groups."""
        parts = [group.result for group in self._groups if group.result is not None]
        if not parts:
            raise RuntimeError("activations: the attention's result is not in memory")
        rows = [part.narrow(self._token_dim, start, end - start) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, self._result_head_dim)

    def rows_of(self, gradient: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Tokens [start, end) of a tensor like `new_gradient`'s, as a view."""
        return gradient.narrow(self._token_dim, start, end - start)

    def new_gradient(self) -> torch.Tensor:
        """Zeros for the gradient of the result."""
        first = self._groups[0].result
        if first is None:
            raise RuntimeError("activations: the attention's result is not in memory")
        if len(self._groups) == 1:
            return torch.zeros_like(first)
        shape = list(first.shape)
        shape[self._result_head_dim] = self._groups[-1].heads[0].stop
        return torch.empty_permuted(shape, memory_order(first), dtype=first.dtype, device=first.device).zero_()

    def hold(self, places: Sequence[tuple[int, int, Place]], counters: SavedCounters) -> None:
        """Forward is over: the result's tokens [start, end) go to their places."""
        if not self._groups:
            raise NotTokenLocal("it never calls the attention function")
        if len({place for _, _, place in places}) == 1:
            places = [(0, self._num_tokens, places[0][2])]
        for group in self._groups:
            result, group.result = group.result, None
            if result is None:
                continue
            group.order = memory_order(result)
            for start, end, place in places:
                rows = result.narrow(self._token_dim, start, end - start)
                own = rows if len(places) == 1 else _copied(rows, group.order)  # a view would hold all of it
                group.held.append((start, end, Held(own, place, counters)))

    def load(self) -> None:
        """Backward begins: the result comes back, in the memory layout that it had."""
        for group in self._groups:
            if len(group.held) == 1:
                group.result = group.held[0][2].load()
            elif group.held:
                parts = [(start, end, held.load()) for start, end, held in group.held]
                shape, first = list(parts[0][2].shape), parts[0][2]
                shape[self._token_dim] = self._num_tokens
                result = torch.empty_permuted(shape, group.order, dtype=first.dtype, device=first.device)
                for start, end, rows in parts:
                    result.narrow(self._token_dim, start, end - start).copy_(rows)
                group.result = result

    def backward(self, of_result: torch.Tensor, sums: Sums, *, keep_graph: bool) -> Gradients:
        """Gradients of queries, keys and values, which `gather` has put together again."""
        gradients: Gradients = [None, None, None]
        for group in self._groups:
            if group.edge is None:
                raise RuntimeError("activations: a second backward through a graph that was not retained")
            group.saved.known = self._known()
            of_group = group.of(of_result, 0, self._result_head_dim)
            found = sums.backward([group.edge], [of_group], group.inputs, keep_graph=keep_graph)
            group.saved.known = {}
            if not keep_graph:
                group.edge = None
            if len(self._groups) == 1:
                gradients = found
                continue
            for index, gradient in enumerate(found):  # nobody wants the group's operands any more
                if gradient is not None:
                    group.of(self._qkv[index], index).copy_(gradient)
                    gradients[index] = self._qkv[index]
            found, gradient = [], None  # or they would be there while the next group's are made
        self._qkv = []
        return gradients

    def drop(self) -> None:
        """Lets go of what only a pass under way needs."""
        self._qkv = []
        for group in self._groups:
            group.result = None

    def release(self) -> None:
        """No backward follows: gives everything back."""
        for group in self._groups:
            for _, _, held in group.held:
                held.release()
        self._groups, self._qkv = [], []

    def _known(self) -> dict[str, torch.Tensor]:
        known = {f"qkv{index}": tensor for index, tensor in enumerate(self._qkv)}
        results = {f"result{number}": group.result for number, group in enumerate(self._groups)}
        return known | {name: result for name, result in results.items() if result is not None}


class InPlaceOfAttention(torch.autograd.Function):
    """In a layer that is replayed whole: the stored result, and the backward of the call that gave it."""

    @staticmethod
    def forward(ctx: Any, middle: Middle, sums: Sums, keep_graph: bool, *qkv: torch.Tensor) -> torch.Tensor:
        ctx.middle, ctx.sums, ctx.keep_graph = middle, sums, keep_graph
        return middle.rows(0, qkv[0].shape[QKV_TOKEN_DIM]).detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *ctx.middle.backward(grad, ctx.sums, keep_graph=ctx.keep_graph)


def _copied(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    return torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


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
