"""Gives the large results of a layer's operations memory in an arena, which is used again, in place of the C library's.

On the CPU device a layer makes some hundred tensors of tens of MiB that live for milliseconds. What is larger than 32
MiB glibc maps anew each time and gives back when it is freed; of what is smaller it holds freed blocks that the next
request does not fit ([Note: holes] in `heap`). Either way the kernel clears the same pages again and again, 4 KiB at a
time. Here the output of an operation is leased from an arena, which is touched once and has huge pages, and the lease
ends with the tensor.

    operation(a, b)   ->   operation.out(a, b, out=leased)      between autograd and the kernel: the graph is the same

The kernel is the one that would have run, on the same operands, into a tensor of the same dtype, shape and strides;
only its address differs, which is a multiple of 4 KiB where PyTorch's is one of 64. So the bits are those of plain
PyTorch. What is not in `_OUTPUTS`, or not as simple as its rules want it, allocates as ever, and so does what finds no
room: the arena can be short, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.memory.arena import Arena

LEAST_BYTES = 1 << 20
"""Of a result that gets a place. Finding one takes some 20 microseconds, the faults of 1 MiB ten times that."""

_aten = torch.ops.aten
Output = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a contiguous result."""


@dataclass
class TransientCounters:
    """What was placed since the start."""

    num_placed: int = 0
    placed_bytes: int = 0
    short_bytes: int = 0
    """Of results that found no room, and were left to the allocator."""


class Transients:
    """Places results of at least `least_bytes` in `arena`; without an arena, none."""

    def __init__(self, arena: Arena | None = None, least_bytes: int = LEAST_BYTES) -> None:
        self.counters = TransientCounters()
        self.arena = arena
        self._least_bytes = least_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that results took of the arena at once."""
        return 0 if self.arena is None else self.arena.peak_bytes

    def placed(self) -> AbstractContextManager[Any]:
        """Inside, on this thread, operations put their large results into the arena; a backward's do, too."""
        return nullcontext() if self.arena is None else _Placing(self)

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, copied out if it lies in the arena: what outlives a layer would take the next one's room."""
        if self.arena is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return tensor
        begin = self.arena.region.address
        return tensor.clone() if begin <= tensor.data_ptr() < begin + self.arena.num_bytes else tensor

    def take(self, output: Output) -> torch.Tensor | None:
        """Memory for a result; None if it is small, or there is no room."""
        shape, dtype = output
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if self.arena is None or num_bytes < max(self._least_bytes, 1):
            return None
        slot = self.arena.try_acquire(num_bytes, "activation")
        if slot is None:
            self.counters.short_bytes += num_bytes
            return None
        self.counters.num_placed += 1
        self.counters.placed_bytes += num_bytes
        return slot.tensor(dtype, shape)


class _Placing(TorchDispatchMode):
    def __init__(self, transients: Transients) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._transients = transients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _OUTPUTS.get(func)
        output = None if known is None else known.output(args, kwargs)
        place = None if output is None else self._transients.take(output)
        if known is None or place is None:
            return func(*args, **kwargs)
        if known.into is None:
            return place.copy_(args[0])
        if known.output is _pointwise:
            args = [self._cast(arg, place.dtype) for arg in args]
        return known.into(*args, **kwargs, **{known.name: place})

    def _cast(self, operand: Any, dtype: torch.dtype) -> Any:
        """An operand in the result's dtype: the operation would cast it first, to the same bits, in fresh memory."""
        if not isinstance(operand, torch.Tensor) or not operand.dim() or operand.dtype is dtype:
            return operand
        place = self._transients.take((tuple(operand.shape), dtype))
        return operand if place is None else place.copy_(operand)


@dataclass(frozen=True)
class _Known:
    """An operation whose result can be foretold."""

    output: Callable[[Any, Any], Output | None]
    """From its arguments; None where they are not as simple as that."""
    into: Any
    """The same operation into given memory; None for a copy of its first argument."""
    name: str = "out"
    """Of the argument that the memory is given as."""


def _is_simple(value: Any) -> bool:
    """A plain, contiguous tensor of floats."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.is_contiguous()
    )


def _of_product(args: Any, kwargs: Any) -> Output | None:
    left, right = args[-2:]
    simple = all(one.layout is torch.strided and one.device.type == "cpu" for one in (left, right))
    return ((*left.shape[:-1], right.shape[-1]), left.dtype) if simple and left.is_floating_point() else None


def _pointwise(args: Any, kwargs: Any) -> Output | None:
    """One operand has the shape of the result; others have its shape, or are broadcast along it."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if not all(map(_is_simple, tensors)):
        return None
    largest = max(tensors, key=torch.Tensor.numel)
    dtype = largest.dtype
    for tensor in tensors:
        if tensor.dim() and not _broadcasts(tensor.shape, largest.shape):
            return None
        if tensor.dim() and tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return (tuple(largest.shape), dtype) if largest.dim() else None


def _broadcasts(shape: torch.Size, along: torch.Size) -> bool:
    """Whether a tensor of `shape` is broadcast to the whole of `along`, and not `along` to more."""
    pairs = zip(reversed(shape), reversed(along), strict=False)
    return len(shape) <= len(along) and all(size in (1, other) for size, other in pairs)


def _like(index: int) -> Callable[[Any, Any], Output | None]:
    """The result is as the argument at `index`, and all tensors of floats that have dimensions have its dtype."""

    def output(args: Any, kwargs: Any) -> Output | None:
        model = args[index]
        floats = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() and arg.is_floating_point()]
        if not all(_is_simple(arg) and arg.dtype is model.dtype for arg in floats):
            return None
        return tuple(model.shape), model.dtype

    return output


def _of_cast(args: Any, kwargs: Any) -> Output | None:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    known = {"dtype", "layout", "device", "non_blocking"}  # and nothing of pinned memory or another layout
    usual = all(value in (None, False) for name, value in kwargs.items() if name not in known)
    usual = usual and kwargs.get("layout") in (None, torch.strided) and (device is None or device.type == "cpu")
    if not usual or not _is_simple(args[0]) or dtype is None or not dtype.is_floating_point:
        return None
    return tuple(args[0].shape), dtype


def _of_clone(args: Any, kwargs: Any) -> Output | None:
    source, memory_format = args[0], kwargs.get("memory_format")
    if source.layout is not torch.strided or source.device.type != "cpu":
        return None
    if memory_format is torch.contiguous_format or (
        memory_format in (None, torch.preserve_format) and source.is_contiguous()
    ):
        return tuple(source.shape), source.dtype
    return None


_OUTPUTS: dict[Any, _Known] = {
    _aten.mm.default: _Known(_of_product, _aten.mm.out),
    _aten.addmm.default: _Known(_of_product, _aten.addmm.out),
    _aten.bmm.default: _Known(_of_product, _aten.bmm.out),
    _aten.add.Tensor: _Known(_pointwise, _aten.add.out),
    _aten.sub.Tensor: _Known(_pointwise, _aten.sub.out),
    _aten.mul.Tensor: _Known(_pointwise, _aten.mul.out),
    _aten.mul.Scalar: _Known(_pointwise, _aten.mul.out),
    _aten.div.Tensor: _Known(_pointwise, _aten.div.out),
    _aten.neg.default: _Known(_pointwise, _aten.neg.out),
    _aten.pow.Tensor_Scalar: _Known(_pointwise, _aten.pow.Tensor_Scalar_out),
    _aten.sigmoid.default: _Known(_pointwise, _aten.sigmoid.out),
    _aten.silu.default: _Known(_pointwise, _aten.silu.out),
    _aten.silu_backward.default: _Known(_like(1), _aten.silu_backward.grad_input, "grad_input"),
    _aten.gelu.default: _Known(_pointwise, _aten.gelu.out),
    _aten.gelu_backward.default: _Known(_like(1), _aten.gelu_backward.grad_input, "grad_input"),
    _aten._log_softmax.default: _Known(_like(0), _aten._log_softmax.out),
    _aten._log_softmax_backward_data.default: _Known(_like(1), _aten._log_softmax_backward_data.out),
    _aten.nll_loss_backward.default: _Known(_like(1), _aten.nll_loss_backward.grad_input, "grad_input"),
    _aten._to_copy.default: _Known(_of_cast, None),
    _aten.clone.default: _Known(_of_clone, None),
}
"""What a layer of a transformer and its loss make large results by."""
