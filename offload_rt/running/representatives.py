"""Layers that are alike take alike: of each kind a rehearsal runs one, and what it took is counted for all of them.

    the step         embedding | layer 0 | layer 1 | layer 2 | ... | layer n-1 | head | layer n-1 | ... | layer 0
    what is run      embedding | layer 0 | layer 1 | hands its input on ...    | head |           layer 1 | layer 0
    what is counted  embedding | layer 0 | layer 1 | layer 1 | ... | layer 1   | head | layer 1   | ... | layer 0

A whole step would take a step's time, which at long sequences is long, and memory for the record of what it allocates:
two kilobytes for each block. What a layer leaves behind (its input, what is kept of its activations) is in the bytes of
its forward, what its backward gives back in that one's, so that adding up what was counted from mark to mark gives the
bytes of the whole step.

Alike are layers with the same modules, plain attributes, parameters and places of activations. The first layer stands
for itself alone: what comes before it, it may give back differently. Layers are left to themselves, all of them, where
they lie in several stacks or few would be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.memory.allocations import AllocationMeter, Stretch

HEAD = "head"
_NUMBERING = {"layer_idx", "layer_index", "layer_id", "layer_number", "block_idx", "idx"}
"""Attributes that only say which layer it is."""


class Unlike(Exception):
    """Layers that looked alike are not, or not in a way that can be left out."""


def representatives(layers: Sequence[RecomputedLayer]) -> list[int] | None:
    """For each layer the index of the one that is run for it; None where all are to be run."""
    stacks = {layer.block.name.rpartition(".")[0] for layer in layers}
    if len(stacks) != 1:
        return None
    first_of: dict[tuple[Any, ...], int] = {}
    found = []
    trains_before = False
    for index, layer in enumerate(layers):
        trains = any(parameter.requires_grad for parameter in layer.layer.parameters())
        kind = (_kind(layer), trains_before) if index else ("the first",)
        found.append(first_of.setdefault(kind, index))
        trains_before = trains_before or trains
    return found if 2 * len(set(found)) <= len(found) else None


def _kind(layer: RecomputedLayer) -> tuple[Any, ...]:
    modules = [
        (name, type(module), sorted((k, v) for k, v in vars(module).items() if _tells(k, v)))
        for name, module in layer.layer.named_modules()
    ]
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.layer.named_parameters()]
    stored = [(spec.shape, spec.dtype, spec.encoding) for spec in layer.block.spec.tensors]
    return (
        type(layer), repr(getattr(layer, "policy", None)), layer.around.stash is None, layer.around.hold_decoded,
        repr(modules),
        repr(parameters), repr(stored),
    )  # fmt: skip


def _tells(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and name not in _NUMBERING


@contextmanager
def run_alone(layers: Sequence[RecomputedLayer], run_for: Sequence[int]) -> Iterator[None]:
    """Inside, only the representatives run, between marks; the others hand their input on: calls may raise `Unlike`."""
    shapes: dict[int, _Shape] = {}
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(layer.layer, layer.layer.forward) for layer in layers]
    for index, (module, forward) in enumerate(forwards):
        is_last = index == len(layers) - 1
        if run_for[index] == index:
            module.forward = _Marked(index, forward, shapes, is_last=is_last)
        else:
            module.forward = _HandsOn(shapes, run_for[index], is_last=is_last)
    try:
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


class _Shape:
    """How a layer's result is put together: around its hidden states, there is nothing but constants."""

    def __init__(self, output: Any) -> None:
        leaves, self._structure = pytree.tree_flatten(output)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if len(tensors) != 1:
            raise Unlike(f"a layer gives {len(tensors)} tensors")
        (self._place,) = tensors
        hidden = leaves[self._place]
        self._leaves = [None if place == self._place else leaf for place, leaf in enumerate(leaves)]
        self._hidden = (hidden.shape, hidden.dtype, hidden.requires_grad)

    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        hidden = next((t for t in tensors if (t.shape, t.dtype, t.requires_grad) == self._hidden), None)
        if hidden is None:
            raise Unlike("a layer is given nothing that is as its result")
        leaves = [*self._leaves]
        leaves[self._place] = hidden
        return pytree.tree_unflatten(leaves, self._structure)


class _Marked:
    """A layer that runs, with marks where its forward and its backward begin."""

    def __init__(self, index: int, forward: Callable[..., Any], shapes: dict[int, _Shape], *, is_last: bool) -> None:
        self._index = index
        self._forward = forward
        self._shapes = shapes
        self._is_last = is_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        AllocationMeter.mark(_forward_of(self._index))
        output = self._forward(*args, **kwargs)
        self._shapes[self._index] = _Shape(output)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(self._begins_backward)  # type: ignore[no-untyped-call]
        if self._is_last:
            AllocationMeter.mark(HEAD)
        return output

    def _begins_backward(self, _: torch.Tensor) -> None:
        AllocationMeter.mark(_backward_of(self._index))


class _HandsOn:
    """Stands in for a layer that another one is run for."""

    def __init__(self, shapes: dict[int, _Shape], run_for: int, *, is_last: bool) -> None:
        self._shapes = shapes
        self._run_for = run_for
        self._is_last = is_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_last:
            AllocationMeter.mark(HEAD)
        return self._shapes[self._run_for].around(args, kwargs)


def _forward_of(index: int) -> str:
    return f"forward of {index}"


def _backward_of(index: int) -> str:
    return f"backward of {index}"


def whole_step(stretches: Sequence[Stretch], run_for: Sequence[int]) -> list[Stretch]:
    """What every layer would have taken, from what the representatives took. Raises `Unlike` where marks are missing
    or in another order.
    """
    by_mark = {stretch.mark: stretch for stretch in stretches}
    run = sorted(set(run_for))
    backward = [mark for index in reversed(run) if (mark := _backward_of(index)) in by_mark]
    if [stretch.mark for stretch in stretches] != ["", *map(_forward_of, run), HEAD, *backward]:
        raise Unlike("layers run in another order than they lie in")
    forward = [by_mark[_forward_of(index)] for index in run_for]
    back = [by_mark[mark] for index in reversed(run_for) if (mark := _backward_of(index)) in by_mark]
    return [stretches[0], *forward, by_mark[HEAD], *back]
