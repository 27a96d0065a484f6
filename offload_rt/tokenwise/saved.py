"""What autograd saves in one piece of a layer's graph, and where it waits until that piece's backward.

[Note: what is saved as what]
Most of what autograd saves need not be held by the graph at all. A weight of the block becomes a `WeightView`, to be
had again when the block is open. A view of a tensor that the pass stores anyway (the layer's input, queries, keys and
values, the attention's result) becomes a view into that one, by size, stride and offset: it must come back with the
same memory layout. Parameters that train and the layer's arguments stay where they are. The rest goes, a storage at a
time and once however many views of it are saved, to a stash; or it stays, where there is none. The graph owns what it
has saved: as it is consumed, or dropped unused, places are given back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from offload_rt.layers.block import Block, WeightView
from offload_rt.tiering.stash import Stash, Stashed
from planners.plans.placement import Tier

MIN_SWAPPED_BYTES = 1024
"""Smaller tensors stay. Up to 16 KiB a tensor's size makes no difference to what putting it away and taking it back
takes of the processor: 24 to 50 us in HOST, 120 to 300 on NVMe, as long as copying 150 KiB does (64 B to 256 KiB, 32
tensors each, a busy 2-core Xeon). Above, a plan decides: what a layer's own tensors take is in its measured prices."""


@dataclass
class SavedCounters:
    """Bytes since the start."""

    swapped_bytes: int = 0
    """Put into a stash."""
    kept_bytes: int = 0
    """Left in DEVICE memory between forward and backward, as planned or because it was small."""
    no_room_bytes: int = 0
    """Left there because the stash was full: a plan that was too lean."""
    loaded_bytes: int = 0
    bytes_by_group: Counter[str] = field(default_factory=Counter)
    """By group and tier, as in `after in nvme`. Beside the groups there are the layer's `input`, what `attention` saves
    besides operands and result, and a whole `chunk`, where all of a sequence that is one is treated alike."""

    def add(self, num_bytes: int, place: Place, *, stashed: bool) -> None:
        """Counts what waits now: in `place`, or in DEVICE memory."""
        if stashed:
            self.swapped_bytes += num_bytes
        else:
            self.kept_bytes += num_bytes
        self.bytes_by_group[f"{place.group} in {(place.tier if stashed else Tier.DEVICE).value}"] += num_bytes


@dataclass(frozen=True)
class Place:
    """Where a group of saved tensors waits."""

    group: str
    stash: Stash | None = None
    """None: in DEVICE memory."""
    tier: Tier = Tier.DEVICE
    """That of the stash."""


class Held:
    """A dense tensor that waits in a stash, or here. It comes back with the memory layout that it had."""

    def __init__(self, tensor: torch.Tensor, place: Place, counters: SavedCounters) -> None:
        self.num_bytes = tensor.numel() * tensor.element_size()
        self._order = memory_order(tensor)
        self._counters = counters
        self._tensor: torch.Tensor | None = tensor
        self._stashed: Stashed | None = None
        if place.stash is not None and self.num_bytes >= MIN_SWAPPED_BYTES:
            self._stashed = place.stash.put(tensor.detach().permute(self._order))
            if self._stashed is None:
                counters.no_room_bytes += self.num_bytes
            else:
                self._tensor = None
        counters.add(self.num_bytes, place, stashed=self.is_stashed)

    @property
    def is_stashed(self) -> bool:
        return self._stashed is not None

    def load(self) -> torch.Tensor:
        """The tensor. Blocks until it has arrived; may be called more than once."""
        if self._stashed is None:
            if self._tensor is None:
                raise RuntimeError("activations: loaded after their release")
            return self._tensor
        self._counters.loaded_bytes += self.num_bytes
        inverse = [self._order.index(dim) for dim in range(len(self._order))]
        return self._stashed.load().permute(inverse)

    def release(self) -> None:
        """Gives its place back."""
        if self._stashed is not None:
            self._stashed.release()
        self._stashed = self._tensor = None


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Its dimensions from the slowest to the fastest in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or a copy in the same order of dimensions, if it has holes or shares elements."""
    order = memory_order(tensor)
    if tensor.permute(order).is_contiguous():
        return tensor
    return torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@dataclass(eq=False)
class _Storage:
    """A storage some of whose views were saved."""

    memory: torch.UntypedStorage | None
    place: Place
    held: Held | None = None
    known: str | None = None
    """The name of the known tensor that has turned out to own it."""
    num_views: int = 0
    num_loads_left: int = 0
    loaded: torch.Tensor | None = None

    def __del__(self) -> None:
        if self.held is not None:
            self.held.release()

    def bytes(self) -> torch.Tensor:
        if self.held is None:
            if self.memory is None:
                raise RuntimeError("activations: loaded after their release")
            return _as_bytes(self.memory)
        if self.loaded is None:
            self.loaded = self.held.load()
            self.num_loads_left = self.num_views
        self.num_loads_left -= 1
        loaded = self.loaded
        if not self.num_loads_left:
            self.loaded = None
        return loaded


@dataclass(frozen=True)
class _View:
    """What a graph holds in place of a tensor: a view of a storage, or of a known tensor, by its name."""

    of: _Storage | str
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements; from the first element of a known tensor."""


class SavedTensors:
    """The saved tensors of one piece of a graph. See [Note: what is saved as what].

    `known` maps names to the tensors that the pass stores itself; whoever runs the backward puts them there again.
    `stays`: addresses of storages that the graph may hold. `place`: where what is saved from now on waits; storages at
    the addresses in `places` wait there. None: the graph's backward follows at once, so that nothing is put away.
    """

    def __init__(self, block: Block, stays: frozenset[int], place: Place | None, counters: SavedCounters) -> None:
        self.known: dict[str, torch.Tensor] = {}
        self.place = place
        self.places: dict[int, Place] = {}
        self._block = block
        self._stays = stays
        self._counters = counters
        self._open: dict[int, _Storage] = {}

    def hooks(self) -> Any:
        """A context in which autograd saves to here. The hooks live as long as the graph."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.numel():
            return tensor
        if tensor.layout is not torch.strided:
            return tensor.detach()  # a sparse one, which some adapters have, is not one storage
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        offset = int(tensor.storage_offset())
        for name, known in self.known.items():
            if known.dtype is tensor.dtype and known.untyped_storage().data_ptr() == address:
                return _View(name, tensor.dtype, tensor.size(), tensor.stride(), offset - int(known.storage_offset()))
        weight = self._block.view_of(tensor)
        if weight is not None:
            return weight
        if self.place is None or address in self._stays:
            return tensor.detach()  # with its graph, an operation that saves its own result would hold itself
        entry = self._open.pop(address, None)
        if entry is None:
            place = self.places.get(address, self.place)
            if place.stash is not None and storage.nbytes() > 2 * tensor.numel() * tensor.element_size():
                tensor = tensor.detach().clone()
                storage, offset = tensor.untyped_storage(), 0
                address = storage.data_ptr()
            entry = _Storage(storage, place)
        self._open[address] = entry  # the last: backward wants first what was saved last
        entry.num_views += 1
        return _View(entry, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if isinstance(saved, WeightView):
            return self._block.weight(saved)
        of = saved.of if isinstance(saved.of, str) else saved.of.known or saved.of
        if isinstance(of, str):
            known = self.known[of]
            return known.as_strided(saved.size, saved.stride, saved.offset + int(known.storage_offset()))
        memory = of.bytes().untyped_storage()
        return torch.empty(0, dtype=saved.dtype, device=memory.device).set_(
            memory, saved.offset, saved.size, saved.stride
        )

    def recognise(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` is known from now on. What was saved of its storage already is a view of it, if it starts there."""
        self.known[name] = tensor
        entry = self._open.get(tensor.untyped_storage().data_ptr())
        if entry is not None and tensor.storage_offset() == 0:
            entry.known, entry.memory = name, None

    def move(self, tensor: torch.Tensor, place: Place) -> None:
        """What was saved of the storage of `tensor` since the last `seal` is to wait in `place`."""
        entry = self._open.get(tensor.untyped_storage().data_ptr())
        if entry is not None:
            entry.place = place

    def seal(self) -> int:
        """This piece's forward is done: what it has saved goes to its place, and nothing of the known is held.

        Returns the bytes of what is put away or kept now.
        """
        num_bytes = 0
        for entry in self._open.values():
            if entry.memory is not None:
                entry.held = Held(_as_bytes(entry.memory), entry.place, self._counters)
                entry.memory = None
                num_bytes += entry.held.num_bytes
        self._open.clear()
        self.known = {}
        return num_bytes


def _as_bytes(memory: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
