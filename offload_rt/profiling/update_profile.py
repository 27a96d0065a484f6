"""What blocks that train take of the CPU on this machine: measured before anything is planned.

A stand-in of one block, of a few of its pieces, is stepped by the code that steps blocks, and its gradients are
delivered by the code that takes them. Each time is the median of a few runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.checksum import crc32c
from offload_rt.memory.arena import Arena, Slot, SlotPool
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.rules import UpdateRule
from offload_rt.optimizer.state import StateHome
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.profiling.workbench import median_seconds
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.links import Links

PIECES = 4
"""Stepped in one go; a block takes as long in proportion."""


class _Zeros:
    """A source of gradients that are zero."""

    def __init__(self, block: TrainedBlock) -> None:
        self._zeros = {i: torch.zeros(t.num_elements, dtype=t.parameter.dtype) for i, t in enumerate(block.parameters)}

    def submitted(self, block: TrainedBlock) -> tuple[Slot | None, tuple[Arrival, ...]]:
        return None, ()

    def present(self, block: TrainedBlock) -> set[int]:
        return set(self._zeros)

    def of(self, block: TrainedBlock, slot: Any, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        return self._zeros[index][begin:end]


def steps_per_second(block: TrainedBlock, rule: UpdateRule, group: Mapping[str, Any], *, on_nvme: bool) -> float:
    """Parameters that are stepped in a second, in the memory that holds their state. Blocks.

    on_nvme: with the checksums of state that comes from the drive and goes back.
    """
    block = _stand_in(block)
    links = Links()
    states = Arena("profile, state", block.state_bytes)
    home = StateHome(log=None, links=links)
    for piece in block.pieces:
        home.pieces[piece.name] = states.acquire(piece.num_bytes, piece.name)
        home.pieces[piece.name].buffer()[:] = bytes(piece.num_bytes)
    if block.weights is not None:
        num_bytes = align_up(block.weights.stored_bytes, IO_ALIGNMENT_BYTES)
        home.weights[block.name] = Arena("profile, weights", num_bytes).acquire(num_bytes, "profile")
    progress, none = Progress(), SlotPool(Arena("profile, nothing", IO_ALIGNMENT_BYTES), 0)
    stepper = Stepper(
        rule, home, _Zeros(block), lambda name: group, progress, links, state_pool=none, weights_pool=none,
        threaded=False,
    )  # fmt: skip

    def run() -> None:
        stepper.submit(block)
        progress.scalars = dict(stepper.new_scalars)
        progress.steps = dict.fromkeys(stepper.new_scalars, 1)
        for slot in home.pieces.values() if on_nvme else ():
            crc32c(slot.buffer())
            crc32c(slot.buffer())

    try:
        seconds = median_seconds(run)
        before = stepper.counters.num_elements
        run()
        return (stepper.counters.num_elements - before) / seconds
    finally:
        stepper.close()
        links.close()


def _stand_in(block: TrainedBlock) -> TrainedBlock:
    """A few of the block's pieces, with parameters of their own where those are what is stepped."""
    pieces = block.pieces[:PIECES]
    stepped = {segment.parameter for piece in pieces for segment in piece.segments}
    parameters = tuple(
        replace(t, parameter=nn.Parameter(torch.zeros(t.parameter.shape, dtype=t.parameter.dtype)))
        if t.streamed is None and index in stepped
        else t
        for index, t in enumerate(block.parameters)
    )
    return replace(block, pieces=pieces, parameters=parameters)


def delivery_seconds(block: TrainedBlock, micro_batches: int = 1) -> float:
    """What the gradients of a block take to be put where they wait: of one of so many micro-batches, on average.

    The first one's are put there, the others' are added, and the last one's measured. Blocks.
    """
    num = min(micro_batches, PIECES)
    links = Links()
    arena = Arena("profile, gradients", align_up(block.gradients.stored_bytes, IO_ALIGNMENT_BYTES))
    gradients = Gradients([block], arena, None, links, accumulates=num > 1)
    given = {i: torch.zeros(t.parameter.shape, dtype=t.parameter.dtype) for i, t in enumerate(block.parameters)}

    def run() -> None:
        for left in reversed(range(num)):
            gradients.add(block, given, with_norms=not left)
        gradients.clear()

    try:
        return median_seconds(run) / num
    finally:
        links.close()
