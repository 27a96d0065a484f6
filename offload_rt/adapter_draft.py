"""Adapters' optimizer state as a plan may place it: cut into pieces, before any of it is anywhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch

from offload_rt.optimizer.pieces import Masters, TrainedParameter, trained_block
from offload_rt.optimizer.rules import rule_for
from offload_rt.workload import TrainingDraft, Workload

BLOCK = "adapters"
"""All of them are one block, so that pieces are full however small the parameters are."""


def with_adapter_state(workload: Workload, optimizer: torch.optim.Optimizer, *, piece_elements: int) -> Workload:
    """`workload`, of which only adapters train, with their state to be placed.

    Raises ConfigError where it cannot be: for an optimizer that does not step each parameter by itself, for parameters
    that are neither bfloat16 nor float32.
    """
    rule = rule_for(optimizer, in_place=True)
    parameters = [
        TrainedParameter(name, parameter, None)
        for name, parameter in workload.model.named_parameters()
        if parameter.requires_grad and parameter.numel()
    ]
    block = trained_block(
        BLOCK, parameters, rule, accumulates=False, piece_elements=piece_elements,
        masters=Masters.COPIES if workload.config.nvme else Masters.NONE,
    )  # fmt: skip
    pieces = [[p.num_bytes, [[s.parameter, s.begin, s.end] for s in p.segments]] for p in block.pieces]
    names = [[p.name, list(p.parameter.shape), str(p.parameter.dtype)] for p in parameters]
    text = json.dumps(["adapters/1", rule.name, workload.sources.fingerprint, names, pieces])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return replace(workload, training=TrainingDraft(rule=rule, blocks=(block,), key=key, adapters=True))
