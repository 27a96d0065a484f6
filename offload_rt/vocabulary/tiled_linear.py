"""A linear that streams by tiles of its rows: its weight is never in memory as a whole, its results are.

    forward    out[:, a:b] = in @ tile[a:b].T        tile after tile
    backward   grad(in) = sum of grad(out)[:, a:b] @ tile[a:b], from the last tile to the first

Tiles are blocks of a ring, fetched ahead; the backward pass begins with those that forward has left there. A loss that
takes the tiles itself (`vocabulary_loss`) answers in the linear's place when the model calls it.

[Note: products by tiles]
The sum over rows is cut. Each tile's share is computed in fp32 of what plain PyTorch multiplies (gradients rounded to
the weight's dtype), summed in fp32 and rounded once: the error against fp64 is then plain's. With shares rounded to
bf16 it was 1.4 times that (docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from offload_rt.dtypes import torch_dtype
from offload_rt.layers.access import GoneAccess, ReplacedForward
from offload_rt.layers.block import Block
from offload_rt.layers.executor import RingExecutor
from planners.plans.schedule import Phase


class TiledLinear(ReplacedForward):
    """Replaces the `forward` of a frozen linear without a bias. tiles: rows [begin, end) of each block of the ring."""

    def __init__(
        self, module: nn.Module, block: Block, executor: RingExecutor, tiles: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(module)
        self.block = block
        self.tiles = tuple(tiles)
        self._spec = block.spec.tensors[0]
        self._executor: RingExecutor | GoneAccess = executor
        self._answer: Callable[[torch.Tensor], torch.Tensor] | None = None

    def let_go(self, gone: GoneAccess) -> None:
        """Has no memory of its runtime's any more, whoever still holds it."""
        self._executor = gone

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.functional.linear`, autocast included. Inputs that do not go with the weight are its error."""
        dtype, num_columns = torch_dtype(self._spec.dtype), self._spec.shape[1]
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        elif input.dtype != dtype or input.shape[-1] != num_columns:
            return nn.functional.linear(input, input.new_empty(1, num_columns, dtype=dtype))
        if self._answer is not None:
            return self._answer(input)
        return _Product.apply(input, self)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def answered(self, answer: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside, calls of the linear get what `answer` gives for their inputs, cast as autocast would."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    def tile(self, index: int, phase: Phase, *, training: bool) -> Tile:
        return Tile(self, index, phase, training=training)

    def products(self, rows_ND: torch.Tensor, *, training: bool) -> torch.Tensor:
        """`rows_ND` times the weight, transposed."""
        found_NV = rows_ND.new_empty(rows_ND.shape[0], self._spec.shape[0])
        for index, (begin, end) in enumerate(self.tiles):
            with self.tile(index, Phase.FORWARD, training=training) as tile:
                torch.mm(rows_ND, tile.rows_RD(rows_ND.dtype).t(), out=found_NV[:, begin:end])
        return found_NV

    def input_gradient(self, grad_NV: torch.Tensor) -> torch.Tensor:
        """`grad_NV` times the weight, in fp32 or wider. See [Note: products by tiles]."""
        wide = torch.promote_types(grad_NV.dtype, torch.float32)
        sum_ND = grad_NV.new_zeros(grad_NV.shape[0], self._spec.shape[1], dtype=wide)
        for index, (begin, end) in reversed(list(enumerate(self.tiles))):
            with self.tile(index, Phase.BACKWARD, training=True) as tile:
                sum_ND.addmm_(grad_NV[:, begin:end].to(wide), tile.rows_RD(grad_NV.dtype).to(wide))
        return sum_ND


class Tile:
    """Inside, a tile is in memory, and only this holds it: whoever keeps an error from there keeps no slot."""

    def __init__(self, linear: TiledLinear, index: int, phase: Phase, *, training: bool) -> None:
        self._linear = linear
        self._index = index
        self._phase = phase
        self._training = training
        self._rows_RD: dict[torch.dtype, torch.Tensor] = {}

    def rows_RD(self, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight as `dtype`, made once. Not to be given a name: that would outlive an error."""
        if dtype not in self._rows_RD:
            self._rows_RD[dtype] = next(iter(self._rows_RD.values())).to(dtype)
        return self._rows_RD[dtype]

    def __enter__(self) -> Tile:
        executor, spec = self._linear._executor, self._linear._spec
        if isinstance(executor, GoneAccess):
            executor.refuse()
        slot = executor.acquire(self._index, self._phase, training=self._training)
        begin, end = self._linear.tiles[self._index]
        dtype = torch_dtype(spec.dtype)
        self._rows_RD[dtype] = slot.tensor(dtype, (end - begin, spec.shape[1]))
        return self

    def __exit__(self, *exception: object) -> None:
        self._rows_RD.clear()
        if not isinstance(self._linear._executor, GoneAccess):
            self._linear._executor.release(self._index)


class _Product(torch.autograd.Function):
    """The product as one operation. Keeps nothing: the weight is fetched again, and it does not train."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, linear: TiledLinear) -> torch.Tensor:
        ctx.linear = linear
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        rows_ND = inputs.reshape(-1, inputs.shape[-1])
        found_NV = linear.products(rows_ND, training=ctx.needs_input_grad[0])
        return found_NV.view(*inputs.shape[:-1], found_NV.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        rows_NV = grad.reshape(-1, grad.shape[-1])
        return ctx.linear.input_gradient(rows_NV).to(ctx.dtype).view(ctx.shape), None
