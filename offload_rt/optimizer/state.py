"""Where masters, moments and weights of trained blocks rest, and how a step gets at them.

Each piece of a block's state rests in HOST memory or in the commit log on NVMe. The block's weights stay in the
parameters, or in a slot of HOST or DEVICE memory that is stepped in place, or in the log as one extent that a ring
fetches; or in parts, see `parted_weights`. Those that a device holds in memory of its own are stepped in HOST and
copied there, see `landing`. Weights are always the masters rounded to their dtype; so only what streams from the log is
written there, and no checkpoint holds weights besides masters.

    log   "state/<piece>"     of every block, wherever it rests: what rests in memory is written by a commit
          "weights/<block>"   of every layer; written only where weights stream from NVMe, and only what does
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from offload_rt.dtypes import torch_dtype
from offload_rt.memory.arena import Slot
from offload_rt.optimizer.landing import Landing
from offload_rt.optimizer.parted_weights import PartedRoom, PartedWeights, WeightsRoom
from offload_rt.optimizer.pieces import Piece, Segment, TrainedBlock, TrainedParameter, step_order
from offload_rt.storage.commit_layout import MutableExtent
from offload_rt.storage.commit_log import CommitLog
from offload_rt.tensor_spec import TensorSpec
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST
from offload_rt.transfers.transfer import Transfer

STATE_PREFIX = "state/"
WEIGHTS_PREFIX = "weights/"


def state_extent(piece: Piece) -> str:
    return STATE_PREFIX + piece.name


def weights_extent(block: TrainedBlock) -> str:
    return WEIGHTS_PREFIX + block.name


def laid_weights(block: TrainedBlock) -> str:
    """Names the weights of `block` in the log, and how they lie there: who lays them otherwise makes them anew."""
    places = [] if block.weights is None else [[t.name, t.dtype, t.offset_bytes] for t in block.weights.tensors]
    return f"{block.name} {hashlib.sha256(json.dumps(places).encode()).hexdigest()[:8]}"


def log_extents(blocks: Sequence[TrainedBlock], drive_weights: Sequence[float]) -> list[MutableExtent]:
    """The extents of a log, spread over drives in proportion to `drive_weights`. They do not depend on the plan."""
    filled = [0.0] * len(drive_weights)
    extents = []
    for block in blocks:
        sizes = [(state_extent(piece), piece.num_bytes) for piece in block.pieces]
        if block.weights is not None:
            sizes.append((weights_extent(block), block.weights.stored_bytes))
        for name, num_bytes in sizes:
            drive = min(range(len(filled)), key=lambda d: (filled[d] + num_bytes) / drive_weights[d])
            filled[drive] += num_bytes
            extents.append(MutableExtent(name=name, length_bytes=num_bytes, drive=drive))
    return extents


class LogWeights:
    """The weights of trained blocks as a source of blocks: a log verifies what it reads when it is waited for."""

    def __init__(self, log: CommitLog, begin_bytes: int = 0) -> None:
        """`begin_bytes` of every block are elsewhere."""
        self._log = log
        self._begin_bytes = begin_bytes

    def read(self, block: str, slot: Slot) -> Transfer:
        return self._log.read(WEIGHTS_PREFIX + block, slot, begin_bytes=self._begin_bytes)

    def verify(self, block: str, slot: Slot) -> None:
        pass


class Part(Enum):
    """Which pieces of a block are meant."""

    ALL = "all"
    IN_LOG = "in the log"
    """Those that have a second copy: what is committed."""
    IN_MEMORY = "in memory"


@dataclass
class StateHome:
    """Who rests where. Slots belong to arenas that the assembly has booked."""

    log: CommitLog | None
    links: Links
    pieces: dict[str, Slot] = field(default_factory=dict)
    """State that rests in memory, by piece."""
    weights: dict[str, Slot] = field(default_factory=dict)
    """Weights that rest in memory and are stepped in place, by block."""
    before_change: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Of these, what blocks until no copy out of them is under way. The others are where they are used, in DEVICE."""
    parted: dict[str, PartedWeights] = field(default_factory=dict)
    """Weights that rest in parts, by block."""
    on_device: frozenset[str] = frozenset()
    """The pieces that the device steps, wherever they rest."""
    landing: Landing | None = None
    """How weights come to where parameters and slots of DEVICE are a device's own memory; None where that is RAM."""

    def part(self, block: TrainedBlock, part: Part) -> tuple[Piece, ...]:
        """The pieces of `block` that rest there, in the order in which they are stepped."""
        pieces = step_order(block.pieces, self.on_device)
        if part is Part.ALL:
            return pieces
        return tuple(piece for piece in pieces if (piece.name in self.pieces) == (part is Part.IN_MEMORY))

    def streams_weights(self, block: TrainedBlock) -> bool:
        """Whether the block's weights rest in the log as a whole."""
        return block.weights is not None and block.name not in self.weights and block.name not in self.parted

    def collects_weights(self, block: TrainedBlock) -> bool:
        """Whether the block's new weights are collected in a slot of their own, and written to the log from there."""
        return self.log_weights_bytes(block) > 0

    def log_weights_bytes(self, block: TrainedBlock) -> int:
        """How many of its bytes rest in the log."""
        if block.weights is None or block.name in self.weights:
            return 0
        parts = self.parted.get(block.name)
        return block.weights.stored_bytes if parts is None else parts.split.nvme_bytes

    def device_weights_bytes(self, block: TrainedBlock) -> int:
        """How many bytes of the block's weights are in DEVICE memory all the time."""
        if block.name in self.parted:
            return self.parted[block.name].split.device_bytes
        stays = block.weights is None or (block.name in self.weights and block.name not in self.before_change)
        return block.weights_bytes if stays else 0

    def shows(self, block: TrainedBlock, trained: TrainedParameter) -> bool:
        """Whether the parameter shows its weights between passes; it is a placeholder otherwise."""
        return trained.streamed is None or (block.name in self.weights and block.name not in self.before_change)

    def new_weights(
        self, block: TrainedBlock, segment: Segment, weights: Slot | PartedRoom | None
    ) -> AbstractContextManager[Tensor]:
        """Inside, memory of the CPU's into which the segment's new weights are to be rounded, flat; see `weight_range`.

        Where that is not where they rest, they are on their way there afterwards, until `landing.order`.
        """
        resting = weight_range(block, segment, weights)
        spec = block.parameters[segment.parameter].streamed
        slot = weights.slot_of(spec.offset_bytes) if isinstance(weights, PartedRoom) and spec is not None else weights
        on_device = slot.on_device if spec is not None and isinstance(slot, Slot) else True
        if self.landing is None or not on_device:
            return nullcontext(resting)
        return self.landing.room_for(resting)

    def fetch(self, piece: Piece, slot: Slot) -> Transfer:
        """Starts reading a piece that rests in the log. Does not block but for a write of it that is under way."""
        return self._log.read(state_extent(piece), slot)

    def write_back(self, piece: Piece, slot: Slot) -> Transfer:
        """Starts writing a piece to the log."""
        return self._log.write(state_extent(piece), slot)

    def fetch_weights(self, block: TrainedBlock, room: Slot | PartedRoom) -> Transfer:
        """Starts bringing those that are not in DEVICE into a room where new ones are collected."""
        if isinstance(room, Slot):
            return self._log.read(weights_extent(block), room)
        parts = self.parted[block.name]
        parts.from_host(room)
        return self._log.read(weights_extent(block), parts.log_part(room), begin_bytes=parts.log_from_bytes)

    def write_weights(self, block: TrainedBlock, room: Slot | PartedRoom) -> Transfer:
        """Starts writing them to where they rest. Blocks while the old HOST part is read; the new one is there then."""
        if isinstance(room, Slot):
            return self._log.write(weights_extent(block), room)
        parts = self.parted[block.name]
        parts.settle()
        if self.links.recorder is not None and parts.host is not None:
            name = f"new weights of {block.name} to HOST"
            self.links.recorder.use(name, reads=[room.streamed.range], writes=[parts.host.range], lane=HOST)
        parts.to_host(room)
        return self._log.write(weights_extent(block), parts.log_part(room), begin_bytes=parts.log_from_bytes)

    def write_what_rests_in_memory(self, blocks: Sequence[TrainedBlock]) -> None:
        """Starts writing it to the log, before a commit. Blocks only for writes of the same extents under way."""
        for block in blocks:
            for piece in block.pieces:
                if piece.name in self.pieces:
                    self.write_back(piece, self.pieces[piece.name])

    @property
    def _log(self) -> CommitLog:
        if self.log is None:
            raise RuntimeError("state in memory has no log")
        return self.log


def tensor_of(slot: WeightsRoom, spec: TensorSpec) -> Tensor:
    """A tensor of state or weights in the slot of its piece or block."""
    return slot.tensor(torch_dtype(spec.dtype), spec.shape, spec.offset_bytes)


def state_tensors(slot: Slot, segment: Segment) -> dict[str, Tensor]:
    """The segment's state in its piece's slot, the master first where there is one, flat as it lies."""
    return {spec.name: tensor_of(slot, spec) for spec in segment.state}


def weight_range(block: TrainedBlock, segment: Segment, weights: WeightsRoom | None) -> Tensor:
    """Where the segment's weights are to be written: in the block's memory, or in the parameter itself. Flat."""
    trained = block.parameters[segment.parameter]
    if trained.streamed is None:
        whole = trained.parameter.data
    elif weights is not None:
        whole = tensor_of(weights, trained.streamed)
    else:
        raise RuntimeError(f"{trained.name} streams, and its block's weights are not in memory")
    return whole.view(-1)[segment.begin : segment.end]


def begin_state(slot: Slot, piece: Piece, block: TrainedBlock, weights: WeightsRoom | None) -> None:
    """Fills a piece's slot as it is before the first step: masters from the weights, everything else zero."""
    slot.tensor(torch.uint8, (piece.num_bytes,)).zero_()
    for segment in piece.segments:
        if segment.master is not None:
            tensor_of(slot, segment.master).copy_(weight_range(block, segment, weights))


def weights_from_masters(
    home: StateHome, slot: Slot, piece: Piece, block: TrainedBlock, weights: Slot | PartedRoom | None
) -> None:
    """Rounds a piece's masters into the weights."""
    for segment in piece.segments:
        if segment.master is None:
            continue
        with home.new_weights(block, segment, weights) as new:
            new.copy_(tensor_of(slot, segment.master))
        del new  # the next range wants its room
