"""A block: the frozen parameters of one layer, and how the user's modules see them come and go.

A block is open while its bytes lie in a slot. Open, the parameters kept in their own dtype are views of the slot, and a
module with NF4 weights gets them decoded for the time of its call. Closed, every parameter keeps its identity, shape,
dtype and device as a stride-0 expansion of one NaN: code that looks at it goes on working, code that computes with it
cannot go unnoticed.

    closed     weight = nan.expand(out, in)
    open       slot [codes | absmax | ...]      module call:   weight = decoded (leased), then nan again
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload_rt.arena import Slot
from offload_rt.decoder import Decoder, PackedWeight
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import UnsupportedModule
from offload_rt.tensor_spec import BlockSpec, TensorSpec


@dataclass(frozen=True)
class Binding:
    """One stored tensor and the parameter that shows it, in the modules that own it."""

    spec: TensorSpec
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]


def placeholder(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What an absent parameter holds: its shape and dtype over one element, NaN where the dtype has one."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype).expand(shape) if len(shape) else torch.full((), value, dtype=dtype)


@dataclass
class Block:
    """The unit that is streamed. `modules` are those whose call needs it: a layer, or an embedding and a tied head."""

    name: str
    modules: tuple[nn.Module, ...]
    spec: BlockSpec
    bindings: tuple[Binding, ...]
    decoder: Decoder
    slot: Slot | None = None
    _num_open: int = 0
    _decoded: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def attach(self) -> None:
        """Installs the hooks that decode and that catch a use outside `open`. Idempotent per block."""
        quantized: dict[nn.Module, list[Binding]] = {}
        owners: dict[nn.Module, None] = {}
        for binding in self.bindings:
            for owner in binding.owners:
                owners[owner] = None
                if binding.spec.is_quantized:
                    quantized.setdefault(owner, []).append(binding)
        for owner in owners:
            bindings = quantized.get(owner, [])
            self._handles.append(owner.register_forward_pre_hook(self._before(bindings), prepend=True))
            if bindings:
                self._handles.append(owner.register_forward_hook(self._after, always_call=True))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def open(self, slot: Slot) -> None:
        """Shows the block's bytes in `slot` to the modules. May nest; each `open` needs a `close`."""
        self._num_open += 1
        if self.slot is not None:
            return
        self.slot = slot
        for binding in self.bindings:
            spec = binding.spec
            if not spec.is_quantized:
                binding.parameter.data = slot.tensor(torch_dtype(spec.dtype), spec.shape, spec.offset_bytes)

    def close(self) -> None:
        """Takes the bytes away again, when the last `open` is closed."""
        self._num_open -= 1
        if self._num_open:
            return
        self.slot = None
        for binding in self.bindings:
            if not binding.spec.is_quantized:
                self.hide(binding)

    @staticmethod
    def hide(binding: Binding) -> None:
        """Makes one parameter absent."""
        binding.parameter.data = placeholder(binding.spec.shape, torch_dtype(binding.spec.dtype))

    def _before(self, bindings: list[Binding]) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            if self.slot is None:
                raise UnsupportedModule(
                    f"{type(module).__name__} of block {self.name} was called outside the block's own forward, where "
                    f"its weights are not in memory. Call the layer itself; if the model cannot, this model is not "
                    f"supported"
                )
            shown = self._decoded.setdefault(id(module), [])
            if shown or not bindings:
                return  # a module called inside its own call: its weights are there
            for binding in bindings:
                weight = PackedWeight(binding.spec, self.slot)
                tensor = self.decoder.decode(weight)
                self.decoder.publish(tensor, weight)
                binding.parameter.data = tensor
                shown.append((binding.parameter, tensor))

        return before

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        for parameter, tensor in self._decoded.pop(id(module), []):
            self.decoder.withdraw(tensor)
            parameter.data = placeholder(tensor.shape, tensor.dtype)
