"""One block to be stepped, and where its gradients are. No logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from offload_rt.memory.arena import Slot
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.pieces import Piece, TrainedBlock
from offload_rt.transfers.streams import Place


class GradientSource(Protocol):
    """Where a block's gradients are: `Gradients`, or the parameters themselves."""

    def submitted(self, block: TrainedBlock) -> tuple[Slot | None, tuple[Arrival, ...]]:
        """What holds them, if a slot does, and what is under way to it, which whoever reads them settles first."""

    def present(self, block: TrainedBlock) -> set[int]:
        """The parameters of `block` that have a gradient, by index."""

    def of(self, block: TrainedBlock, slot: Any, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Elements [begin, end) of a parameter's gradient, flat, in what `submitted` returned."""


@dataclass(frozen=True)
class Job:
    """One block to be stepped."""

    block: TrainedBlock
    pieces: tuple[Piece, ...]
    """In the order in which they are stepped."""
    gradients: Slot | None
    arrivals: tuple[Arrival, ...]
    """What may still be under way to `gradients`."""
    used: Place | None
    """Behind the last use of its weights, where a device steps pieces."""
    present: frozenset[int]
    """The parameters that have a gradient, by index."""
    grad_scale: float

    @property
    def changes_all_weights(self) -> bool:
        return len(self.present) == len(self.block.parameters) and len(self.pieces) == len(self.block.pieces)
