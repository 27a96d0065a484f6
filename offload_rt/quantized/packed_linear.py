"""Linears of a layer whose NF4 weight is multiplied as it lies packed, for as many tokens as a plan says: a cut.

A `PackedLinear` takes the place of one linear's `forward`. It decides by the number of tokens alone, so that a layer's
recompute goes the way that its forward went; where the plan says nothing it shows the decoded weight and calls the
module, as without it. Autograd keeps a reference to the packed weight, as the decoder's does. Backward decodes: the
gradient of the input is plain's product, in plain's order.

Only for layers that run whole: a layer by chunks of tokens keeps graphs beyond the time that its weights are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload_rt.dtypes import torch_dtype
from offload_rt.layers.access import put_forward_back
from offload_rt.layers.block import Binding, Block
from offload_rt.quantized.decoder import Decoder, PackedWeight
from offload_rt.quantized.nf4_layout import nf4_layout
from offload_rt.quantized.nf4_products import Products, Way
from offload_rt.tensor_spec import Encoding


class PackedLinear:
    """Replaces the `forward` of a linear while the engine lives. Its block must be attached first."""

    def __init__(self, module: nn.Linear, block: Block, binding: Binding, products: Products) -> None:
        self.module = module
        self.took_packed = False
        """Whether its last call did; then there was no product that a recompute could leave out."""
        self._block = block
        self._spec = binding.spec
        self._products = products
        self._forward: Callable[..., Any] = module.forward

    def attach(self) -> None:
        self._block.shows_itself.add(self.module)
        self.module.forward = self  # type: ignore[method-assign]

    def detach(self) -> None:
        put_forward_back(self.module, self._forward, had_own=False)
        self._block.shows_itself.discard(self.module)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        way = self._way(input)
        self.took_packed = way is not None
        if way is None or self._block.slot is None:
            with self._block.shown(self.module):
                out: torch.Tensor = self._forward(input)
            return out
        self._products.counters.num_packed_products += 1
        weight = PackedWeight(self._spec, self._block.slot)
        product: Any = _Product.apply(input, self.module.bias, way, weight, self._block.decoder)  # type: ignore[no-untyped-call]
        result: torch.Tensor = product
        return result

    def _way(self, x: torch.Tensor) -> Way | None:
        rows, columns = self._spec.shape
        if type(self.module) is not nn.Linear:  # parametrized, for a while: its weight is not what lies packed
            return None
        bias = self.module.bias
        if x.shape[-1:] != (columns,) or x.dtype != torch_dtype(self._spec.dtype) or not x.numel():
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if bias is not None and (bias.requires_grad or bias.dtype != x.dtype):
            return None
        return self._products.way(rows, columns, x.numel() // columns)


def packed_linears(block: Block, products: Products) -> list[PackedLinear]:
    """Those of the block's linears for which the plan names another way than decoding. Nothing is attached."""
    return [
        PackedLinear(owner, block, binding, products)
        for binding in block.bindings
        if binding.spec.encoding is Encoding.NF4 and products.names(*binding.spec.shape)
        for owner in binding.owners
        # What calls itself a linear and is none (a subclass, a forward of the user's) may do more than a product.
        if type(owner) is nn.Linear and "forward" not in vars(owner) and owner.weight is binding.parameter
    ]


class _Product(torch.autograd.Function):
    """One product as one operation. It saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, way: Way, weight: PackedWeight, decoder: Decoder
    ) -> torch.Tensor:
        ctx.weight, ctx.decoder = weight, decoder
        spec = weight.spec
        blob = weight.slot.tensor(torch.uint8, (nf4_layout(spec.num_elements).total_bytes,), spec.offset_bytes)
        return way.product(x, blob, spec.shape[0], bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient @ ctx.decoder.decode(ctx.weight), None, None, None, None
