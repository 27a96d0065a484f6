"""The plan that takes the least memory: what decides whether any fits, and says what would where none does.

The search tightens what overflows when it is laid out by steps that serve where there is room, and near the least
memory steps over the last plans that fit. Here tiers may overflow at a price, so that there is always a plan, and what
overflows is tightened by what it lacks until the program can give way no more. What is laid out then takes the same
bytes whatever the budget: so what fits in less memory fits in more, and what is said to be needed is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from planners.optimiser.choices import modes
from planners.optimiser.expand import expand
from planners.optimiser.greedy import (
    Shortage,
    boundaries,
    chunk_choices,
    homes,
    host_slots,
    input_tiers,
    may_rest,
    shortages,
    state_slots,
)
from planners.optimiser.rows import Freedoms
from planners.optimiser.steady import SHORTAGE_PRICES, Steady, solve_steady
from planners.optimiser.trial import Search
from planners.plans.placement import Buffers
from planners.plans.plan import Plan
from planners.problems.cost import Knobs
from planners.problems.problem import Problem
from planners.simulator.division import divided
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities
from planners.simulator.step_work import floor_seconds
from planners.units import PAGE_BYTES, ProblemError, whole_pages

TIGHTENINGS = 12
LESS_TIME = 1e4
"""Times that a second counts less here: prices of shortages are by a step's time, and no byte is to be bought with it.
"""
AGAIN = 4
"""Times that budgets which were to be enough are looked at again: what is laid out in them may round otherwise."""


def search_frugal(problem: Problem, freedoms: Freedoms | None = None) -> Search:
    """The first plan that fits of those that take the least memory. Without one, what is short in the closest: with
    so much of these tiers there is one.

    Raises `ProblemError` where no memory would help.
    """
    found, have = Search(), {tier: float(size) for tier, size in capacities(problem).items()}
    best: tuple[float, Knobs, list[Shortage]] | None = None
    for knobs in _frugal_knobs(problem):
        laid_out = _laid_out(problem, knobs, have, freedoms, found, float("inf") if best is None else best[0])
        if laid_out is None:
            continue
        steady, plan, short = laid_out
        if not short:
            found.plan, found.steady = plan, replace(steady, seconds_per_gb={})  # of which a shortage has the price
            found.simulation = simulate(divided(problem, plan), plan)
            found.num_simulations += 1
            return found
        if best is None or _lack(short) < best[0]:
            best = _lack(short), knobs, short
    if best is None and problem.max_written_bytes is not None:
        raise ProblemError(
            f"max_written: no plan writes as little as {problem.max_written_bytes} bytes a step, whatever the memory"
        )
    if best is None:
        raise ProblemError("policy: leaves no place for something that this machine has to hold")
    _, knobs, short = best
    enough = dict(have)
    phases: dict[str, str] = {}
    for _ in range(AGAIN):
        phases |= {one.tier: one.phase for one in short}
        enough |= {one.tier: float(whole_pages(round(one.need_bytes))) for one in short}
        laid_out = _laid_out(problem, knobs, enough, freedoms, found)
        if laid_out is None or not (short := laid_out[2]):
            break
    found.short = [Shortage(tier, enough[tier], have[tier], phase) for tier, phase in phases.items()]
    return found


def _frugal_knobs(problem: Problem) -> Iterator[Knobs]:
    """The discrete choices that take the least memory, and all of those of which none always does."""
    buffers = Buffers(host_slots=host_slots(problem, 1), gradient_slots=1, state_slots=state_slots(problem)[-1])
    for cuts in chunk_choices(problem):
        for mode, boundary, inputs, (weights, in_memory) in itertools.product(
            modes(problem), boundaries(problem, cuts), input_tiers(problem), homes(problem)
        ):
            if may_rest(problem, mode, weights, in_memory):
                yield Knobs(
                    update_mode=mode, slots=1, cuts=cuts, boundary=boundary, buffers=buffers, inputs=inputs,
                    weights=weights, state_in_memory=in_memory,
                )  # fmt: skip


def _lack(short: list[Shortage]) -> float:
    return sum(SHORTAGE_PRICES[one.tier] * (one.need_bytes - one.have_bytes) for one in short)


def _laid_out(
    problem: Problem,
    knobs: Knobs,
    have: dict[str, float],
    freedoms: Freedoms | None,
    found: Search,
    least_lack: float = float("inf"),
) -> tuple[Steady, Plan, list[Shortage]] | None:
    """A plan under `knobs` that fits into `have`, or else the one that lacks least. None where there is none whatever
    the memory, and for one that lacks at least `least_lack`.
    """
    room, before = dict(have), dict.fromkeys(have, 0.0)
    closest: tuple[Steady, Plan, list[Shortage]] | None = None
    for attempt in range(TIGHTENINGS):
        steady = solve_steady(
            problem, knobs, unit_seconds=LESS_TIME * floor_seconds(problem), freedoms=freedoms, room=room, elastic=True,
            in_whole_numbers=True,
        )  # fmt: skip
        found.num_programs += 1
        missing = {} if steady is None else {t: n for t, n in steady.short_bytes.items() if n > PAGE_BYTES}
        lack = sum(SHORTAGE_PRICES[tier] * num_bytes for tier, num_bytes in missing.items())
        if steady is None or (not attempt and lack >= least_lack):
            return None
        plan = expand(problem, knobs, steady.fractions, planner="optimiser")
        short = shortages(divided(problem, plan), plan, have)
        if closest is None or _lack(short) < _lack(closest[2]):
            closest = steady, plan, short
        gives_way = [one for one in short if one.tier not in missing]
        if not gives_way:
            break
        for one in gives_way:
            # By what it lacks, and twice as much each time: what is laid out rounds.
            step = max(one.need_bytes - one.have_bytes, 2 * before[one.tier])
            room[one.tier] -= step
            before[one.tier] = step
    return closest
