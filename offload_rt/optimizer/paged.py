"""Updates of adapters on the device that they are on, by the user's own optimizer, with their state in HOST or on NVMe.

[Note: paged adapters]
Adapters and their gradients are in the device's memory; a piece of their state passes through a slot of it. The update
is given to `compute`, behind the backward pass that makes the gradients and before the forward pass that sees the new
parameters, so that nothing but the state has to be ordered: by rule 2 of [Note: streams] behind its arrival, and by
rule 1 its way back behind the update. While one piece is stepped, the next one arrives and the one before it leaves:

    to_device   | state a | state b | state c |
    compute     ..backward | step a  | step b  | step c  |
    to_host                          | state a | state b | state c

It is what QLoRA does by paging (arXiv 2305.14314), asked for in advance. The bits are those of the same optimizer with
all state in the device's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from offload_rt.errors import ConfigError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.job import GradientSource, Job
from offload_rt.optimizer.on_device import DeviceRule, PiecesOnDevice, UpdateOf, device_rule
from offload_rt.optimizer.pieces import Piece
from offload_rt.optimizer.rules import AdamWRule, Scalars, TorchRule, Update, UpdateRule
from offload_rt.optimizer.state import state_tensors, weight_range
from offload_rt.transfers.device_streams import Device
from offload_rt.transfers.links import Links


class RuleOnDevice(Protocol):
    """What of an `UpdateRule` steps tensors of a device, on the current stream. Does not wait for it."""

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]: ...


class _Launching:
    """A `DeviceRule`, launched at once."""

    def __init__(self, rule: DeviceRule) -> None:
        self._rule = rule

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        found = []
        for of in updates:
            launch, scalars = self._rule.launch(of)
            launch()
            found.append(scalars)
        return found


def rule_on_device(rule: UpdateRule, device: str) -> RuleOnDevice:
    """How `rule` steps adapters on `device`, torch's name for it. ConfigError where it does not."""
    if isinstance(rule, AdamWRule):
        return _Launching(device_rule(rule, device))
    if not isinstance(rule, TorchRule):
        raise ConfigError(f"optimizer: {rule.name} does not step adapters on a device; one of torch's does")
    scalars = rule.scalars_on(torch.device(device))
    if device != "cpu" and scalars:
        raise ConfigError(
            f"optimizer: {rule.name} keeps {', '.join(scalars)} in the device's memory, so that its state cannot rest "
            f"elsewhere; do without fused and capturable, take another optimizer, or give more device_memory"
        )
    return rule


class PagedUpdates(PiecesOnDevice):
    """Pieces of adapters' state, by `compute`."""

    def __init__(
        self, rule: RuleOnDevice, gradients: GradientSource, device: Device, arena: Arena, slot_bytes: int, links: Links
    ) -> None:
        """As `PiecesOnDevice`; `gradients` are in the memory of `device`, as the parameters are."""
        super().__init__(arena, slot_bytes, links)
        self._rule = rule
        self._gradients = gradients
        self._on = device

    def start(
        self, job: Job, piece: Piece, resting: Slot, weights: Slot | None, update_of: UpdateOf
    ) -> dict[str, Scalars]:
        under_way = self._begin(piece, resting)
        state = under_way.slot.part(0, piece.num_bytes)
        self._links.wait(self._bring(under_way, resting, state))  # of compute: the host does not wait
        present = [segment for segment in piece.segments if segment.parameter in job.present]
        with self._on.on_compute():
            found = self._rule.update_all(
                [
                    update_of(
                        each, state_tensors(state, each),
                        self._gradients.of(job.block, job.gradients, each.parameter, each.begin, each.end),
                        weight_range(job.block, each, weights),
                    )
                    for each in present
                ]
            )  # fmt: skip
        if self._links.recorder is not None:
            self._links.recorder.use(f"step {piece.name}", reads=[state.range], writes=[state.range])
        self.counters.num_pieces_on_device += 1
        self._take_back(under_way, state, resting, None)
        names = [job.block.parameters[each.parameter].name for each in present]
        return dict(zip(names, found, strict=True))
