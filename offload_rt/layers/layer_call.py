"""One call of a layer: its arguments taken apart into tensors and the rest, so that it can be run on others.

Not here: when it is run again, and how it takes part in autograd; see `autograd` and `tokenwise`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from offload_rt.errors import IntegrityError, UnsupportedModule
from offload_rt.layers.access import graph_is_kept
from offload_rt.layers.block import Block
from offload_rt.layers.switches import Switches
from offload_rt.random_state import RandomState, kept_random_state


class Owner(Protocol):
    """What a call asks of whoever has taken the place of the layer that was called."""

    layer: nn.Module
    block: Block

    def run(self, args: Any, kwargs: Any) -> Any:
        """The layer's own forward."""

    def beside_block(self) -> list[torch.Tensor]:
        """The layer's parameters and buffers that are not its block's."""

    def hand_over(self, call: Call, gradients: Sequence[torch.Tensor | None]) -> None:
        """Takes the gradients of `call.streamed`."""

    def is_over(self, call: Call) -> None:
        """No pass comes to `call` any more, which had nothing to hand over."""

    def switches(self) -> Switches:
        """Those of the layer's modules as they are now."""


class Call:
    """One call of a layer, and what is needed to run it again. Its tensors are its own until somebody takes them."""

    def __init__(
        self,
        owner: Owner,
        leaves: list[Any],
        structure: Any,
        trainable: list[nn.Parameter],
        streamed: list[nn.Parameter],
    ) -> None:
        self.owner = owner
        self.trainable = trainable + streamed
        """All that a gradient is wanted of."""
        self.streamed = streamed
        """Of these, those whose gradients the owner takes, and not the graph outside."""
        self._versions = [parameter._version for parameter in self.trainable]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        _check_in_sight(owner.layer, self._constants, lambda tensor: tensor.requires_grad, "is called with")
        self._structure = structure
        self._output_structure: Any = None
        self._output_constants: list[Any] = []
        gpu = next((tensor.device for tensor in self.tensors if tensor.is_cuda), None)
        self.device = torch.device("cpu") if gpu is None else gpu
        self.random_state = RandomState.now(self.device)
        self.switches = owner.switches()
        kind = self.device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.node: weakref.ref[Any] | None = None
        """The call in the graph outside."""

    def is_to_come(self) -> bool:
        """Whether the backward pass under way will go through this call."""
        node = None if self.node is None else self.node()
        return node is not None and bool(torch._C._will_engine_execute_node(node))

    def check_unchanged(self) -> None:
        """Raises `IntegrityError` where what trains is not what it was in forward: the layer runs again with it."""
        if [parameter._version for parameter in self.trainable] != self._versions:
            raise IntegrityError(
                f"{self.owner.block.name}: this backward pass is of a forward from before what trains was changed (by "
                f"a step, or what was loaded). Its layers run again with the values of now, whose gradients would be "
                f"wrong. Call backward before step; zero the gradients before the next one"
            )

    def graph_parameters(self) -> list[torch.Tensor]:
        """The parameters that are inputs of the operation: all, so that a pass says of each whether it is asked for.
        Those that stream are the last, and get no gradient of the graph outside, which would keep it whole.
        """
        return list(self.trainable)

    def of_graph(self, gradients: Sequence[torch.Tensor | None], node: Any) -> list[torch.Tensor | None]:
        """Hands over the gradients of what streams, as far as the pass under way was asked for them; the others, as the
        graph outside wants them. `node`: the operation, whose backward this is.
        """
        num_known = len(self.trainable) - len(self.streamed)
        inputs = node.next_functions
        asked = _are_asked_for([leaf for leaf, _ in inputs[len(inputs) - len(self.streamed) :]])
        if any(asked) or not asked:  # by `torch.autograd.grad` of activations, none
            streamed = zip(gradients[num_known:], asked, strict=True)
            self.owner.hand_over(self, [gradient if is_asked else None for gradient, is_asked in streamed])
        elif not graph_is_kept():
            self.owner.is_over(self)
        return [*gradients[:num_known], *[None] * len(self.streamed)]

    def leaves(self) -> tuple[list[Any], Any]:
        """The arguments as they came, flat, and the structure that they came in."""
        supply = iter(self.tensors)
        pairs = zip(self._is_tensor, self._constants, strict=True)
        return [next(supply) if is_tensor else constant for is_tensor, constant in pairs], self._structure

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the layer on `tensors` in place of the call's own; returns the tensors among its outputs."""
        supply = iter(tensors)
        leaves = [
            next(supply) if is_tensor else constant
            for is_tensor, constant in zip(self._is_tensor, self._constants, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        outputs, self._output_structure = pytree.tree_flatten(self.owner.run(args, kwargs))
        self._output_constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs]
        _check_in_sight(self.owner.layer, self._output_constants, torch.Tensor.is_floating_point, "returns")
        self._output_is_tensor = [isinstance(leaf, torch.Tensor) for leaf in outputs]
        return [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]

    def rebuild_output(self, outputs: tuple[torch.Tensor, ...]) -> Any:
        supply = iter(outputs)
        leaves = [
            next(supply) if is_tensor else constant
            for is_tensor, constant in zip(self._output_is_tensor, self._output_constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._output_structure)

    def which_to_stash(self) -> int | None:
        """The hidden states: the first input that requires a gradient, else the first floating-point one."""
        floating = [index for index, tensor in enumerate(self.tensors) if tensor.is_floating_point()]
        graded = [index for index in floating if self.tensors[index].requires_grad]
        return next(iter(graded + floating), None)

    def autocasting(self, *, cache_enabled: bool) -> AbstractContextManager[Any]:
        """Autocast as it was in forward."""
        enabled, dtype = self.autocast
        if not enabled and not torch.is_autocast_enabled(self.device.type):
            return nullcontext()
        again: AbstractContextManager[Any]
        again = torch.autocast(self.device.type, enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)
        return again

    def as_in_forward(self) -> AbstractContextManager[None]:
        """Random numbers and autocast as they were in forward."""
        return _AsInForward(self)

    def as_switched(self) -> AbstractContextManager[None]:
        """What users may switch as it was in forward: for the run, and for the gradients that are taken of it."""
        return self.switches.put_back(self.trainable)


class _AsInForward(kept_random_state):
    def __init__(self, call: Call) -> None:
        super().__init__(call.device)
        self._call = call
        self._autocasting = call.autocasting(cache_enabled=call.autocast_cache)

    def __enter__(self) -> None:
        super().__enter__()
        self._call.random_state.restore()
        self._autocasting.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._autocasting.__exit__(*exception)
        super().__exit__(*exception)


def _are_asked_for(leaves: list[Node]) -> list[bool]:
    """Of each whether the backward pass under way accumulates a gradient there: some leave parameters out (`inputs=`),
    and `torch.autograd.grad` all of them.
    """
    try:
        return [*map(torch._C._will_engine_execute_node, leaves)]
    except RuntimeError:  # of one of them
        return [_is_asked_for(leaf) for leaf in leaves]


def _is_asked_for(leaf: Node) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # which torch says of a leaf whose gradient is the result of `torch.autograd.grad`
        return False


def _check_in_sight(
    layer: nn.Module, constants: Sequence[Any], counts: Callable[[torch.Tensor], bool], does: str
) -> None:
    """Raises `UnsupportedModule` where an object has tensors among its attributes: they would get no gradient."""
    for constant in constants:
        attributes = getattr(constant, "__dict__", None)
        if attributes is None or isinstance(constant, type):
            continue
        if any(isinstance(value, torch.Tensor) and counts(value) for value in attributes.values()):
            raise UnsupportedModule(
                f"{type(layer).__name__} {does} a {type(constant).__name__}, whose tensors get no gradient where the "
                f"layer is recomputed. Use tensors, tuples or dicts, or register the class with torch.utils._pytree"
            )
