"""Pieces of autograd graphs: where they begin, the edges by which they are held, gradients through them and their sums.

[Note: graphs without leaves]
A leaf's AccumulateGrad node would pin its tensor. So graphs begin at an identity operation (`enter`) and only edges
are kept: of a chunk's input, queries, keys, values, attention rows and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

Edges = Sequence[GradientEdge | None]
Gradients = list[torch.Tensor | None]

_BEGINNINGS = ("torch::autograd::AccumulateGrad", "_EntryBackward")


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        return None, None


def enter(tensor: torch.Tensor) -> tuple[torch.Tensor, GradientEdge]:
    """`tensor` as a graph's beginning, and the edge at which its gradient is had. See [Note: graphs without leaves]."""
    with torch.enable_grad():
        entered: torch.Tensor = _Entry.apply(torch.empty(0, requires_grad=True), tensor)  # type: ignore[no-untyped-call]
    return entered, get_gradient_edge(entered)


def edge(tensor: torch.Tensor) -> GradientEdge | None:
    """Where the gradient of `tensor` enters its graph; None if it has none."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def share(first: Edges, second: Edges) -> bool:
    """Whether two graphs have a node in common that is more than a beginning."""
    return any(node.name() not in _BEGINNINGS for node in _reached(first) & _reached(second))


def _reached(edges: Edges) -> set[Any]:
    found: set[Any] = set()
    todo = [edge.node for edge in edges if edge is not None]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions if following is not None]
    return found


class Sums:
    """Gradients of parameters, added up over the pieces of a pass in fp32 and given once, in their own dtype."""

    def __init__(self, parameters: Sequence[torch.Tensor], *, in_fp32: bool) -> None:
        self._parameters = parameters
        self._in_fp32 = in_fp32
        self._sums: Gradients = [None] * len(parameters)

    def backward(self, outputs: Edges, grads: Gradients, inputs: Edges, *, keep_graph: bool) -> Gradients:
        """Gradients of `inputs`, None for what does not lead there; those of the parameters are added to the sums."""
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
        sources: list[Any] = [edge for edge in inputs if edge is not None]
        if not pairs or not (sources or self._parameters):
            return [None] * len(inputs)
        found = torch.autograd.grad(
            [out for out, _ in pairs], [*sources, *self._parameters], [grad for _, grad in pairs],
            retain_graph=keep_graph, allow_unused=True,
        )  # fmt: skip
        for index, gradient in enumerate(found[len(sources) :]):
            if gradient is not None:
                self._add(index, gradient)
        supply = iter(found)
        return [None if edge is None else next(supply) for edge in inputs]

    def _add(self, index: int, gradient: torch.Tensor) -> None:
        total = self._sums[index]
        if total is not None:
            total.add_(gradient)
        elif self._in_fp32:
            # Memory of our own: autograd may have given the same tensor to others.
            wide = gradient.dtype in (torch.float32, torch.float64)
            self._sums[index] = gradient.clone() if wide else gradient.float()
        else:
            self._sums[index] = gradient

    def gradients(self) -> Gradients:
        """One for each parameter, None for those that no piece has used."""
        return [None if s is None else s.to(p.dtype) for s, p in zip(self._sums, self._parameters, strict=True)]
