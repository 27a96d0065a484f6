"""What others do, as plans for the same simulator and checker, so that the gain of planning is measured.

A policy takes freedoms away from the optimiser: tiers, swapping, where and when updates run. What a policy leaves open
(shares, chunks, ring slots) the optimiser still chooses, so that each is the best that its idea can be here; the real
systems have other engineering and are not claimed to be these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.optimiser.orders import in_best_order
from planners.optimiser.rows import Freedoms
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan
from planners.problems.problem import Problem
from planners.units import ProblemError, nearest


@dataclass(frozen=True)
class Policy:
    """Freedoms that remain, and the update modes in order of preference."""

    freedoms: Freedoms
    modes: tuple[UpdateMode, ...]


_NVME, _HOST = (False, False, True), (False, True, False)
_BY_CPU = (UpdateMode.BACKWARD, UpdateMode.SPECULATIVE, UpdateMode.AFTER)
POLICIES: dict[str, Policy] = {
    "zero-infinity": Policy(
        Freedoms(swaps=False, nvme_activations=False, device_updates=False, weights=_NVME, states=_NVME),
        (UpdateMode.AFTER,),
    ),
    "zero-offload": Policy(
        Freedoms(swaps=False, nvme_activations=False, device_updates=False, weights=_HOST, states=_HOST),
        (UpdateMode.AFTER,),
    ),
    "fuyou": Policy(Freedoms(device_updates=False, weights=_NVME, states=_NVME), _BY_CPU),
    "memo": Policy(Freedoms(nvme_activations=False, device_updates=False), _BY_CPU),
    "full-recompute": Policy(Freedoms(swaps=False), tuple(UpdateMode)),
}
OURS = ("optimal", "greedy")
NAMES = (*OURS, *POLICIES)


def answer_by_policy(problem: Problem, name: str) -> tuple[Problem, Plan]:
    """The plan that policy `name` gives, and the question that it answers: ours are asked about either order of
    micro-batches, what others do about one after the other. Raises what `plan_by_policy` raises.
    """
    if name in OURS:
        return in_best_order(problem, partial(plan_by_policy, name=name))
    return problem, plan_by_policy(problem, name)


def plan_by_policy(problem: Problem, name: str) -> Plan:
    """The plan that policy `name` gives. `ProblemError` if unknown; otherwise raises what the planners raise."""
    if name == "optimal":
        return plan_optimal(problem)
    if name == "greedy":
        return plan_greedy(problem)
    if name not in POLICIES:
        raise ProblemError(f"policy: unknown {name!r}; {nearest(name, NAMES)}")
    policy = POLICIES[name]
    allowed = tuple(mode for mode in policy.modes if mode in problem.capabilities.update_modes)
    if problem.workload.clips:
        allowed = tuple(mode for mode in allowed if mode is not UpdateMode.BACKWARD)
    limited = replace(problem, capabilities=replace(problem.capabilities, update_modes=allowed))
    return replace(plan_optimal(limited, freedoms=policy.freedoms), planner=f"policy {name}")
