"""The work of a plan's step, summed up by hand, class by class, and the least that any plan takes."""

from __future__ import annotations

from planners.plans.placement import Tier, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.cost import class_costs, fetch_counts, held_up_seconds, knobs_of, tiles_again_seconds
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import Problem
from planners.simulator.optimizer_state import steps_in_parts, update_bytes
from planners.simulator.static_memory import capacities


def written_bytes(problem: Problem, plan: Plan) -> float:
    """To the drives, in one step."""
    return busy_seconds(problem, plan)["ssd_write"] * max(1.0, problem.hardware.write_bytes_per_second)


def busy_seconds(problem: Problem, plan: Plan) -> dict[str, float]:
    """Work of one step by resource, at full rate, summed up class by class."""
    workload, hardware, knobs = problem.workload, problem.hardware, knobs_of(plan)
    counts, later = (fetch_counts(problem, knobs.slots, later=later) for later in (False, True))
    passes = workload.passes
    costs = class_costs(problem, knobs.cuts, knobs.decode_scope)
    compute = stepped = cpu = down = up = read = write = 0.0
    for c, (entry, placed) in enumerate(zip(workload.classes, plan.classes, strict=True)):
        n, weights = entry.count, placed.weights
        fetches = sum(counts[c]) + (passes - 1) * sum(later[c])
        down += fetches * weights.streamed_bytes
        read += fetches * weights.nvme_bytes
        n *= passes  # visits of its blocks, each way
        compute += n * (costs[c].forward_seconds + costs[c].backward_seconds)
        if (rows := workload.looked_up_of(entry)) is not None and weights.streamed_bytes:
            down += n * rows.looked_up_bytes
            read += n * rows.read_bytes if weights.nvme_bytes else 0
        if plan.head_tiles is not None and plan.head_tiles.block in entry.blocks:
            compute += passes * tiles_again_seconds(problem, entry)
            down += 2 * passes * weights.streamed_bytes
            read += 2 * passes * weights.nvme_bytes
        trains = entry.visits_backward or entry.trainable_params
        up += n * (costs[c].spill_bytes[0] + (costs[c].spill_bytes[1] if trains else 0))
        down += n * (costs[c].spill_bytes[0] + (costs[c].spill_bytes[1] if trains else 0))
        if knobs.boundary is Tier.HOST and entry.is_layer:
            up += n * workload.boundary_bytes
            down += n * workload.boundary_bytes
        for j, (saved, split) in enumerate(zip(entry.saved, placed.tokens, strict=True)):
            each = saved.bytes_per_token * workload.pass_rows
            swapped = n * each * (split.host_tokens + split.nvme_tokens)
            compute += n * costs[c].recompute_seconds[j] * split.recompute_tokens / workload.seq_len
            for phase in (0, 1):
                held_up = held_up_seconds(costs[c], j, phase, split.nvme_tokens, split.host_tokens)
                compute += n * held_up / workload.seq_len
            up += swapped
            down += swapped
            if knobs.boundary is Tier.HOST and saved.name == "input":
                down += swapped
            write += n * each * split.nvme_tokens
            read += n * each * split.nvme_tokens
        on_device = resting = 0
        device_state = 0
        n = entry.count
        arrivals = workload.micro_batches if workload.sums_gradients else 1
        for update, state in zip(placed.updates, update_bytes(problem, placed), strict=True):
            if update.place is UpdatePlace.CPU:
                cpu += n * update.params / hardware.host.adamw_params_per_second
            else:
                stepped += n * update.params / hardware.device.adamw_params_per_second
                on_device += update.params
                if workload.device_steps is not None:
                    cpu += n * update.params * workload.device_steps.cpu_seconds_per_param
                if update.tier is not Tier.DEVICE:
                    up += n * state
                    down += n * state
            if workload.in_host(update.tier, update.place):
                up += n * arrivals * workload.gradient_bytes_per_param * update.params
                cpu += n * (arrivals - 1) * workload.summing_seconds_per_param * update.params
                back = update.place is UpdatePlace.DEVICE
                down += n * workload.waiting_gradient_bytes_per_param * update.params if back else 0
            if update.tier is Tier.NVME:
                read += n * state
                write += n * state
            else:
                resting += state
            if update.tier is Tier.DEVICE:
                device_state += state
        new = workload.weight_bytes_per_param * on_device
        all_new = workload.weight_bytes_per_param * entry.trainable_params
        resident = all_new if workload.pinned else (weights.device_bytes if entry.trainable_params else 0)
        down += n * max(0, resident - new)
        up += n * max(0, new - resident)
        if workload.mutable and entry.trainable_params:
            write += n * weights.nvme_bytes
            if steps_in_parts(problem, plan.update_mode, placed):  # each part is rounded into what was there
                read += 2 * n * weights.nvme_bytes
                write += n * weights.nvme_bytes
        if workload.commit_every and hardware.drives and entry.trainable_params:
            adapters = all_new if workload.pinned else 0
            write += n * (resting + adapters) / workload.commit_every
            up += n * (device_state + adapters) / workload.commit_every
    links = hardware.links
    return {
        "compute": compute,
        "host_to_device": 0.0 if hardware.unified else down / links.host_to_device_bytes_per_second,
        "device_to_host": 0.0 if hardware.unified else up / links.device_to_host_bytes_per_second,
        "ssd_read": read / hardware.read_bytes_per_second if read else 0.0,
        "ssd_write": write / hardware.write_bytes_per_second if write else 0.0,
        "cpu": cpu,
        "device_update": stepped,
    }


def _least_forward(taken: MeasuredSeconds) -> float:
    return taken.forward if taken.kept is None else min(taken.forward, taken.kept.forward)


def floor_seconds(problem: Problem) -> float:
    """No plan whatever takes less: all products and attention once, and what memory cannot hold fetched twice."""
    workload, hardware = problem.workload, problem.hardware
    device = hardware.device
    products = sum(e.count * (e.forward_flops + e.backward_flops) for e in workload.classes) * workload.pass_tokens
    attention = sum(e.count * e.attention_flops for e in workload.classes) * workload.pass_tokens
    seconds = products / device.matmul_flops_per_second
    # Backward of attention is at least twice its forward.
    forward = attention / (device.matmul_flops_per_second * device.attention_forward_efficiency)
    backward = 2 * attention / (device.matmul_flops_per_second * device.attention_backward_efficiency)
    measured = [(e.count, e.measured) for e in workload.classes if e.measured is not None]
    timed = workload.together * sum(n * (_least_forward(taken) + taken.decode) for n, taken in measured)
    compute = seconds + forward + backward + timed
    layers = sum(e.count * e.stored_bytes for e in workload.classes if e.is_layer)
    above = capacities(problem)["device"]
    link = hardware.links.host_to_device_bytes_per_second
    fetched = 0.0 if hardware.unified else 2 * max(0, layers - above) / link
    drives = 0.0
    beyond = layers - above - capacities(problem)["host"]
    if beyond > 0 and hardware.drives:
        drives = 2 * beyond / hardware.read_bytes_per_second
    return workload.passes * max(compute, fetched, drives)
