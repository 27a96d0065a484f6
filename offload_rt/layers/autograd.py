"""How a streamed layer takes part in autograd: forward keeps only its input, backward runs the layer again.

`RecomputedLayer` wraps a layer's `forward` in one autograd Function. Its inputs are the layer's tensors and its
trainable parameters, so that their gradients flow through the graph outside, once each, as if the layer were one
operation; the recompute has a graph of its own, which dies before the layer's weights leave. With one micro-batch per
call the bits are those of plain autograd: the same operations on the same operands.

Parameters that stream and train (full fine-tuning) are no inputs of the operation: the graph outside would keep their
gradients whole. Theirs are handed to `deliver` as soon as the layer's backward has them.

    forward    open block | run, no graph | close block          saved: inputs (or their stash), RNG state, autocast
    backward   open block | run again with graph | gradients | close block

One call, taken apart, is a `layer_call.Call`. Modules outside the layers are in `edge`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload_rt.errors import UnsupportedModule
from offload_rt.guards.additions import Additions
from offload_rt.layers.access import Access, GoneAccess, graph_is_kept, opened, put_forward_back, without_hooks
from offload_rt.layers.block import Block
from offload_rt.layers.buffers import Buffers, Values
from offload_rt.layers.caches import has_cache, without_cache
from offload_rt.layers.fingerprints import Agreement
from offload_rt.layers.last_product import ResultWanted, is_product, left_out
from offload_rt.layers.layer_call import Call
from offload_rt.layers.surroundings import Surroundings
from offload_rt.layers.switches import Switches
from offload_rt.memory.heap import places_for, put_into
from planners.plans.schedule import Phase

CHECKED_CALLS = 2
"""Calls of each layer whose output is looked at: its first forward and first recompute, refused ones aside."""

_WRITTEN_TO_ONE_ELEMENT = "more than one element of the written-to tensor"
"""What torch says of a write to a placeholder; see `block.placeholder`."""


class RecomputedLayer:
    """Replaces the `forward` of one layer of the user's model while the engine lives."""

    def __init__(
        self,
        layer: nn.Module,
        block: Block,
        access: Access,
        around: Surroundings | None = None,
        *,
        deliver: Callable[[Mapping[int, torch.Tensor]], None] | None = None,
        additions: Additions | None = None,
    ) -> None:
        """`deliver` takes the gradients of the block's own parameters, by index, where these train; None: frozen."""
        self.layer = layer
        self.block = block
        self.access = access
        self.around = Surroundings() if around is None else around
        self._deliver = deliver
        self._open_calls: weakref.WeakSet[Call] = weakref.WeakSet()
        """Those whose backward may come."""
        self._sums: dict[int, dict[int, torch.Tensor]] = {}
        """Gradients for `deliver` by backward pass: those of a layer that it calls more than once are summed."""
        stored = {id(binding.parameter) for binding in block.bindings}
        self.additions = Additions(layer) if additions is None else additions
        """Of the engine's start, whatever runtime this is."""
        self._own = [p for p in self.additions.known if id(p) not in stored]
        self._switches = Switches(self.additions.modules)
        self._with_buffers = [module for module in layer.modules() if module._buffers]
        self.buffers = Buffers(layer) if self._with_buffers else None
        self._bindings = block.bindings
        self._forward: Callable[..., Any] = layer.forward
        self._had_own_forward = "forward" in layer.__dict__
        self._was_checkpointed = False
        self._num_checks = 0
        self.agreement = Agreement(block.name)
        self._leave_out_product = self.around.leave_out_product

    def attach(self) -> None:
        self.layer.forward = self
        self.without_checkpointing()

    def without_checkpointing(self) -> None:
        """Turns off, until `detach`, the checkpointing that transformers puts around a layer: around its `forward`, or,
        before 5.23, around its `__call__`, where the layer would run a third time. It may be turned on at any time.
        """
        if getattr(self.layer, "gradient_checkpointing", False):
            self.layer.gradient_checkpointing = False  # type: ignore[assignment]
            self._was_checkpointed = True

    def detach(self) -> None:
        put_forward_back(self.layer, self._forward, had_own=self._had_own_forward)
        if self._was_checkpointed:
            self.layer.gradient_checkpointing = True  # type: ignore[assignment]
            self._was_checkpointed = False

    def let_go(self, gone: GoneAccess) -> None:
        """Has no memory of its runtime's any more, whoever still holds it: a graph lives as long as its loss."""
        self.access = gone
        self.around = Surroundings(start_from=gone.refuse)
        if self._deliver is not None:
            self._deliver = gone.refuse

    def trainable(self) -> list[nn.Parameter]:
        """The layer's parameters that train now and stay in memory; a user may switch adapters on and off.

        `UnsupportedModule` where one requires a gradient that nobody would take: of weights at rest, or added since, as
        far as additions were looked for.
        """
        for name, parameter in self.additions.found:
            if parameter.requires_grad:
                raise UnsupportedModule(
                    f"{self.block.name}.{name} requires a gradient and was not there when the engine was made, which "
                    f"would never train it. Add it (add_adapter, load_adapter) before engine(...)"
                )
        if self._deliver is not None:
            return [p for p in self._own if p.requires_grad]
        for binding in self._bindings:
            if binding.parameter.requires_grad:
                raise UnsupportedModule(
                    f"{binding.spec.name} was frozen when the engine was made and requires a gradient now; its values "
                    f"are at rest and would never change. Make the engine after requires_grad_(True)"
                )
        return [p for p in self._own if p.requires_grad]

    def beside_block(self) -> list[torch.Tensor]:
        """The layer's parameters and buffers that are not its block's: in memory all the time."""
        buffers = [buffer for module in self._with_buffers for buffer in module.buffers(recurse=False)]
        return [*self._own, *(parameter for _, parameter in self.additions.find()), *buffers]

    def streamed(self) -> list[nn.Parameter]:
        """The block's own parameters that train now. `UnsupportedModule` where one has hooks, which would not fire."""
        if self._deliver is None:
            return []
        found = [binding.parameter for binding in self._bindings if binding.parameter.requires_grad]
        for parameter in found:
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                name = next(b.spec.name for b in self._bindings if b.parameter is parameter)
                raise UnsupportedModule(
                    f"{name}: has a hook on its gradient, which never is in memory with all others; look at "
                    f"engine.gradients() between backward and step"
                )
        return found

    def switches(self) -> Switches:
        """Those of the layer's modules as they are now. The same object for as long as nothing is switched."""
        if not self._switches.are_still():
            self._switches = Switches(self.additions.modules)
        return self._switches

    @property
    def is_in_flight(self) -> bool:
        """Whether a backward pass of a call may still come: its graph lives, and none has gone through it."""
        return len(self._open_calls) > 0

    def is_over(self, call: Call) -> None:
        """No pass comes to `call` any more, which had nothing to hand over."""
        self._open_calls.discard(call)

    def hand_over(self, call: Call, gradients: Sequence[torch.Tensor | None]) -> None:
        """Takes the gradients of `call.streamed`; delivers the layer's once this pass comes to no other call of it.

        Calls of other graphs do not count: somebody may keep the loss of a batch that is never gone back through.
        """
        self._open_calls.discard(call)
        if self._deliver is None:
            return
        this_pass = torch._C._current_graph_task_id()
        if not self.around.together():  # what another pass has left was cut off by an exception
            self._sums = {number: sums for number, sums in self._sums.items() if number == this_pass}
        index_of = {id(binding.parameter): index for index, binding in enumerate(self._bindings)}
        sums = self._sums.setdefault(this_pass, {})
        for parameter, gradient in zip(call.streamed, gradients, strict=True):
            if gradient is not None:
                index = index_of[id(parameter)]
                sums[index] = sums[index] + gradient if index in sums else gradient
        if not any(other.is_to_come() for other in self._open_calls):
            self._deliver(self._sums.pop(this_pass))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.without_checkpointing()
        self._look_for_additions()
        leaves, structure = pytree.tree_flatten((args, kwargs))
        self.around.counters.num_forwards += 1
        # Without gradients anything goes: a reference adapter is switched on by requiring some of its own.
        trainable, streamed = (self.trainable(), self.streamed()) if torch.is_grad_enabled() else ([], [])
        wants_grad = bool(trainable or streamed) or any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
        )
        if torch.is_grad_enabled() and (wants_grad or self.layer.training) and has_cache(args, kwargs):
            args, kwargs = without_cache(args, kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
        if not (torch.is_grad_enabled() and wants_grad):
            with opened(self.block, self.access, Phase.FORWARD, training=torch.is_grad_enabled()):
                output = self.run(args, kwargs)
            self.around.between()
            return output
        call = Call(self, leaves, structure, trainable, streamed)
        self._open_calls.add(call)
        outputs = self.apply(call)
        call.node = next((weakref.ref(out.grad_fn) for out in outputs if out.grad_fn is not None), None)
        self.around.between()
        return call.rebuild_output(outputs)

    def _look_for_additions(self) -> None:
        """An adapter that was added since the last call may read weights: they are shown to it, and looked at again."""
        self.additions.find()
        if self._switches.modules is not self.additions.modules:
            self._switches = Switches(self.additions.modules)
            self.block.find_readers(self.additions.modules)
            self._num_checks = 0
            self.agreement.begin()

    def apply(self, call: Call) -> tuple[torch.Tensor, ...]:
        """Runs `call` as one operation of the graph outside; returns the tensors among its outputs."""
        outputs: tuple[torch.Tensor, ...] = _Recompute.apply(  # type: ignore[no-untyped-call]
            self, call, *call.tensors, *call.graph_parameters()
        )
        return outputs

    def run(self, args: Any, kwargs: Any) -> Any:
        """The layer's own forward."""
        try:
            with self.block.shown(self.layer):
                output = self._forward(*args, **kwargs)
        except RuntimeError as error:
            if _WRITTEN_TO_ONE_ELEMENT not in str(error) or not self._has_quantized():
                raise
            raise UnsupportedModule(
                f"{self.block.name} writes to a quantized weight outside the module that owns it, which bits=4 does "
                f"not support; give bits=None"
            ) from error
        if self._num_checks < CHECKED_CALLS:
            self._check_output(args, kwargs, output)
            self._num_checks += 1
        return output

    def _has_quantized(self) -> bool:
        return any(binding.spec.is_quantized for binding in self._bindings)

    def _check_output(self, args: Any, kwargs: Any, output: Any) -> None:
        """Finite inputs that give NaN are, most likely, a weight that was read where no hook shows it."""
        if not self._has_quantized():
            return
        if _has_nan(output) and not _has_nan((args, kwargs)):
            raise UnsupportedModule(
                f"{self.block.name} gave NaN for finite inputs. Either the model itself does, or it reads a quantized "
                f"weight without calling the module that owns it, which bits=4 does not support"
            )

    def run_again(
        self, call: Call, tensors: list[torch.Tensor], written: Values | None = None, *, is_compared: bool = False
    ) -> list[torch.Tensor]:
        """The recompute: outputs that have a graph, and perhaps no values, unless they are compared. See
        `last_product`. `written` are the buffers that it writes to, as they are now.
        """
        last = self.block.last_called
        if is_compared:
            last = None
        if self._leave_out_product and last is not None and is_product(last) and self._num_checks >= CHECKED_CALLS:
            try:
                with torch.enable_grad(), self.saving(), left_out(last):
                    outputs = call.run(tensors)
                self.around.counters.num_products_left_out += 1
                return outputs
            except ResultWanted:
                self._leave_out_product = False
                call.random_state.restore()
                if self.buffers is not None and written:
                    self.buffers.put(written)
        with torch.enable_grad(), self.saving():
            return call.run(tensors)

    def saving(self) -> AbstractContextManager[Any]:
        """Inside, the recompute's graph keeps packed weights, or decoded ones where the plan holds those."""
        decoder = self.block.decoder
        return decoder.saved_decoded() if self.around.hold_decoded else decoder.saved_packed()


def _has_nan(values: Any) -> bool:
    leaves = pytree.tree_leaves(values)
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() and bool(t.isnan().any()) for t in leaves)


class _Recompute(torch.autograd.Function):
    """One layer as one operation. Inputs: it, the call, its tensors, the trainable parameters that stay in memory."""

    @staticmethod
    def forward(ctx: Any, owner: RecomputedLayer, call: Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        around = owner.around
        inputs = list(tensors[: len(call.tensors)])
        versions = [tensor._version for tensor in inputs]
        before = None if owner.buffers is None else owner.buffers.before(call.switches)
        with opened(owner.block, owner.access, Phase.FORWARD, training=True), around.transients.placed():
            outputs = call.run(inputs)
        ctx.buffers = None if owner.buffers is None or before is None else owner.buffers.written(before)
        outputs = [around.transients.kept(output) for output in outputs]
        ctx.of_forward = owner.agreement.of_forward(outputs) if owner.agreement.num_left else None
        if [tensor._version for tensor in inputs] != versions:
            raise UnsupportedModule(
                f"{owner.block.name}: the layer changed its input in place, so that it cannot be run again in backward"
            )
        ctx.owner, ctx.call = owner, call
        ctx.needs = [tensor.requires_grad for tensor in inputs]
        ctx.stashed = None
        ctx.stashed_index = None
        kept = list(inputs)
        if around.stash is not None:
            index = call.which_to_stash()
            if index is not None:
                stashed = around.stash.put(inputs[index].detach())
                if stashed is None:
                    around.counters.num_not_stashed += 1
                else:
                    ctx.stashed, ctx.stashed_index = stashed, index
                    del kept[index]
        ctx.latest = around.latest()
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        # The inputs are the context's now: a stashed one must not live on in the call.
        call.tensors = []
        ctx.mark_non_differentiable(*[out for out in outputs if not out.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        owner: RecomputedLayer = ctx.owner
        call: Call = ctx.call
        call.check_unchanged()
        around = owner.around
        around.start_from(ctx.latest)
        inputs = list(ctx.saved_tensors)
        if ctx.stashed is not None:
            inputs.insert(ctx.stashed_index, ctx.stashed.load())
            if not graph_is_kept():
                ctx.stashed.release()
        detached = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(inputs, ctx.needs, strict=True)]
        del inputs
        around.counters.num_recomputes += 1
        wanted = [tensor for tensor in detached if tensor.requires_grad]
        sources = wanted + call.trainable
        places = places_for(sources[: len(sources) - len(call.streamed)])  # [Note: pins] in heap
        with (
            opened(owner.block, owner.access, Phase.BACKWARD, training=True),
            without_hooks(call.trainable),
            call.as_switched(),
            owner.buffers.as_before(ctx.buffers) if owner.buffers and ctx.buffers else nullcontext(),
            around.transients.placed(),
        ):
            with call.as_in_forward():  # and not the gradients: autocast is of forward passes
                is_compared = owner.agreement.is_open and ctx.of_forward is not None
                outputs = owner.run_again(call, detached, ctx.buffers, is_compared=is_compared)
            if is_compared:
                owner.agreement.check(outputs, ctx.of_forward)
            elif owner.agreement.is_open:
                owner.agreement.begin()
            pairs = [
                (out, grad)
                for out, grad in zip(outputs, grad_outputs, strict=True)
                if grad is not None and out.requires_grad
            ]
            del outputs
            gradients: tuple[torch.Tensor | None, ...]
            if pairs and sources:
                gradients = torch.autograd.grad(
                    [out for out, _ in pairs], sources, [grad for _, grad in pairs], allow_unused=True
                )
            else:
                gradients = (None,) * len(sources)
            del pairs  # and with it the recompute's graph, before the weights go
        placed = [*map(put_into, gradients, places), *gradients[len(places) :]]
        supply = iter([None if gradient is None else around.transients.kept(gradient) for gradient in placed])
        del gradients, places, placed
        of_inputs = [next(supply) if tensor.requires_grad else None for tensor in detached]
        of_parameters = call.of_graph(list(supply), ctx)
        around.between()
        return (None, None, *of_inputs, *of_parameters)
