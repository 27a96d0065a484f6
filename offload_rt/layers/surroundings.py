"""What the layers of one runtime have in common: where they put things, what they count, whom they tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from offload_rt.memory.transients import Transients
from offload_rt.tiering.stash import Stash


@dataclass
class LayerCounters:
    """How often layers ran since the start."""

    num_forwards: int = 0
    num_recomputes: int = 0
    num_products_left_out: int = 0
    """Of the recomputes, those that went without the layer's last product; see `last_product`."""
    num_not_stashed: int = 0
    """Layer inputs that stayed in DEVICE memory because the place that the plan gave them was full."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the layers of one runtime have in common."""

    stash: Stash | None = None
    """Where a layer's input waits for its backward; None: in DEVICE memory."""
    hold_decoded: bool = False
    """Whether a recompute's graph keeps decoded weights, as the plan has room for a decoded layer."""
    leave_out_product: bool = True
    """Whether a recompute may go without the layer's last product; see `last_product`."""
    counters: LayerCounters = field(default_factory=LayerCounters)
    transients: Transients = field(default_factory=Transients)
    between: Callable[[], None] = lambda: None
    """Called when a layer has run and its memory is free again: after each forward and each backward."""
    latest: Callable[[], Any] = lambda: None
    """Called when a forward ends."""
    start_from: Callable[[Any], None] = lambda latest: None
    """Called with what `latest` returned when the backward of that forward begins: of all that layers had put away by
    then, the last is wanted next (`Stash.start_from`).
    """
    together: Callable[[], bool] = lambda: False
    """Whether several backward passes go through the model together."""
