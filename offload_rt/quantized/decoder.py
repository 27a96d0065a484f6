"""Decodes the NF4 weights of one module into leased memory, and lets autograd remember them packed.

A product's backward needs the weight again. Autograd would save the decoded one, four times the size of the packed, for
as long as the layer's graph lives. `saved_packed` replaces it, by saved-tensor hooks, with a `PackedReference`: which
blob, and the view of the decoded tensor that was saved. Unpacking decodes once more and gives exactly that view, so the
products, and their bits, are those of plain autograd on a decoded weight, for any operation and any layout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from offload_rt.dtypes import torch_dtype
from offload_rt.memory.arena import Arena
from offload_rt.memory.parted import BlockBytes
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import nf4_layout
from offload_rt.tensor_spec import Encoding, TensorSpec


@dataclass
class DecodeCounters:
    """What was decoded since the start."""

    num_decodes: int = 0
    decoded_elements: int = 0
    overflow_bytes: int = 0
    """Decoded into fresh memory because the arena was short: a plan that was too lean."""


@dataclass(frozen=True)
class PackedWeight:
    """An NF4 tensor in a resident block: its spec and the block's bytes."""

    spec: TensorSpec
    slot: BlockBytes


@dataclass(frozen=True)
class PackedReference:
    """What autograd keeps instead of a decoded weight: the packed one, and which view of it was saved."""

    weight: PackedWeight
    size: torch.Size
    stride: tuple[int, ...]
    storage_offset: int


class Decoder:
    """Decodes into `arena`, on `device` (None: the CPU); fresh memory, counted, where that is short."""

    def __init__(self, arena: Arena, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self.counters = DecodeCounters()
        self.arena = arena
        self._live: dict[int, PackedWeight] = {}

    def decode(self, weight: PackedWeight) -> torch.Tensor:
        """The decoded weight in its module's own layout, in leased memory that lives as long as the tensor."""
        spec = weight.spec
        dtype = torch_dtype(spec.dtype)
        lease = self.arena.try_acquire(spec.compute_bytes, spec.name)
        if lease is None:
            self.counters.overflow_bytes += spec.compute_bytes
            out = torch.empty(spec.shape, dtype=dtype, device=self._device)
        else:
            out = lease.tensor(dtype, spec.shape)
        self.counters.num_decodes += 1
        self.counters.decoded_elements += spec.num_elements
        _decode_into(spec, weight.slot, out)  # of tensors that want no gradient: there is no graph to be kept from
        return out

    def let_go(self) -> None:
        """Has no arena any more. Nothing may be decoded now."""
        self.arena = Arena("none", 0)
        self._live.clear()

    def publish(self, tensor: torch.Tensor, weight: PackedWeight) -> None:
        """Until `withdraw`, tensors over the memory of `tensor` are known to be `weight`."""
        self._live[tensor.untyped_storage().data_ptr()] = weight

    def withdraw(self, tensor: torch.Tensor) -> None:
        self._live.pop(tensor.untyped_storage().data_ptr(), None)

    def find(self, tensor: torch.Tensor) -> PackedWeight | None:
        """The published weight whose memory `tensor` is a view of; a sparse one, as some adapters have, is of none."""
        if tensor.layout is not torch.strided:
            return None
        return self._live.get(tensor.untyped_storage().data_ptr())

    def saved_packed(self) -> AbstractContextManager[Any]:
        """Inside, autograd saves every published weight as a `PackedReference`."""
        hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        return hooks

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | PackedReference:
        if tensor.device.type != self._device.type or not tensor.numel():
            return tensor
        weight = self.find(tensor)
        if weight is None:
            return _without_graph(tensor)
        return PackedReference(weight, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: torch.Tensor | PackedReference) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return self.decode(saved.weight).as_strided(saved.size, saved.stride, saved.storage_offset)

    def saved_decoded(self) -> AbstractContextManager[Any]:
        """Inside, autograd saves the decoded memory of published weights.

        Without a hook it would save a parameter as the parameter, and find a placeholder in it by the time of backward.
        """
        hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(self._pack_decoded, _unchanged)
        return hooks

    def _pack_decoded(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and self.find(tensor) is not None:
            return tensor.detach()
        return _without_graph(tensor)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """What a hook may hold: an operation that saves its own result with the graph (tanh, exp) would hold itself, and
    for ever, if backward never comes to it.
    """
    return tensor if tensor.grad_fn is None else tensor.detach()


def _decode_into(spec: TensorSpec, slot: BlockBytes, out: torch.Tensor) -> None:
    if spec.encoding is Encoding.NF4_EXPERTS:
        blob_bytes = nf4_layout(spec.num_elements // spec.shape[0]).total_bytes
        for expert in range(spec.shape[0]):
            offset = spec.offset_bytes + expert * spec.expert_stride_bytes
            codec.decode_into(slot.tensor(torch.uint8, (blob_bytes,), offset), out[expert])
        return
    blob = slot.tensor(torch.uint8, (nf4_layout(spec.num_elements).total_bytes,), spec.offset_bytes)
    if spec.encoding is Encoding.NF4_TRANSPOSED:
        columns, rows = spec.shape
        codec.decode_transposed_into(blob, rows, columns, out)
    else:
        codec.decode_into(blob, out)
