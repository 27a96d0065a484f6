"""A block's optimizer state: the pieces that it moves in, its bytes by tier, when it is stepped, who waits for that."""

from __future__ import annotations

from planners.plans.placement import ClassPlan, Tier, UpdateMode
from planners.plans.plan import Plan
from planners.problems.problem import BlockClass, Problem

BUCKET_PARAMS = 128 * 10**6
MAX_BUCKETS = 8


def buckets(entry: BlockClass) -> int:
    """Pieces in which a block's optimizer state moves."""
    return max(1, min(MAX_BUCKETS, -(-entry.trainable_params // BUCKET_PARAMS)))


def whole_state_bytes(problem: Problem, entry: BlockClass) -> int:
    """Optimizer state of one block; one copy."""
    if entry.state_cuts:
        return entry.state_cuts[-1][1]
    return problem.workload.state_bytes_per_param * entry.trainable_params


def update_bytes(problem: Problem, placed: ClassPlan) -> tuple[int, ...]:
    """Optimizer state of each update of one block, one copy. ValueError where it cannot be cut so."""
    cuts = dict(next(entry.state_cuts for entry in problem.workload.classes if entry.name == placed.name))
    if not cuts:
        return tuple(problem.workload.state_bytes_per_param * update.params for update in placed.updates)
    found, end = [], 0
    for update in placed.updates:
        begin, end = end, end + update.params
        if begin not in cuts or end not in cuts:
            raise ValueError(f"plan: state of {placed.name!r} cannot be cut into parameters [{begin}, {end})")
        found.append(cuts[end] - cuts[begin])
    return tuple(found)


def state_bytes(problem: Problem, placed: ClassPlan, tier: Tier) -> int:
    """Optimizer state of one block that rests in `tier`; one copy."""
    sizes = zip(placed.updates, update_bytes(problem, placed), strict=True)
    return sum(num_bytes for update, num_bytes in sizes if update.tier is tier)


def steps_after(problem: Problem, mode: UpdateMode, tier: Tier) -> bool:
    """Whether what rests in `tier` is stepped after the last backward."""
    return mode is UpdateMode.AFTER or (problem.capabilities.memory_steps_after and tier is not Tier.NVME)


def steps_in_parts(problem: Problem, mode: UpdateMode, placed: ClassPlan) -> bool:
    """Whether a block is stepped behind its backward, and what of it is in memory after the last one."""
    return len({steps_after(problem, mode, update.tier) for update in placed.updates if update.params}) > 1


def state_copies(problem: Problem, mode: UpdateMode) -> int:
    """Of state in memory: a second one where it is stepped before the norm is known."""
    return 2 if mode is UpdateMode.SPECULATIVE and not problem.capabilities.memory_steps_after else 1


def gradients_stay(problem: Problem, plan: Plan) -> bool:
    """Whether gradients of all blocks wait until the end of the step, or for further micro-batches."""
    if plan.update_mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE) or problem.workload.sums_gradients:
        return True
    updates = [update for entry in plan.classes for update in entry.updates if update.params]
    return any(problem.capabilities.memory_steps_after and update.tier is not Tier.NVME for update in updates)


def passing_gradient_bytes(problem: Problem, plan: Plan) -> int:
    """The most gradients of one block that pass through HOST without staying until the step's end."""
    if gradients_stay(problem, plan):
        return 0
    return max(
        problem.workload.gradient_bytes_per_param
        * sum(u.params for u in entry.updates if problem.workload.in_host(u.tier, u.place) and not u.deferred)
        for entry in plan.classes
    )
