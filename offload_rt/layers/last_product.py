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

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.layers.access import put_forward_back
from offload_rt.quantized.packed_linear import PackedLinear

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


class left_out:
    """A context inside which a call of `module` gives NaN. Raises `ResultWanted` as soon as anything inside needs more
    than that.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watch: _Watch | None = None
        """From the product on."""

    def __enter__(self) -> None:
        self._had_own = "forward" in self._module.__dict__
        self._forward: Any = self._module.forward
        self._module.forward = self._without

    def __exit__(self, *exception: Any) -> None:
        try:
            put_forward_back(self._module, self._forward, had_own=self._had_own)
        finally:
            if self._watch is not None:
                self._watch.__exit__(*exception)  # type: ignore[no-untyped-call]
                self._watch = None

    def _without(self, *args: Any, **kwargs: Any) -> Any:
        if self._watch is None:
            self._watch = _Watch()
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._watch.is_product = True
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._watch.is_product = False


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
        given = [tensor for tensor in _tensors(args, kwargs) if tensor.layout is torch.strided]
        made = [] if func in _SHAPE_ONLY else [tensor for tensor in given if _storage(tensor) in self.made]
        if made:
            others = [tensor for tensor in given if all(tensor is not one for one in made)]
            scales = func in _SCALES and made[0] is args[0] and len(made) == 1
            if func not in _HANDS_ON and not (scales and not any(tensor.requires_grad for tensor in others)):
                raise ResultWanted(str(func))
        out = func(*args, **(kwargs or {}))
        if made:
            for tensor in _tensors((out,), None):
                self._hold(tensor)
        return out

    def _hold(self, tensor: torch.Tensor) -> torch.Tensor:
        self.made[_storage(tensor)] = tensor
        return tensor


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """Those among an operation's arguments or results: single, or in lists. Without pytree, which takes longer than
    most operations, and is asked for each.
    """
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value, None)
    return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
