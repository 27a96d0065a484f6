"""What full fine-tuning does in a rehearsed step: gradients are taken as in a real one, and nothing is stepped.

What an update allocates is counted beside it, on zeros: the state that is there has one copy, and writing it back would
wear the drive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from offload_rt.dtypes import torch_dtype
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.optimizer.pieces import (
    PIECE_ELEMENTS,
    Masters,
    Piece,
    Segment,
    TrainedBlock,
    TrainedParameter,
    segment_shape,
)
from offload_rt.optimizer.rules import Scalars, Update
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.optimizer.training import FullTraining


@contextmanager
def rehearsed(training: FullTraining) -> Iterator[None]:
    """Inside, gradients come to where they wait, with their norms, and are dropped; nothing is stepped.

    Blocks at the end for what comes from a device: a step that follows finds all slots free.
    """
    training.rehearse = partial(_take, training)
    try:
        yield
        training.stepper.finish()
        training.gradients.norms()
    finally:
        training.rehearse = None
        training.forget()


def _take(training: FullTraining, block: TrainedBlock, gradients: Mapping[int, Tensor]) -> None:
    """Where several micro-batches are summed, as the last of them: what is added is cast first. Those of a device are
    cast there once, and wait as in a step; others are let go of, so that none is written.
    """
    if training.gradients.come_from_device:
        training.gradients.add(block, gradients, with_norms=True)
        training.gradients.put_away(block)
        return
    for _ in range(min(2, training.num_micro_batches)):
        training.gradients.add(block, gradients, with_norms=True)
    training.gradients.keep_norms_only(block)


def update_peak_bytes(training: TieredTraining) -> int:
    """The most that stepping any piece allocates besides what it is given. Blocks.

    Pieces that differ are stepped once each, as zeros. One of more than `PIECE_ELEMENTS` parameters, which an optimizer
    takes whole, is stepped with fewer rows, and as much more is taken for the rest.
    """
    different: dict[object, tuple[TrainedBlock, Piece]] = {}
    for block in training.blocks:
        for piece in block.pieces:
            made = tuple(
                (segment_shape(block, s), block.parameters[s.parameter].parameter.dtype) for s in piece.segments
            )
            different.setdefault(made, (block, piece))
    return max(_peak_bytes(training, block, piece) for block, piece in different.values())


def _peak_bytes(training: TieredTraining, block: TrainedBlock, piece: Piece) -> int:
    made = [_made(training, block, segment) for segment in piece.segments]
    scalars: list[Scalars] = [{} for _ in made]
    peak_bytes = 0
    for step in (1, 2):  # the first makes state, the others are given it
        updates = [entry.update(step, before) for entry, before in zip(made, scalars, strict=True)]
        with AllocationMeter() as meter:
            scalars = training.rule.update_all(updates)
        peak_bytes = max(peak_bytes, meter.peak_bytes)
    num_elements = sum(segment.end - segment.begin for segment in piece.segments)
    return int(peak_bytes * num_elements / sum(entry.master.numel() for entry in made))


@dataclass(frozen=True)
class _Made:
    """Zeros in the place of one segment, its state and its gradient."""

    master: Tensor
    weight: Tensor | None
    gradient: Tensor
    state: Mapping[str, Tensor]
    group: Mapping[str, object]

    def update(self, step: int, scalars: Scalars) -> Update:
        return Update(
            master=self.master, weight=self.weight, grad=self.gradient, grad_scale=0.5, state=self.state,
            scalars=scalars, group=self.group, step=step,
        )  # fmt: skip


def _made(training: TieredTraining, block: TrainedBlock, segment: Segment) -> _Made:
    trained: TrainedParameter = block.parameters[segment.parameter]
    whole = segment_shape(block, segment)
    rows = max(1, min(whole[0], PIECE_ELEMENTS * whole[0] // prod(whole))) if whole else 1
    shape = (rows, *whole[1:]) if whole else whole
    stepped = torch.float32 if block.masters is Masters.FLOAT32 else trained.parameter.dtype
    gradient = torch_dtype(block.gradients.tensors[segment.parameter].dtype)
    return _Made(
        master=torch.zeros(shape, dtype=stepped),
        weight=None if block.masters is Masters.NONE else torch.zeros(shape, dtype=trained.parameter.dtype),
        gradient=torch.zeros(shape, dtype=gradient),
        state={s.name: torch.zeros(s.shape, dtype=s.dtype) for s in training.rule.state(shape, stepped)},
        group=training.groups.of(trained.name),
    )
