"""Adapters' optimizer state as a plan may place it, cut into pieces before any of it is anywhere; and when one does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch

from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.optimizer.paged import rule_on_device
from offload_rt.optimizer.pieces import Masters, TrainedParameter, trained_block
from offload_rt.optimizer.rules import rule_for
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.profiling.measured_sizes import remembered_factor, scaled, sizes_key
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import TrainingDraft, Workload
from planners.plans.plan import Plan, Tier
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import Cuts, StreamingProblem

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


def in_tiers(workload: Workload, optimizer: torch.optim.Optimizer | None, options: RuntimeOptions) -> Workload:
    """`workload` with its adapters' state to be placed. Raises ConfigError where it cannot be."""
    if optimizer is None:
        raise ConfigError("plan: places optimizer state, but nothing trains")
    drafted = with_adapter_state(workload, optimizer, piece_elements=options.piece_elements)
    if workload.has_streams and drafted.training is not None:
        rule_on_device(drafted.training.rule, workload.config.device)  # or it says why not
    return drafted


def question(workload: Workload, cuts: Cuts | None, before: StreamingProblem | None = None) -> StreamingProblem:
    """The planner's question, with transient memory as it was measured for this model before, if it was.

    `cuts` are those that the plan must have. before: the one that was asked about the same model with its state
    elsewhere; memory that is free is what it was then.
    """
    problem = replace(streaming_problem(workload), cuts=cuts)
    if before is not None:
        problem = replace(
            problem, device_capacity_bytes=before.device_capacity_bytes, host_capacity_bytes=before.host_capacity_bytes
        )
    factor = remembered_factor(sizes_key(workload.model, problem.fingerprint, of_device=workload.has_streams))
    return problem if factor is None else scaled(problem, factor)


def planned(
    workload: Workload,
    plan: Plan | None,
    optimizer: torch.optim.Optimizer | None,
    options: RuntimeOptions,
    asked: StreamingProblem | None = None,
) -> tuple[Workload, StreamingProblem, Plan]:
    """The plan, the question that it answers, and the workload: adapters' state is in tiers where the plan says so, or
    where memory does not hold it beside them. asked: the question about `workload`, where somebody has asked it.
    """
    asked_for = options.state if plan is None else plan.state
    if asked_for is not None and workload.training is None:
        workload = in_tiers(workload, optimizer, options)
        problem = question(workload, options.cuts, asked)
    else:
        problem = question(workload, options.cuts) if asked is None else asked
    if plan is not None:
        return workload, problem, plan
    try:
        return workload, problem, plan_streaming(problem, rest=options.rest, fill=options.fills)
    except PlanInfeasible as infeasible:
        one_tier = problem.unified and problem.nvme_capacity_bytes is None
        if workload.training is not None or optimizer is None or one_tier:
            raise
        try:
            workload = in_tiers(workload, optimizer, options)
        except ConfigError as reason:
            raise infeasible from reason
        first = infeasible
    problem = question(workload, options.cuts, problem)
    try:
        return workload, problem, plan_streaming(problem, rest=options.rest, fill=options.fills)
    except PlanInfeasible:
        if first.needs.keys() == {Tier.NVME.value}:  # their state would take more of it
            raise first from None
        raise
