"""Which share of the updates a device makes, where all parameters train: at what prices, and whether it is worth it.

A piece of state that the device steps goes there and back, beside what the processor steps meanwhile (see [Note:
updates on the device] in `optimizer.on_device`). That takes links, the device's memory rate, and of the processor's
memory about what stepping it there takes: where links and processor share what limits both, nothing is gained. So
`offload-rt calibrate` measures how much of its rate the processor keeps beside copies, and that is in the price.

The optimiser is asked with every update left to the processor, and again with the choice. The device gets a share where
that saves `GAIN` of a step. The fixed rule's plan gets one where all state rests in HOST: it is then stepped behind the
backward pass, when nothing else is going on, so that both sides are to be done at the same time.
"""

from __future__ import annotations

import math
from dataclasses import replace

from offload_rt.errors import ConfigError
from offload_rt.optimizer.on_device import device_rule
from offload_rt.plans.planning import optimal
from offload_rt.plans.workload_sizes import training_sizes
from offload_rt.wiring.runtime_options import DEVICE_SLOTS
from offload_rt.wiring.workload import Workload
from planners.errors import PlanInfeasible
from planners.optimiser.rows import Freedoms
from planners.plans.placement import Tier
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware, Links
from planners.problems.problem import DeviceSteps, Problem
from planners.rule.attempts import STEPPED_THERE
from planners.rule.streaming_problem import StreamingProblem

GAIN = 0.03
"""What a plan has to save to be taken: predictions are off by 2.7 % in the median (`benchmarks/prediction.py`)."""


def device_steps(
    workload: Workload, hardware: Hardware, *, moved_bytes_per_param: float, arrivals_per_second: float
) -> DeviceSteps | None:
    """How the device steps pieces of state, and what that costs the processor; None where it cannot.

    moved_bytes_per_param: over the links, both ways together. arrivals_per_second: parameters whose gradients the
    processor takes.
    """
    training = workload.training
    if training is None or training.adapters or not workload.has_streams:
        return None
    try:
        device_rule(training.rule, workload.config.device)
    except ConfigError:
        return None
    held_up = (1 - hardware.host.adamw_beside_copies) * moved_bytes_per_param / _both_ways(hardware.links)
    return DeviceSteps(
        num_slots=DEVICE_SLOTS, slot_bytes=training_sizes(workload).stepping_bytes,
        cpu_seconds_per_param=1 / arrivals_per_second + held_up,
    )  # fmt: skip


def with_balanced_share(rule: Plan, workload: Workload, streaming: StreamingProblem, machine: Hardware) -> Plan:
    """The rule's plan with updates on the device, as many as it makes in the time in which the processor makes the
    others. Unchanged where that saves less than `GAIN` of their time, where there is no room, or state on a drive.
    """
    state, sizes, training = rule.state, streaming.training, workload.training
    in_host = state is not None and sizes is not None and state.is_all_in_memory(sizes) and not machine.unified
    if state is None or sizes is None or training is None or not in_host:
        return rule
    params = sum(block.num_elements for block in training.blocks)
    weights = sum(each.parameter.nbytes for block in training.blocks for each in block.parameters) / params
    there = (sizes.state_bytes + sizes.gradient_bytes) / params
    back = sizes.state_bytes / params + weights
    steps = device_steps(workload, machine, moved_bytes_per_param=there + back, arrivals_per_second=math.inf)
    if steps is None:
        return rule
    links, cpu = machine.links, 1 / machine.host.adamw_params_per_second
    device = max(
        there / links.host_to_device_bytes_per_second, back / links.device_to_host_bytes_per_second,
        (there + back) / _both_ways(links), 1 / machine.device.adamw_params_per_second,
    )  # fmt: skip
    # (1 - share) cpu + share steps.cpu_seconds_per_param = share device
    share = min(1.0, cpu / max(device, cpu + device - steps.cpu_seconds_per_param))
    items = {**rule.peak_bytes[Tier.DEVICE.value], STEPPED_THERE: steps.num_slots * steps.slot_bytes}
    capacity = streaming.device_capacity_bytes
    if max(share * device, share * steps.cpu_seconds_per_param) > (1 - GAIN) * cpu:
        return rule
    if capacity is not None and sum(items.values()) > capacity:
        return rule
    state = state.stepped_on_device(sizes, share, slots=steps.num_slots)
    if not state.on_device:
        return rule
    return replace(rule, state=state, peak_bytes={**rule.peak_bytes, Tier.DEVICE.value: items})


def _both_ways(links: Links) -> float:
    """Bytes a second where as many go each way."""
    return (links.host_to_device_bytes_per_second + links.device_to_host_bytes_per_second) * (1 + links.duplex) / 2


def with_the_best_share(problem: Problem, streaming: StreamingProblem, freedoms: Freedoms) -> tuple[Plan, Problem]:
    """As `optimal`, with updates on the device where they save `GAIN` of a step."""
    if problem.workload.device_steps is None:
        return optimal(problem, streaming, freedoms)
    plan, answered = optimal(problem, streaming, replace(freedoms, device_updates=False))
    try:
        shared, answered_shared = optimal(problem, streaming, freedoms)
    except PlanInfeasible:  # not in theory: it is free to give the device nothing
        return plan, answered
    seconds, shared_seconds = (float(one.predicted["step_seconds"]) for one in (plan, shared))
    return (shared, answered_shared) if shared_seconds < (1 - GAIN) * seconds else (plan, answered)
