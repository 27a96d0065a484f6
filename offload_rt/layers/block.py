"""A block: the frozen parameters of one layer, and how the user's modules see them come and go.

A block is open while its bytes lie in a slot. Open, the parameters kept in their own dtype are views of the slot, and a
module with NF4 weights gets them decoded for the time of its call, and of that of an adapter around it which reads
them. Closed, every parameter keeps its identity, shape, dtype and device as a stride-0 expansion of one NaN: code that
looks at it goes on working, code that computes with it cannot go unnoticed.

    closed     weight = nan.expand(out, in)
    open       slot [codes | absmax | ...]      module call:   weight = decoded (leased), then nan again
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from offload_rt.dtypes import torch_dtype
from offload_rt.errors import UnsupportedModule
from offload_rt.layers.readers import innermost, is_reader, replaced_by
from offload_rt.memory.arena import Slot
from offload_rt.memory.parted import BlockBytes
from offload_rt.quantized.decoder import Decoder, PackedWeight
from offload_rt.spans import Spans
from offload_rt.tensor_spec import BlockSpec, TensorSpec


@dataclass(frozen=True)
class Binding:
    """One stored tensor and the parameter that shows it, in the modules that own it."""

    spec: TensorSpec
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]

    @cached_property
    def absent(self) -> torch.Tensor:
        """What the parameter shows while the block is closed; its own, since tied weights are known by their memory."""
        with torch.inference_mode(False):  # it stays, whoever calls first: the parameter is what it shows
            return placeholder(self.spec.shape, torch_dtype(self.spec.dtype), self.parameter.device)


@dataclass(frozen=True)
class Shown:
    """A weight that a parameter has shown, which somebody may have taken a view of. Holds nothing."""

    block: str
    region: weakref.ref[Any]
    """Its memory; there as long as `storage` is."""
    storage: StorageWeakRef

    @property
    def is_seen(self) -> bool:
        return not self.storage.expired()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class WeightView:
    """A view of a weight of a block, to be had again whenever the block is open."""

    spec: TensorSpec | None
    """The NF4 tensor; None for one that lies in the slot in its own dtype."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset_bytes: int
    """From the start of the decoded tensor, or of the slot."""


def weight_in(memory: BlockBytes, view: WeightView) -> torch.Tensor:
    """The view of a weight that lies in `memory` in its own dtype. Holds its lease as long as it lives."""
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    return memory.tensor(view.dtype, (num_elements,), view.offset_bytes).as_strided(view.size, view.stride)


def placeholder(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """What an absent parameter holds: its shape and dtype over one element, NaN where the dtype has one."""
    value = float("nan") if dtype.is_floating_point else 0
    nothing = torch.full((1,), value, dtype=dtype, device=device)
    return nothing.expand(shape) if len(shape) else nothing.view(())


@dataclass
class Block:
    """The unit that is streamed. `modules` are those whose call needs it: a layer, or an embedding and a tied head."""

    name: str
    modules: tuple[nn.Module, ...]
    spec: BlockSpec
    bindings: tuple[Binding, ...]
    decoder: Decoder
    slot: BlockBytes | None = None
    last_called: nn.Module | None = None
    """Of the modules that own its weights, the one that was called last, besides the block's own."""
    shows_itself: set[nn.Module] = field(default_factory=set)
    """Modules whose own forward calls `shown`, if it wants a weight decoded at all."""
    spans: Spans | None = None
    """Who is told when it is open, while a step is traced."""
    _num_open: int = 0
    _in_slot: dict[int, torch.Tensor] = field(default_factory=dict)
    """While it is open, the tensors in their own dtype, by where they begin."""
    _of_owner: dict[nn.Module, list[Binding]] = field(default_factory=dict)
    _shown: dict[nn.Module, _Shown] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _readers: dict[nn.Module, list[Any]] = field(default_factory=dict)
    """The handles of those that stand around a module and read its weights."""
    num_set: dict[str, int] = field(default_factory=dict)
    """How often torch has counted a write to a tensor, by its name, which was none: see `readers.replaced_by`."""
    _versions: dict[nn.Module, int] = field(default_factory=dict)
    """Of the parameters that readers, which are being called, have another tensor in the place of: before the call."""
    _held: dict[str, torch.Tensor] | None = None
    """What was decoded inside `holding_decoded`, by tensor name; None outside."""

    def attach(self) -> None:
        """Installs the hooks that decode and that catch a use outside `open`, on all modules inside the block's own.

        The block's own modules (a layer) are called by whoever opens the block, who shows theirs with `shown`.
        """
        for binding in self.bindings:
            for owner in binding.owners:
                self._of_owner.setdefault(owner, [])
                if binding.spec.is_quantized:
                    self._of_owner[owner].append(binding)
        for owner, quantized in self._of_owner.items():
            if owner in self.modules:
                continue
            self._handles.append(owner.register_forward_pre_hook(self._before, prepend=True))
            if quantized:
                self._handles.append(owner.register_forward_hook(self._after, always_call=True))
        self.find_readers(chain.from_iterable(module.modules() for module in self.modules))

    def find_readers(self, modules: Iterable[nn.Module]) -> None:
        """Installs hooks on those of `modules` that have none yet and stand around a module with NF4 weights: whoever
        reads these has them for the time of its own call. On those that have another tensor in the place of a
        parameter, too. Again where the block's modules are others.
        """
        for module in modules:
            owner = innermost(module) if is_reader(module) else None
            if module in self._readers or owner is None:
                continue
            hooks: list[tuple[Any, Any]] = []
            if self._of_owner.get(owner):
                hooks.append((partial(self._before_reader, owner), partial(self._after_reader, owner)))
            replaced = owner._parameters.get(replaced_by(module))
            for binding in self.bindings:
                if binding.parameter is replaced:
                    hooks.append((partial(self._before_set, binding), partial(self._after_set, binding)))
            for before, after in hooks:
                self._readers.setdefault(module, []).extend(
                    (
                        module.register_forward_pre_hook(before, prepend=True),
                        module.register_forward_hook(after, always_call=True),
                    )
                )

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in chain(self._handles, *self._readers.values()):
            handle.remove()
        self._handles.clear()
        self._readers.clear()

    @property
    def is_open(self) -> bool:
        """Whether its bytes are in memory, shown to the modules."""
        return self.slot is not None

    @property
    def is_decoded(self) -> bool:
        """Whether one of its modules is being called, which has its NF4 weights meanwhile."""
        return bool(self._shown)

    def open(self, slot: BlockBytes) -> None:
        """Shows the block's bytes in `slot` to the modules. May nest; each `open` needs a `close`, unless it raised."""
        self._num_open += 1
        if self.slot is not None:
            return
        self.slot = slot
        try:
            for binding in self.bindings:
                spec = binding.spec
                if not spec.is_quantized:
                    tensor = slot.tensor(torch_dtype(spec.dtype), spec.shape, spec.offset_bytes)
                    binding.parameter.data = self._in_slot[spec.offset_bytes] = tensor
        except BaseException:  # Ctrl-C: the next one to open it would go on with this slot
            self.close()
            raise

    def close(self) -> None:
        """Takes the bytes away again, when the last `open` is closed."""
        self._num_open -= 1
        if self._num_open:
            return
        self.slot = None
        self._in_slot.clear()
        for binding in self.bindings:
            if not binding.spec.is_quantized:
                self.hide(binding)

    def shown_for_good(self) -> list[Shown]:
        """Of a block that never leaves DEVICE, what its parameters show; nothing of another one. Holds none of it."""
        if not isinstance(self.slot, Slot):
            return []
        storages = [tensor.untyped_storage() for tensor in self._in_slot.values()]
        region = weakref.ref(self.slot.region)
        return [Shown(self.name, region, StorageWeakRef(each)) for each in storages]  # type: ignore[no-untyped-call]

    @staticmethod
    def hide(binding: Binding) -> None:
        """Makes one parameter absent."""
        binding.parameter.data = binding.absent

    def view_of(self, tensor: torch.Tensor) -> WeightView | None:
        """Names the weight of this open block that `tensor` is a view of, without holding it or the slot."""
        if self.slot is None:
            return None
        weight = self.decoder.find(tensor)
        if weight is not None:
            offset = tensor.storage_offset() * tensor.element_size()
            return WeightView(weight.spec, tensor.dtype, tensor.size(), tensor.stride(), int(offset))
        begin = self.slot.offset_of(tensor)
        if begin is None or begin >= self.spec.stored_bytes:  # a slot may be larger than its block
            return None
        return WeightView(None, tensor.dtype, tensor.size(), tensor.stride(), begin)

    def weight(self, view: WeightView) -> torch.Tensor:
        """The view again, of the slot or of the weight decoded once more. The block must be open."""
        if self.slot is None:
            raise UnsupportedModule(f"block {self.name}: a weight was asked for outside the layer's own passes")
        if view.spec is not None:
            offset = view.offset_bytes // view.dtype.itemsize
            return self._decoded(view.spec).as_strided(view.size, view.stride, offset)
        shown = self._in_slot.get(view.offset_bytes)
        if shown is not None and shown.dtype is view.dtype:
            return shown.as_strided(view.size, view.stride)
        return weight_in(self.slot, view)

    @contextmanager
    def holding_decoded(self) -> Iterator[None]:
        """Inside, each NF4 weight is decoded at its first use and then held: once, however often it is used."""
        self._held = {}
        try:
            yield
        finally:
            for tensor in self._held.values():
                self.decoder.withdraw(tensor)
            self._held = None

    def _decoded(self, spec: TensorSpec) -> torch.Tensor:
        """The weight decoded: the one that is held, or anew."""
        if self.slot is None:
            raise UnsupportedModule(f"block {self.name}: its weights are not in memory")
        if self._held is not None and spec.name in self._held:
            return self._held[spec.name]
        weight = PackedWeight(spec, self.slot)
        tensor = self.decoder.decode(weight)
        if self._held is not None:
            self._held[spec.name] = tensor
            self.decoder.publish(tensor, weight)
        return tensor

    def shown(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, the NF4 weights that `module` itself owns are there, decoded."""
        return _ShownModule(self, module)

    def _before(self, module: nn.Module, args: Any) -> None:
        self.last_called = module
        if module not in self.shows_itself:
            self._show(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.shows_itself:  # whoever stands around it may still read
            self._unshow(module)

    def _before_reader(self, owner: nn.Module, module: nn.Module, args: Any) -> None:
        if is_reader(module):
            self._show(owner)

    def _after_reader(self, owner: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
        if is_reader(module):
            self._unshow(owner)

    def _before_set(self, binding: Binding, module: nn.Module, args: Any) -> None:
        self._versions[module] = binding.parameter._version

    def _after_set(self, binding: Binding, module: nn.Module, args: Any, output: Any) -> None:
        before = self._versions.pop(module, None)
        if before is not None:  # otherwise an exception came before the call
            name = binding.spec.name
            self.num_set[name] = self.num_set.get(name, 0) + binding.parameter._version - before

    def _show(self, module: nn.Module) -> None:
        if self.slot is None:
            raise UnsupportedModule(
                f"{type(module).__name__} of block {self.name} was called outside the block's own forward, where its "
                f"weights are not in memory. Call the layer itself; if the model cannot, this model is not supported"
            )
        quantized = self._of_owner.get(module, [])
        if not quantized:
            return
        shown = self._shown.setdefault(module, _Shown())
        shown.depth += 1
        if shown.depth > 1:
            return  # a module called inside its own call: its weights are there
        for binding in quantized:
            tensor = self._decoded(binding.spec)
            self.decoder.publish(tensor, PackedWeight(binding.spec, self.slot))
            binding.parameter.data = tensor
            shown.weights.append((binding, tensor))

    def _unshow(self, module: nn.Module) -> None:
        shown = self._shown.get(module)
        if shown is None:
            return  # an exception came before its weights did
        shown.depth -= 1
        if shown.depth:
            return
        del self._shown[module]
        for binding, tensor in shown.weights:
            if self._held is None:
                self.decoder.withdraw(tensor)
            self.hide(binding)


class _ShownModule:
    """See `Block.shown`."""

    __slots__ = ("_block", "_module")

    def __init__(self, block: Block, module: nn.Module) -> None:
        self._block, self._module = block, module

    def __enter__(self) -> None:
        try:
            self._block._show(self._module)
        except BaseException:  # the next one to show it would find it shown, without its weights
            self._block._unshow(self._module)
            raise

    def __exit__(self, *exception: object) -> None:
        self._block._unshow(self._module)


@dataclass
class _Shown:
    """The decoded weights of a module that is being called, `depth` times inside itself."""

    depth: int = 0
    weights: list[tuple[Binding, torch.Tensor]] = field(default_factory=list)
