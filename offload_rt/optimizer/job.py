"""One block to be stepped, as whoever submits it says. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from offload_rt.arena import Slot
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.pieces import Piece, TrainedBlock
from offload_rt.streams import Place


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
