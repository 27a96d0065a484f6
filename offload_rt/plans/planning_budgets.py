"""The user's budgets in the optimiser's question: what a plan may decide about, and what lies there besides."""

from __future__ import annotations

from dataclasses import replace

from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.plans.planning_tokens import Rounding
from offload_rt.plans.workload_sizes import largest_saved_bytes
from offload_rt.wiring.workload import Workload
from planners.optimiser.greedy import Shortage
from planners.optimiser.greedy import infeasible as refusal
from planners.optimiser.wear import rated_bytes
from planners.plans.placement import Tier
from planners.problems.hardware import Drive, Hardware
from planners.problems.problem import Problem
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.static_memory import capacities


def in_budgets(infeasible: PlanInfeasible, streaming: StreamingProblem, problem: Problem) -> PlanInfeasible:
    """`infeasible`, of `problem`, in the user's budgets, of which that has only what a plan may decide about."""
    device = problem.hardware.device
    budgets = {
        Tier.DEVICE.value: streaming.device_capacity_bytes or device.memory_bytes,
        Tier.HOST.value: streaming.host_capacity_bytes or problem.hardware.host.memory_bytes,
        Tier.NVME.value: streaming.nvme_capacity_bytes or problem.hardware.nvme_bytes,
    }
    beside = {tier: budgets[tier] - have for tier, have in capacities(problem).items()}
    # A question with less DEVICE memory leaves the rest to what took more; a reserve may be more than the budget.
    beside[Tier.DEVICE.value] = max(beside[Tier.DEVICE.value], device.reserve_bytes)
    short = [
        Shortage(tier, need + beside[tier], budgets[tier], infeasible.phase) for tier, need in infeasible.needs.items()
    ]
    return refusal(short)


def passing_of(workload: Workload, streaming: StreamingProblem, chunk_tokens: int | None) -> Rounding:
    """What a device with streams has on its way beside what plans say; nothing where DEVICE is RAM.

    Of layers by chunks, what waits with their inputs; in HOST, what passes it whole to and from drives, twice in either
    direction: that, and of what is swapped the largest tensor.
    """
    if not workload.has_streams:
        return Rounding()
    on_their_way = streaming.on_their_way_bytes(Tier.HOST, by_chunks=chunk_tokens is not None)
    host = 0
    if workload.config.nvme:
        inputs = max(on_their_way, streaming.layer_input_bytes) + streaming.layer_input_bytes
        host = 2 * (inputs + largest_saved_bytes(workload, chunk_tokens or workload.config.seq_len))
    return Rounding(device_bytes=on_their_way, host_bytes=host)


def within_budgets(
    hardware: Hardware, streaming: StreamingProblem, reserve_bytes: int, rounding_bytes: int, more: Rounding
) -> Hardware:
    """The machine with the memory that it may use. Its drives' rates are summed, their room is what is free.

    `rounding_bytes` is what whole pages of one thing per block may take more than its bytes: in HOST an input, in
    DEVICE an input, two ends of what stays of the block, and a slot's; `more`, what activations do.
    """
    reserve = reserve_bytes + 4 * rounding_bytes + more.device_bytes + (more.host_bytes if streaming.unified else 0)
    capacity = streaming.device_capacity_bytes or hardware.device.memory_bytes
    drives = hardware.drives
    if streaming.nvme_capacity_bytes is None:
        drives = ()
    elif not drives:
        raise ConfigError("plan: nvme= gives a folder, but the hardware profile knows no drive; calibrate with --nvme")
    else:
        one = Drive(
            capacity_bytes=max(1, streaming.nvme_capacity_bytes - more.nvme_bytes),
            read_bytes_per_second=hardware.read_bytes_per_second,
            write_bytes_per_second=hardware.write_bytes_per_second,
            endurance_bytes=rated_bytes(hardware),
        )
        drives = (one,)
    host = 0 if streaming.unified else streaming.host_capacity_bytes or hardware.host.memory_bytes
    return replace(
        hardware,
        device=replace(hardware.device, memory_bytes=max(capacity, reserve + 1), reserve_bytes=reserve),
        host=replace(hardware.host, memory_bytes=max(0, host - rounding_bytes - more.host_bytes)),
        drives=drives,
        unified=streaming.unified,
    )


def with_slack(problem: Problem, slack_bytes: int, memory_bytes: int) -> Problem:
    """`problem` with so much reserved for freed memory, in so much DEVICE memory: at least what is reserved in all,
    since a question cannot be asked about less.
    """
    device = problem.hardware.device
    reserve_bytes = device.reserve_bytes - problem.slack_bytes + slack_bytes
    device = replace(device, memory_bytes=max(memory_bytes, reserve_bytes + 1), reserve_bytes=reserve_bytes)
    return replace(problem, hardware=replace(problem.hardware, device=device), slack_bytes=slack_bytes)
