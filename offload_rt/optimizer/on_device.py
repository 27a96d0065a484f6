"""Updates in a device's memory, for the pieces that a plan gives to it: where the CPU is what limits.

[Note: updates on the device]
A piece's state comes from HOST, wherever it rests, into a slot of DEVICE memory, is stepped there, and goes back to
where it came from, by the device's own copies. While that is under way the CPU steps others:

    CPU         | step 1      | step 2      | step 3      |
    to_device   | state a, gradients a | state b, gradients b | ...
    updates                            | step a              | step b
    to_host                                     | state a     | ...

    a slot      | master, exp_avg, exp_avg_sq | gradients | new weights |

Gradients go to HOST with all others, and what of them belongs to the piece comes back with its state. There they are
summed over micro-batches and measured, in the order of torch's sums on the CPU, and there they stay until the commit
(see [Note: stepping before the norm is known] in ahead): so a step that is clipped, done again or left out has the
bits that it would have without a device, and none of its memory is taken by gradients that wait. It costs 2 or 4 bytes
a parameter to the device, beside 12 of state.

New weights of a block that the device holds are written in place, behind the last use that had been given when the
block was submitted. Those that rest in HOST or on NVMe go there from the slot. No block is done before everything of it
is where it rests: so nothing else has to be ordered behind an update, neither the next forward nor a commit.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from offload_rt.adamw import cpu_adam_torch
from offload_rt.adamw.cpu_adam import AdamW
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.memory.arena import Arena, MemoryRange, Slot
from offload_rt.optimizer.job import Job
from offload_rt.optimizer.pieces import Piece, Segment, TrainedBlock
from offload_rt.optimizer.rules import AdamWRule, Scalars, Update, UpdateRule
from offload_rt.optimizer.state import state_tensors
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, TensorSpec, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.streams import Copier, Place
from offload_rt.transfers.transfer import Transfer

ALIGNMENT_BYTES = 64
"""Of gradients and new weights in a slot, as state lies there."""
UpdateOf = Callable[[Segment, dict[str, Tensor], Tensor, Tensor], Update]
"""The update of a segment with its state, its gradient, and where its new weights are to be written, all flat."""


class DeviceRule(Protocol):
    """The arithmetic of an `UpdateRule` where state is in a device's memory: the same bits."""

    def launch(self, of: Update) -> tuple[Callable[[], None], Scalars]:
        """What launches the update on the current stream, and the new scalars. Tensors of `of` are the device's."""


class DeviceAdamW:
    """AdamW by the kernel of `adam_triton`; where a device's memory is RAM, by the kernel's plain twin."""

    def __init__(self, device: str) -> None:
        """`device` is torch's name for it. ImportError where Triton is needed and missing."""
        self.step: Callable[..., None] = cpu_adam_torch.step
        if device != "cpu":
            self.step = importlib.import_module("offload_rt.adamw.adam_triton").step

    def launch(self, of: Update) -> tuple[Callable[[], None], Scalars]:
        scalars = AdamW.from_group(of.group).scalars(of.step, of.grad_scale)
        tensors = (of.grad, of.master, of.state["exp_avg"], of.state["exp_avg_sq"], of.weight)
        flat = (None if tensor is None else tensor.view(-1) for tensor in tensors)
        return partial(self.step, scalars, *flat), {"step": of.step}


def device_rule(rule: UpdateRule, device: str) -> DeviceRule:
    """How `rule` steps on `device`, torch's name for it. ConfigError where it does not."""
    if not isinstance(rule, AdamWRule) or rule.moments == "8bit":
        raise ConfigError(
            f"plan: state: {rule.name} is not stepped on a device, AdamW with float32 or bfloat16 moments is; give "
            f"on_device {{}} and device_slots 0"
        )
    try:
        return DeviceAdamW(device)
    except ImportError as error:
        raise ConfigError(
            f"plan: state: AdamW on the device needs Triton ({error}): pip install triton, or give on_device {{}}"
        ) from error


def stepping_bytes(blocks: Sequence[TrainedBlock]) -> int:
    """DEVICE memory of a slot that any piece of `blocks` is stepped in."""
    return max(SlotLayout(block, piece).num_bytes for block in blocks for piece in block.pieces)


@dataclass(kw_only=True)
class DeviceCounters:
    """What was stepped on the device since the start, and what that moved."""

    num_pieces_on_device: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0


class SlotLayout:
    """Where in a slot the gradient and the new weights of each segment of a piece lie, behind its state."""

    def __init__(self, block: TrainedBlock, piece: Piece) -> None:
        self.segments: list[tuple[tuple[int, int], tuple[int, int]]] = []
        """For each: begin and length of its gradient, and of its new weights. Bytes."""
        end = piece.num_bytes
        for segment in piece.segments:
            spec, trained = block.gradients.tensors[segment.parameter], block.parameters[segment.parameter]
            places = []
            for size in (torch_dtype(spec.dtype).itemsize, trained.parameter.element_size()):
                places.append((end, (segment.end - segment.begin) * size))
                end = align_up(sum(places[-1]), ALIGNMENT_BYTES)
            self.segments.append((places[0], places[1]))
        self.num_bytes = align_up(end, IO_ALIGNMENT_BYTES)


@dataclass(frozen=True)
class _UnderWay:
    """A piece that the device is stepping."""

    piece: Piece
    resting: Slot
    """Its state in HOST."""
    slot: Slot
    brought: list[Transfer] = field(default_factory=list)
    back: list[Transfer] = field(default_factory=list)


class PiecesOnDevice(ABC):
    """Pieces that a device steps, through slots of its memory. Used by one thread at a time."""

    def __init__(self, arena: Arena, slot_bytes: int, links: Links) -> None:
        """`arena`, of DEVICE memory, has slots of `slot_bytes`. It is not poisoned: `compute` would do that, which
        nothing here waits for.
        """
        if links.device is None:
            raise ValueError("updates on the device: DEVICE is RAM here")
        self.num_slots = arena.num_bytes // slot_bytes
        self.counters = DeviceCounters()
        # Leased for good: whatever a kernel's launch may keep of its arguments, a slot is free when its piece is back.
        self._free = deque(arena.acquire(slot_bytes, "a piece that is stepped") for _ in range(self.num_slots))
        self._links = links
        self._device: Copier = links.device
        self._under_way: deque[_UnderWay] = deque()

    def here(self) -> Place:
        """Behind what `compute` was given so far."""
        return self._device.here()

    @property
    def num_under_way(self) -> int:
        """Pieces that were started and not settled, `num_slots` at most."""
        return len(self._under_way)

    @abstractmethod
    def start(
        self, job: Job, piece: Piece, resting: Slot, weights: Slot | None, update_of: UpdateOf
    ) -> dict[str, Scalars]:
        """Starts stepping `piece`; returns the new scalars by parameter name. Waits for the device only where HOST
        memory is pageable, and goes through a locked ring.

        `resting` is its state in HOST, `weights` where those of its block are that stream, in HOST or DEVICE. What of
        these and of the gradients is HOST's is the device's until the piece is settled. The caller has settled so many
        that a slot is free. Raises OffloadError where an earlier failure has left none.
        """

    def settle(self, wait: Callable[[Transfer], None]) -> tuple[Piece, Slot]:
        """Blocks, by `wait`, until the piece that was started first is back; returns it, and its state in HOST."""
        for transfer in self._under_way[0].back:
            wait(transfer)
        first = self._under_way.popleft()
        self._free.append(first.slot)
        return first.piece, first.resting

    @contextmanager
    def dropped_unless_done(self) -> Iterator[None]:
        """After an exception inside, waits until nothing is under way; whatever comes of it is dropped."""
        try:
            yield
        except BaseException:
            while self._under_way:
                failed = self._under_way.popleft()
                with suppress(Exception):  # the error that is told is the one that stopped the block
                    for transfer in (*failed.brought, *failed.back):
                        self._links.finish(transfer)
                    self._free.append(failed.slot)
            raise

    def _begin(self, piece: Piece, resting: Slot) -> _UnderWay:
        """Takes a slot for `piece`."""
        if not self._free:
            raise OffloadError(f"{piece.name}: an update on the device failed, and may still use its memory")
        under_way = _UnderWay(piece, resting, self._free.popleft())
        self._under_way.append(under_way)
        return under_way

    def _bring(self, under_way: _UnderWay, source: Slot, target: Slot) -> Transfer:
        """Starts copying `source` to `target`, a range of the slot, which nothing uses any more."""
        copied = self._links.copy(source, target, places=[])
        under_way.brought.append(copied)
        self.counters.bytes_to_device += source.num_bytes
        return copied

    def _take_back(self, under_way: _UnderWay, source: Slot, rest: Slot, places: Sequence[Place] | None) -> None:
        """Starts copying `source`, which the device has stepped, to where it rests; behind `places`, or `compute`."""
        self.counters.bytes_to_host += source.num_bytes
        under_way.back.append(self._links.copy(source, rest, places=places))


class DeviceUpdates(PiecesOnDevice):
    """Pieces of masters and moments, whose gradients are in HOST, by `updates`."""

    def __init__(self, rule: DeviceRule, arena: Arena, slot_bytes: int, links: Links) -> None:
        """As `PiecesOnDevice`."""
        super().__init__(arena, slot_bytes, links)
        self._rule = rule

    def start(
        self, job: Job, piece: Piece, resting: Slot, weights: Slot | None, update_of: UpdateOf
    ) -> dict[str, Scalars]:
        block = job.block
        if job.gradients is None or job.used is None:
            raise RuntimeError(f"{piece.name}: is not to be stepped on the device")
        under_way = self._begin(piece, resting)
        slot, layout = under_way.slot, SlotLayout(block, piece)
        scalars: dict[str, Scalars] = {}
        launches: list[Callable[[], None]] = []
        in_place: list[MemoryRange] = []
        back = [(slot.part(0, piece.num_bytes), resting)]
        behind = self._links.device_copies.place
        places = [job.used, behind(self._bring(under_way, resting, slot.part(0, piece.num_bytes)))]
        for segment, (gradient_at, weights_at) in zip(piece.segments, layout.segments, strict=True):
            if segment.parameter not in job.present:
                continue
            trained, count = block.parameters[segment.parameter], segment.end - segment.begin
            gradient, target = slot.part(*gradient_at), slot.part(*weights_at)
            spec = block.gradients.tensors[segment.parameter]
            places.append(behind(self._bring(under_way, _range_of(job.gradients, spec, segment), gradient)))
            if trained.streamed is None:
                new = trained.parameter.data.view(-1)[segment.begin : segment.end]
            else:
                if weights is None:
                    raise RuntimeError(f"{trained.name} streams, and its block's weights are not in memory")
                rest = _range_of(weights, trained.streamed, segment)
                if weights.on_device:
                    target = rest
                    in_place.append(rest.range)
                else:
                    back.append((target, rest))
                new = target.tensor(trained.parameter.dtype, (count,))
            update = update_of(
                segment, state_tensors(slot, segment), gradient.tensor(torch_dtype(spec.dtype), (count,)), new
            )
            launch, scalars[trained.name] = self._rule.launch(update)
            launches.append(launch)

        def run() -> None:
            for launch in launches:
                launch()

        stepped = self._device.run(
            f"step {piece.name}", run, places, reads=[slot.range], writes=[slot.range, *in_place]
        )
        self.counters.num_pieces_on_device += 1
        for source, rest in back:
            self._take_back(under_way, source, rest, [stepped])
        return scalars


def _range_of(slot: Slot, spec: TensorSpec, segment: Segment) -> Slot:
    """A segment's elements of the tensor `spec` in `slot`."""
    size = torch_dtype(spec.dtype).itemsize
    return slot.part(spec.offset_bytes + segment.begin * size, (segment.end - segment.begin) * size)
