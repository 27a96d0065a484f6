"""Leaves the last product of a layer out of its recompute: backward wants its operands, and nobody its result.

A transformer layer ends with a product, the down projection of its MLP, whose result is scaled, cast and added to what
came before. Backward keeps operands of products, and nothing of a sum. So the recompute can put NaN in place of the
result, which is a quarter of a Llama layer's forward: the graph is the same, and every gradient, to the bit.

    forward    ... gate, up -> act -> down -> + residual -> output
    recompute  ... gate, up -> act -> (NaN) -> + residual -> (nobody looks)

[Note: nobody wants the result]
That is not assumed but looked at, in every recompute: from the product to the end of the layer each operation passes
`_Watch`. What is made of the result may go through operations that hand values on and keep none of them (`_HANDS_ON`),
or be multiplied by what wants no gradient. Anything else (a norm behind the product, a comparison, somebody's hook that
takes a mean) raises `ResultWanted`, and the layer is run again in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.access import put_forward_back
from offload_rt.packed_linear import PackedLinear

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
"""What a linear comes down to, and which argument is its first factor."""
_HANDS_ON = {
    _aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten._to_copy.default, _aten.clone.default,
    _aten.detach.default, _aten.alias.default, _aten.view.default, _aten._unsafe_view.default, _aten.t.default,
    _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default,
    _aten.slice.Tensor, _aten.native_dropout.default,
}  # fmt: skip
_SHAPE_ONLY = {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default}
"""These take no value from their operand."""
_SCALES = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor}
"""These keep their first operand where the second wants a gradient, and the other way round."""


class ResultWanted(Exception):
    """Something in the layer needs the value of the product."""


def is_product(module: nn.Module | None) -> bool:
    """Whether `module` may be what `left_out` is for: one product, of a matrix that it owns and decodes."""
    weight = getattr(module, "weight", None)
    forward = getattr(module, "forward", None)
    if isinstance(forward, PackedLinear) and forward.took_packed:
        return False
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and getattr(weight, "ndim", 0) == 2)


@contextlib.contextmanager
def left_out(module: nn.Module) -> Iterator[None]:
    """Inside, a call of `module` gives NaN. Raises `ResultWanted` as soon as anything inside needs more than that."""
    forward: Any = module.forward
    had_own = "forward" in module.__dict__
    with contextlib.ExitStack() as to_the_end:
        watch = _Watch()

        def without(*args: Any, **kwargs: Any) -> Any:
            if not watch.made:
                to_the_end.enter_context(watch)
            watch.is_product = True
            try:
                return forward(*args, **kwargs)
            finally:
                watch.is_product = False

        module.forward = without
        try:
            yield
        finally:
            put_forward_back(module, forward, had_own=had_own)


class _Watch(TorchDispatchMode):
    """See [Note: nobody wants the result]. Below autograd: the graph is that of the full product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_product = False
        self.made: dict[int, torch.Tensor] = {}
        """The result and all that was made of it, by storage; held, so that no other tensor gets their memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_product and func in _PRODUCTS:
            first, second = args[_PRODUCTS[func] :][:2]
            return self._hold(first.new_full((first.shape[0], second.shape[1]), float("nan")))
        leaves = pytree.tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]
        made = [tensor for tensor in given if _storage(tensor) in self.made and func not in _SHAPE_ONLY]
        if made:
            others = [tensor for tensor in given if all(tensor is not one for one in made)]
            scales = func in _SCALES and made[0] is args[0] and len(made) == 1
            if func not in _HANDS_ON and not (scales and not any(tensor.requires_grad for tensor in others)):
                raise ResultWanted(str(func))
        out = func(*args, **(kwargs or {}))
        if made:
            pytree.tree_map_only(torch.Tensor, self._hold, out)
        return out

    def _hold(self, tensor: torch.Tensor) -> torch.Tensor:
        self.made[_storage(tensor)] = tensor
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
