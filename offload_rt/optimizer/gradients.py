"""Where gradients wait between a block's backward and its update, and between micro-batches.

A block's gradients lie in one slot of the HOST arena, each parameter whole, in the parameter's dtype, or in float32
where several micro-batches are summed. Where HOST has no room for all, they are written to the scratch file as soon as
they are there and read back when they are wanted; the arena then holds a few blocks on their way.

Norms are taken of whole parameters in float32 when the last micro-batch arrives, while the gradient is in the caches.
Used by one thread; slots that it hands out may be read by another.

From a device with streams, gradients come by its own copies, see [Note: gradients behind the device] in `arrivals`:
`add` and `put_away` do not wait for them, `load` and `norms` do, and `submitted` says what is to be waited for. Over
an emulated link it is the same: they are there at once, and have come when the link has brought them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload_rt.adamw.cpu_adam import gradient_norm
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import ConfigError, StorageError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.arrivals import Arrival, Arrivals
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.storage.scratch import Scratch, ScratchRange
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST
from offload_rt.transfers.transfer import Transfer


@dataclass
class _Waiting:
    """The gradients of one block."""

    slot: Slot | None = None
    """None while they are on the drive only."""
    place: ScratchRange | None = None
    write: Transfer | None = None
    present: set[int] = field(default_factory=set)
    """Parameters that received a gradient, by index."""
    arrivals: list[Arrival] = field(default_factory=list)
    """Of its micro-batches, in their order; some may be under way."""
    norms: dict[int, Tensor] = field(default_factory=dict)
    num_arrivals: int = 0
    is_gone: bool = False
    """Only the norms are left."""


class Gradients:
    """The gradients of one step, by block."""

    def __init__(
        self,
        blocks: Sequence[TrainedBlock],
        arena: Arena,
        scratch: Scratch | None,
        links: Links,
        *,
        accumulates: bool,
        arrivals: Arrivals | None = None,
        device_slots: int = 1,
        wait_for_room: Callable[[], bool] = lambda: False,
        in_background: Callable[[Arrival], None] = lambda arrival: None,
    ) -> None:
        """With `scratch`, gradients wait there; `arena` then holds those in use. `wait_for_room` blocks until somebody
        else may have let go of a slot, and is False when nobody else holds one. `arrivals` is how gradients come from
        a device with streams; `in_background` may have somebody else settle one. `device_slots`: blocks' gradients that
        an emulated device has room for until its link has taken them away.
        """
        self._blocks = {block.name: block for block in blocks}
        self._arena = arena
        self._scratch = scratch
        self._links = links
        self._accumulates = accumulates
        self._arrivals = arrivals
        self._device_slots = device_slots
        self._leaving: deque[Transfer] = deque()
        self.wait_for_room = wait_for_room
        self.in_background = in_background
        self._waiting: dict[str, _Waiting] = {}
        self._late: list[TrainedBlock] = []
        """To be put away when their gradients have arrived."""

    @property
    def blocks(self) -> list[TrainedBlock]:
        """Those that have gradients, in the order of their arrival."""
        return [self._blocks[name] for name in self._waiting]

    @property
    def on_drive(self) -> bool:
        """Whether gradients wait on NVME."""
        return self._scratch is not None

    @property
    def come_from_device(self) -> bool:
        """Whether a device's own copies bring them, so that they are under way when `add` returns."""
        return self._arrivals is not None

    def num_arrivals(self, block: TrainedBlock) -> int:
        """Micro-batches of this step that reached the block."""
        waiting = self._waiting.get(block.name)
        return 0 if waiting is None else waiting.num_arrivals

    def present(self, block: TrainedBlock) -> set[int]:
        """The parameters of `block` that have a gradient, by index."""
        return self._waiting[block.name].present

    def add(self, block: TrainedBlock, gradients: Mapping[int, Tensor], *, with_norms: bool) -> None:
        """Adds one micro-batch's gradients, by parameter index.

        Blocks while there is no room. Raises ConfigError for a second micro-batch where one was declared.
        """
        waiting = self._waiting.setdefault(block.name, _Waiting())
        if waiting.num_arrivals and not self._accumulates:
            raise ConfigError(
                f"accumulation_steps=1 was declared, but {block.name} received gradients twice before step(); declare "
                f"engine(accumulation_steps=...), so that they are summed in float32"
            )
        self._put_late_ones_away()
        slot = self._lease(block)
        before = frozenset(waiting.present)
        waiting.present |= gradients.keys()
        waiting.num_arrivals += 1

        def take(arrived: Mapping[int, Tensor]) -> None:
            self._sum(block, slot, arrived, before, waiting.norms if with_norms else None)

        if self._arrivals is None:
            take(gradients)
            self._leave(block, waiting, gradients)
            return
        specs = block.gradients.tensors
        places = {index: slot.part(specs[index].offset_bytes, specs[index].stored_bytes) for index in gradients}
        arrival = self._arrivals.start(block, gradients, places, take)
        waiting.arrivals.append(arrival)
        self.in_background(arrival)

    def _leave(self, block: TrainedBlock, waiting: _Waiting, gradients: Mapping[int, Tensor]) -> None:
        """Lets the emulated link take time for gradients. Blocks until DEVICE has a free slot for the next block's."""
        num_bytes = sum(block.parameters[index].parameter.nbytes for index in gradients)
        out = self._links.pace(f"gradients of {block.name}", num_bytes, inward=False)
        if out is None:
            return
        waiting.arrivals.append(Arrival(out, lambda: None))
        self._leaving.append(out)
        while len(self._leaving) >= self._device_slots:
            self._links.wait(self._leaving.popleft())

    def submitted(self, block: TrainedBlock) -> tuple[Slot, tuple[Arrival, ...]]:
        """The slot with the block's gradients, for whoever settles what is under way to it first. Does not wait."""
        return self._lease(block), tuple(self._waiting[block.name].arrivals)

    def put_away(self, block: TrainedBlock) -> None:
        """Starts writing the block's gradients to where they wait, if that is not memory. Does not block."""
        if self._scratch is None:
            return
        if self._waiting[block.name].arrivals:
            self._late.append(block)
        else:
            self._write_out(block)

    def _write_out(self, block: TrainedBlock) -> None:
        """Blocks for gradients that have not arrived."""
        waiting = self._waiting[block.name]
        if self._scratch is None or waiting.slot is None:
            return
        self._settle(waiting)
        if waiting.place is None:
            waiting.place = self._scratch.acquire(block.gradients.stored_bytes)
        waiting.write = waiting.place.write(waiting.slot)
        waiting.slot = None  # the transfer holds it, and whoever is using it

    def load(self, block: TrainedBlock) -> Slot:
        """The block's gradients in memory. Blocks while they are not, or there is no room."""
        self._put_late_ones_away()
        slot = self._lease(block)
        self._settle(self._waiting[block.name])
        return slot

    def _lease(self, block: TrainedBlock) -> Slot:
        """The slot that holds the block's gradients, or what is there of them. Blocks for a drive, and for room."""
        waiting = self._waiting[block.name]
        if waiting.slot is None:
            slot = self._room(block)
            if waiting.place is not None:
                if waiting.write is not None:
                    self._links.wait(waiting.write)
                    waiting.write = None
                self._links.wait(waiting.place.read(slot))
            waiting.slot = slot
        return waiting.slot

    def keep_norms_only(self, block: TrainedBlock) -> None:
        """Lets go of the block's gradients for good: nobody will ask for them again."""
        waiting = self._waiting[block.name]
        waiting.slot, waiting.is_gone = None, True

    def is_gone(self, block: TrainedBlock) -> bool:
        """Whether only the norms of the block's gradients are left."""
        return self._waiting[block.name].is_gone

    def release(self, block: TrainedBlock) -> None:
        """Lets go of the block's gradients in memory; they stay where they wait, if that is the drive."""
        waiting = self._waiting[block.name]
        if waiting.place is not None:
            waiting.slot = None

    def of(self, block: TrainedBlock, slot: Slot, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Elements [begin, end) of a parameter's gradient, flat; the whole in its shape without a range."""
        held = self._view(block, slot, index)
        return held if end is None else held.view(-1)[begin:end]

    def norms(self) -> dict[str, Tensor]:
        """The norm of each gradient, by parameter name. Reads back what was put away without."""
        found = {}
        self._put_late_ones_away()
        for name, waiting in self._waiting.items():
            block = self._blocks[name]
            self._settle(waiting)
            for index in sorted(waiting.present):
                if index not in waiting.norms:
                    waiting.norms[index] = gradient_norm(self._view(block, self.load(block), index))
                found[block.parameters[index].name] = waiting.norms[index]
            self.release(block)
        return found

    def copies(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one, a copy that is the caller's. Blocks as `load` does."""
        for block in self.blocks:
            for index in sorted(self.present(block)):
                yield block.parameters[index].name, self.of(block, self.load(block), index).clone()
            self.release(block)

    def clear(self) -> None:
        """Forgets all. Writes under way are waited for, whatever comes of them."""
        for waiting in self._waiting.values():
            if waiting.write is not None:
                with suppress(StorageError):
                    self._links.wait(waiting.write)
        if self._arrivals is not None:
            self._arrivals.drop()
        self._late.clear()
        self._waiting.clear()

    def _sum(
        self,
        block: TrainedBlock,
        slot: Slot,
        gradients: Mapping[int, Tensor],
        before: frozenset[int],
        norms: dict[int, Tensor] | None,
    ) -> None:
        """Adds gradients that are there to those in `slot` of the parameters in `before`; others begin with them.

        `norms` receives those of the sums, unless more is to come.
        """
        if self._links.recorder is not None:
            self._links.recorder.use(f"gradients of {block.name}", writes=[slot.range], lane=HOST)
        for index, gradient in gradients.items():
            held = self._view(block, slot, index)
            if index in before:
                held.add_(gradient)
            elif held.data_ptr() != gradient.data_ptr():
                held.copy_(gradient)
            if norms is not None:
                norms[index] = gradient_norm(held)
        if norms is not None:
            for index in before - gradients.keys():
                norms[index] = gradient_norm(self._view(block, slot, index))

    def _settle(self, waiting: _Waiting) -> None:
        for arrival in waiting.arrivals:
            arrival.settle(self._links.wait)

    def _put_late_ones_away(self) -> None:
        while self._late:
            self._write_out(self._late.pop(0))

    def _view(self, block: TrainedBlock, slot: Slot, index: int) -> Tensor:
        spec = block.gradients.tensors[index]
        return slot.tensor(torch_dtype(spec.dtype), spec.shape, spec.offset_bytes)

    def _room(self, block: TrainedBlock) -> Slot:
        num_bytes = block.gradients.stored_bytes
        while (slot := self._arena.try_acquire(num_bytes, f"gradients of {block.name}")) is None:
            if not (self._finish_a_write() or self._put_another_away(block) or self.wait_for_room()):
                return self._arena.acquire(num_bytes, f"gradients of {block.name}")  # raises, naming the holders
        return slot

    def _put_another_away(self, block: TrainedBlock) -> bool:
        """Gives up the slot of gradients that were held for the next micro-batch."""
        for name, waiting in self._waiting.items():
            if self._scratch is not None and waiting.slot is not None and name != block.name:
                self._write_out(self._blocks[name])
                return True
        return False

    def _finish_a_write(self) -> bool:
        for waiting in self._waiting.values():
            if waiting.write is not None:
                self._links.wait(waiting.write)
                waiting.write = None
                return True
        return False


def is_finite(norms: Mapping[str, Tensor]) -> bool:
    """Whether all gradients are: a norm is not, where an element is not."""
    return not norms or bool(torch.isfinite(torch.stack(list(norms.values()))).all())
