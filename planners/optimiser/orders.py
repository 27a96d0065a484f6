"""Micro-batches one after the other, or through each layer together: both are asked about where everything trains.

One after the other, each fetches all weights that stream and may keep what its layers save; together, one fetch serves
all, and nothing but layer inputs waits, as the runtime has it. Where adapters train, together is not faster: what it
saves of fetches hides behind computation, what it computes again does not (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planners.errors import PlanInfeasible
from planners.plans.plan import Plan
from planners.problems.problem import Problem

GAIN = 0.02
"""That going together must save: a loop of `backward` and `step` has nothing of it, only `train_batch` has."""


def layer_major(problem: Problem) -> Problem:
    """The question about micro-batches that go through each layer together."""
    can = replace(problem.capabilities, token_policy=False)
    return replace(problem, workload=replace(problem.workload, layer_major=True), capabilities=can)


def in_best_order(problem: Problem, ask: Callable[[Problem], Plan]) -> tuple[Problem, Plan]:
    """The faster of the plans that `ask` makes of either order, and the question that it answers. The bound is that of
    both orders.

    Raises what `ask` raises: what does not fit one after the other fits together no better.
    """
    apart = ask(problem)
    if not problem.workload.sums_gradients or problem.workload.layer_major:
        return problem, apart
    question = layer_major(problem)
    try:
        plan = ask(question)
    except PlanInfeasible:
        return problem, apart
    bounds = [one.predicted["lower_bound_seconds"] for one in (apart, plan)]
    if _seconds(plan) > (1 - GAIN) * _seconds(apart):
        question, plan = problem, apart
    if None not in bounds:
        least = min(*bounds, _seconds(plan))
        gap = max(0.0, 1 - least / _seconds(plan))
        plan = replace(plan, predicted={**plan.predicted, "lower_bound_seconds": least, "gap": gap})
    return question, plan


def _seconds(plan: Plan) -> float:
    return float(plan.predicted["step_seconds"])
