"""The optimiser's questions about adapters whose optimizer state rests in tiers.

They are asked where no plan holds the state beside the adapters: none of the optimiser's, or for plan="auto" none of
the fixed rule's. Weights and gradients stay in DEVICE memory as they are, and cross no link; the state, one block's, is
a class of its own that computes nothing: in pieces in memory and on NVMe, stepped when the last gradient is there. As
where layers train, two questions are asked where HOST is a tier of its own and there is a drive: with all state in
memory, and with the drive for some of it, which commits each step unless `commit_every=` says otherwise.

Where a device has memory of its own, it steps the state itself, piece by piece, from wherever that rests: slots there,
which the questions reserve, and for a rate the slowest of its link, either way, and its kernel. The planner has this as
updates on the CPU: in time they are as much behind the last backward. Behind an emulated link the CPU steps, and the
rate has the way of the gradients there, before, and that of the new weights back, after.

    layers, edges ──► classes without parameters that train
    adapters      ──► a class of pieces ──► classes[].updates ──► `placement_of` ──► StatePlacement
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.plans.planning import by_head, chunk_lengths, measured_problem
from offload_rt.plans.planning_training import beside_steps, state_cuts
from offload_rt.plans.training_seconds import NOTHING
from offload_rt.profiling.update_profile import steps_per_second
from offload_rt.wiring.workload import TrainingDraft, Workload
from planners.optimiser.rows import Freedoms
from planners.plans.placement import Tier
from planners.problems.hardware import Hardware
from planners.problems.problem import BlockClass, Problem
from planners.rule.attempts import PAGED_SLOTS
from planners.rule.streaming_problem import StreamingProblem

Questions = tuple[tuple[Problem, Freedoms], ...]


def questions_by_chunks(
    workload: Workload,
    streaming: StreamingProblem,
    hardware: Hardware,
    optimizer: torch.optim.Optimizer,
    *,
    over_link: bool = False,
) -> Iterator[Questions]:
    """The questions with layers whole, then by ever shorter chunks; the head whole, then by tiles. Blocks.

    Raises ConfigError for what cannot be asked.
    """
    rate: float | None = None
    for chunk_tokens in chunk_lengths(streaming):
        try:
            problem = measured_problem(workload, streaming, hardware, chunk_tokens=chunk_tokens)
        except PlanInfeasible:
            continue  # a GPU has no room for profiling that
        rate = rate or _with_the_link(measured_rate(workload, optimizer), workload, hardware, over_link=over_link)
        for question in by_head(problem, streaming):
            yield questions(workload, streaming, question, rate)


def asked_for(
    workload: Workload, streaming: StreamingProblem, problem: Problem, optimizer: torch.optim.Optimizer
) -> Questions:
    """`questions` about what `problem` says of layers. Blocks for seconds."""
    return questions(workload, streaming, problem, measured_rate(workload, optimizer))


def measured_rate(workload: Workload, optimizer: torch.optim.Optimizer) -> float:
    """Parameters a second by the code that steps them, piece by piece, on the processor: infinite where that does not.
    Blocks.
    """
    if workload.has_streams:
        return math.inf
    training = _training(workload)
    (block,) = training.blocks
    return steps_per_second(block, training.rule, optimizer.param_groups[0], on_nvme=bool(workload.config.nvme))


def _with_the_link(rate: float, workload: Workload, hardware: Hardware, *, over_link: bool) -> float:
    """Parameters a second where an emulated link, if there is one, takes gradients to HOST and new weights back."""
    if not over_link:
        return rate
    (block,) = _training(workload).blocks
    num_bytes = block.weights_bytes / block.num_elements
    links = hardware.links
    out, back = links.device_to_host_bytes_per_second, links.host_to_device_bytes_per_second
    return 1 / (1 / rate + num_bytes / out + num_bytes / back)


def questions(workload: Workload, streaming: StreamingProblem, problem: Problem, params_per_second: float) -> Questions:
    """`problem`, which was asked without it, with the adapters' state, and the rate at which that is stepped.

    The last one leaves most open.
    """
    config, sizes = workload.config, streaming.training
    if sizes is None:
        raise ConfigError("plan: no state of adapters rests in tiers")
    (block,) = _training(workload).blocks
    params = block.num_elements
    entry = BlockClass(
        name=block.name, blocks=(block.name,), positions=(problem.workload.num_blocks,), is_layer=False, stored_bytes=0,
        decoded_bytes=0, largest_linear_bytes=0, trainable_params=params, forward_flops=0.0, backward_flops=0.0,
        attention_flops=0.0, moved_bytes=0.0, saved=(), attention_bytes=0.0, attention_groups=1, transients=(),
        measured=NOTHING, weights_stay=True, state_cuts=state_cuts(block),
    )  # fmt: skip
    beside = sum(beside_steps(sizes).values())
    device, host, links = problem.hardware.device, problem.hardware.host, problem.hardware.links
    if workload.has_streams:
        link = min(links.host_to_device_bytes_per_second, links.device_to_host_bytes_per_second)
        params_per_second = min(params_per_second, device.adamw_params_per_second, link * params / sizes.state_bytes)
    device = replace(device, adamw_params_per_second=params_per_second)
    host = replace(host, adamw_params_per_second=params_per_second)
    reserve = device.reserve_bytes + PAGED_SLOTS * sizes.stepping_bytes
    if streaming.unified:
        reserve += beside
    else:
        host = replace(host, memory_bytes=max(0, host.memory_bytes - beside))
    device = replace(device, reserve_bytes=reserve, memory_bytes=max(device.memory_bytes, reserve + 1))
    planned = replace(
        problem.workload,
        classes=(*problem.workload.classes, entry),
        state_bytes_per_param=-(-sizes.state_bytes // params),
        gradient_bytes_per_param=0,  # they and the weights are in what `problem` has reserved
        weight_bytes_per_param=0,
        state_piece_bytes=sizes.piece_bytes,
        log_bytes=2 * sizes.state_bytes if config.nvme else 0,
    )
    memory = Tier.DEVICE if streaming.unified else Tier.HOST
    places: list[tuple[tuple[Tier, ...], int | None]] = []
    if not streaming.unified and (not config.nvme or config.commit_every is None):
        places.append(((memory,), None))
    if config.nvme:
        places.append(((memory, Tier.NVME), config.commit_every or 1))
    machine = replace(problem.hardware, device=device, host=host)
    return tuple(
        (
            replace(
                problem, hardware=machine, workload=replace(planned, commit_every=every),
                capabilities=replace(problem.capabilities, state_tiers=tiers),
            ),
            Freedoms(),
        )
        for tiers, every in places
    )  # fmt: skip


def _training(workload: Workload) -> TrainingDraft:
    if workload.training is None or not workload.training.adapters:
        raise ConfigError("plan: no state of adapters rests in tiers")
    return workload.training
