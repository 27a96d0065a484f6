"""Which budgets a plan of the fixed rule overfills; and what to say when no plan fits: what is short, what would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planners.errors import PlanInfeasible, format_bytes, format_bytes_up
from planners.plans.plan import Plan, Tier
from planners.rule.streaming_problem import StreamingProblem
from planners.units import PAGE_BYTES

LAYER_INPUTS = ("layer inputs", "layer input in use", "layer inputs on their way")
"""What a plan says of them in DEVICE memory."""


def shortages(problem: StreamingProblem, plan: Plan) -> dict[Tier, tuple[int, int]]:
    """The tiers that `plan` overfills, each with need and capacity."""
    capacities = {
        Tier.DEVICE: problem.device_capacity_bytes,
        Tier.HOST: problem.host_capacity_bytes,
        Tier.NVME: problem.nvme_capacity_bytes,
    }
    return {
        tier: (plan.predicted_bytes(tier), capacity)
        for tier, capacity in capacities.items()
        if capacity is not None and plan.predicted_bytes(tier) > capacity
    }


def infeasible(
    problem: StreamingProblem, candidates: list[Plan], *, fits: Callable[[StreamingProblem], bool]
) -> PlanInfeasible:
    """Explains by the plan that lacks least: in the fewest tiers, then in bytes. `fits`: whether some plan does."""

    def lack(plan: Plan) -> tuple[int, int]:
        short = shortages(problem, plan)
        return len(short), sum(need - have for need, have in short.values())

    closest = min(candidates, key=lack)
    short = shortages(problem, closest)
    tier, (need, have) = next(iter(short.items()))
    items = closest.peak_bytes[tier.value]
    largest = max(items, key=lambda item: items[item])
    budgets = [
        (f"a drive with {format_bytes_up(size)} free" if which is Tier.NVME else "")
        or f"{which.value}_memory of {format_bytes_up(size + problem.beside_plan_bytes * (which is Tier.DEVICE))}"
        for which, (size, _) in short.items()
    ]
    ways = [" and ".join(budgets)]
    if problem.cuts is not None:
        ways[0] += f", for the cuts that the run was begun with ({problem.cuts.describe()})"
        if fits(replace(problem, cuts=None)):
            ways.append("other cuts, which take sums in another order (--other-cuts)")
    by_tokens = sum(items.get(item, 0) for item in ("activations", *LAYER_INPUTS))
    if set(short) == {Tier.DEVICE} and by_tokens > need - have + PAGE_BYTES * len(problem.layers):
        share = 1 - (need - have + PAGE_BYTES * len(problem.layers)) / by_tokens
        ways.append(f"batch_size x seq_len cut to {int(share * 100)}% (activations are {format_bytes(by_tokens)})")
    if problem.nvme_capacity_bytes is None and tier is not Tier.NVME:
        ways.append("nvme= a folder on an SSD, so that weights rest there")
    return PlanInfeasible(
        tier=tier.value,
        phase=f"training step; largest item: {largest}, {format_bytes(items[largest])}",
        need_bytes=need,
        have_bytes=have,
        ways_out=ways,
        needs={short_tier.value: bytes_needed for short_tier, (bytes_needed, _) in short.items()},
    )
