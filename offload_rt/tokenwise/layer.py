"""Takes a layer's place as `RecomputedLayer` does, and runs it by chunks of tokens, as its policy says.

A class of layers that cannot be cut is run as `RecomputedLayer` runs it: whole, and again in backward. That is logged
once, counted at every call, and reported with its reason.

    forward    open block | [try a few tokens] | chunks, attention, chunks | close block
    backward   open block | chunks, attention, chunks | close block
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from offload_rt.layers.access import graph_is_kept, opened, without_hooks
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.layers.buffers import State, Values
from offload_rt.layers.layer_call import Call
from offload_rt.random_state import RandomState
from offload_rt.tokenwise.first_products import FirstProducts
from offload_rt.tokenwise.locality import check_locality
from offload_rt.tokenwise.saved import Held
from offload_rt.tokenwise.slicing import NotTokenLocal, check_gradients, tensor_names, token_dims
from offload_rt.tokenwise.tiled_pass import TiledPass
from offload_rt.tokenwise.tiles import PassState, Places, TileCounters
from planners.errors import format_bytes
from planners.plans.activations import ActivationPolicy
from planners.plans.schedule import Phase

logger = logging.getLogger("offload_rt")

LARGE_ATTENTION = 4
"""Times the layer's input: more than any kernel saves that goes by tokens."""

WRITES_BUFFERS = "it writes to buffers in forward"
"""Why a class of layers runs whole."""


@dataclass
class Tokenwise:
    """What the layers of one engine share: where they put what they store, what they found out, what they did."""

    places: Places
    counters: TileCounters = field(default_factory=TileCounters)
    tried: set[str] = field(default_factory=set)
    """Classes of layers that were found to go by tokens."""
    refused: dict[str, str] = field(default_factory=dict)
    """Classes that run whole, and why."""
    warned: set[str] = field(default_factory=set)
    """Classes whose attention saves more than it should."""
    num_whole: int = 0
    """Calls that ran whole although the policy asked for chunks."""

    def report(self) -> dict[str, Any]:
        """Counts and bytes since the start."""
        return {**vars(self.counters), "num_whole": self.num_whole, "refused": dict(self.refused)}


class TokenwiseLayer(RecomputedLayer):
    """Replaces the `forward` of one layer of the user's model while the engine lives."""

    def __init__(self, *args: Any, policy: ActivationPolicy, tokenwise: Tokenwise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = policy
        self.tokenwise = tokenwise
        self.kind = _kind(self.layer)
        self._first_products = FirstProducts()

    def apply(self, call: Call) -> tuple[torch.Tensor, ...]:
        reason = self.tokenwise.refused.get(self.kind)
        if reason is None:
            random = RandomState.now(call.device)
            buffers = None if self.buffers is None else self.buffers.before(call.switches, to_undo=True)
            try:
                outputs: tuple[torch.Tensor, ...] = _Tokenwise.apply(  # type: ignore[no-untyped-call]
                    call, buffers, *call.tensors, *call.graph_parameters()
                )
                return outputs
            except NotTokenLocal as error:
                random.restore()
                if self.buffers is not None and buffers is not None:
                    self.buffers.put_back(buffers)
                reason = str(error)
                self._refuse(reason)
        if self.buffers is not None and reason == WRITES_BUFFERS:
            self.buffers.expect_writes()  # of one like it that was the first to
        self.tokenwise.num_whole += 1
        return super().apply(call)

    def _refuse(self, reason: str) -> None:
        self.tokenwise.refused[self.kind] = reason
        logger.warning(
            "%s: layers like it are not run by chunks of tokens but recomputed whole, which takes more memory: %s",
            self.block.name, reason,
        )  # fmt: skip

    def check_buffers(self, tiled: TiledPass, before: tuple[State, Values]) -> None:
        """Raises `NotTokenLocal` where the layer has written to buffers, which each of its runs would do again."""
        if self.buffers is not None and self.buffers.written(before) and not tiled.runs_once:
            raise NotTokenLocal(WRITES_BUFFERS)

    def look_at(self, tiled: TiledPass, given: torch.Tensor) -> None:
        """Warns, once a class, of attention that saves something of the square of the tokens."""
        if tiled.attention_bytes > LARGE_ATTENTION * given.nbytes and self.kind not in self.tokenwise.warned:
            self.tokenwise.warned.add(self.kind)
            logger.warning(
                "%s: its attention saves %s for an input of %s, besides queries, keys, values and result: masks or "
                "probabilities of all pairs of tokens. An attention implementation without them (sdpa, no dropout, no "
                "padding) needs less", self.block.name, format_bytes(tiled.attention_bytes), format_bytes(given.nbytes),
            )  # fmt: skip

    def decoding(self) -> AbstractContextManager[None]:
        """Inside, weights are decoded once for all chunks, where the plan has room for a decoded layer."""
        return self.block.holding_decoded() if self.around.hold_decoded else contextlib.nullcontext()

    def prepare(self, call: Call) -> tuple[TiledPass, list[torch.Tensor], int]:
        """A pass for `call`, its tensors, and which of them is the layer's input. The block is open."""
        hidden = call.which_to_stash()
        if hidden is None:
            raise NotTokenLocal("it is called without hidden states")
        if call.tensors[hidden].dim() < 2:
            raise NotTokenLocal("its hidden states have no dimension for tokens")
        tensors = list(call.tensors)
        if any(tensor.requires_grad for index, tensor in enumerate(tensors) if index != hidden):
            check_gradients(tensor_names(self._forward, *call.leaves()), tensors, hidden)
        spans = self.policy.spans(tensors[hidden].shape[1])
        dims: list[int | None] = [None] * len(tensors)
        if len(spans) > 1:
            names = tensor_names(self._forward, *call.leaves())
            dims = token_dims(names, tensors, hidden)
            tensors[hidden] = tensors[hidden].contiguous()
            if self.kind not in self.tokenwise.tried:
                check_locality(self, call, names, tensors, dims, hidden, self.policy.attention_groups)
                self.tokenwise.tried.add(self.kind)
        state = PassState(
            call, self.block, spans, dims, hidden, self.tokenwise.places, self.tokenwise.counters,
            first_products=self._first_products, attention_groups=self.policy.attention_groups,
        )  # fmt: skip
        return TiledPass(state), tensors, hidden


class _Tokenwise(torch.autograd.Function):
    """One layer as one operation. Inputs: the call, the layer's buffers before it, its tensors, the parameters that
    train.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, buffers: tuple[State, Values] | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        owner: Any = call.owner
        with opened(owner.block, owner.access, Phase.FORWARD, training=True), owner.decoding():
            tiled, inputs, hidden = owner.prepare(call)
            needs_input = tensors[hidden].requires_grad
            outputs = tiled.forward([tensor.detach() for tensor in inputs], needs_input=needs_input)
            if buffers is not None:
                owner.check_buffers(tiled, buffers)
            owner.look_at(tiled, inputs[hidden])
        ctx.owner = owner
        ctx.call = call
        ctx.tiled = tiled
        ctx.hidden = hidden
        ctx.needs = [needs_input and index == hidden for index in range(len(inputs))]
        held = Held(inputs[hidden], owner.tokenwise.places.with_input("input"), owner.tokenwise.counters)
        ctx.input = held if held.is_stashed else None
        ctx.latest = owner.around.latest()
        kept = list(inputs)
        if ctx.input is not None:
            del kept[hidden]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        call.tensors = []  # the context's now
        ctx.mark_non_differentiable(*[out for out in outputs if not out.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        owner, call, tiled = ctx.owner, ctx.call, ctx.tiled
        call.check_unchanged()
        owner.around.start_from(ctx.latest)
        inputs = list(ctx.saved_tensors)
        keep_graph = graph_is_kept()
        if ctx.input is not None:
            inputs.insert(ctx.hidden, ctx.input.load())
            if not keep_graph:
                ctx.input.release()
        inputs = [tensor.detach() for tensor in inputs]
        with (
            opened(owner.block, owner.access, Phase.BACKWARD, training=True),
            owner.decoding(),
            without_hooks(call.trainable),
            call.as_switched(),
        ):
            of_input, of_parameters = tiled.backward(inputs, list(grads), keep_graph=keep_graph)
        del inputs
        of_parameters = call.of_graph(of_parameters, ctx)
        owner.around.between()
        return (None, None, *[of_input if needs else None for needs in ctx.needs], *of_parameters)


def _kind(layer: torch.nn.Module) -> str:
    """Names what layers must share to be cut alike: their class and the modules in them."""
    parts = sorted(f"{name}:{type(module).__qualname__}" for name, module in layer.named_modules())
    return f"{type(layer).__name__} {zlib.crc32(repr(parts).encode()):08x}"
