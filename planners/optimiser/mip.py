"""The optimiser: linear programs inside an enumeration of discrete choices, ranked by the simulator.

Update mode, ring slots, chunks, buffers, decode scope and where activations wait between layers are enumerated; for
each combination (`choices`) `steady` gives the best fractions and a bound. The best few are tried (`trial`). Nothing
depends on the clock: the same problem gives the same plan.

The lower bound that is reported is the least of all combinations' bounds: none of the plans that can be said within
the enumeration takes less.
"""

from __future__ import annotations

from dataclasses import replace

from planners.errors import PlanInfeasible
from planners.optimiser.choices import combinations
from planners.optimiser.expand import with_prediction
from planners.optimiser.frugal import search_frugal
from planners.optimiser.greedy import host_slots, infeasible, slot_bytes
from planners.optimiser.rows import GB, Freedoms
from planners.optimiser.steady import Steady, solve_steady
from planners.optimiser.trial import MAX_SIMULATIONS, Search, in_whole_numbers, try_candidate, try_in_turn
from planners.optimiser.wear import default_limit_bytes, is_worth_its_writes, spared
from planners.plans.plan import Plan
from planners.problems.cost import Knobs
from planners.problems.problem import Problem
from planners.simulator.step_work import floor_seconds
from planners.units import ProblemError

MORE_SIMULATIONS = 4
"""Of combinations with one slot, where there is a plan with more."""
MAX_CUTS = 3
"""Sizes of chunks that are compared, of those that fit."""
WEAR_PRICES = (1.0, 0.3, 0.1, 0.03, 0.01)
WEAR_SLOWDOWN = 0.02
WEAR_LESS = 0.75
"""A plan may be so much slower than the fastest if it writes at most this share of what that writes."""


def plan_optimal(problem: Problem, *, freedoms: Freedoms | None = None) -> Plan:
    """The best plan found, with its bound; one for adapters spares the drives (`wear`).

    `PlanInfeasible` where none fits; raises `SolverMissing`, `SolverFailed`.
    """
    free = _plan(problem, freedoms)
    limit = default_limit_bytes(problem, free)
    if limit is None:
        return free
    try:
        plan = _plan(replace(problem, max_written_bytes=limit), freedoms)
    except (PlanInfeasible, ProblemError):  # what is written must be
        return free
    if is_worth_its_writes(problem, free, plan):
        return free
    return replace(plan, predicted={**plan.predicted, "spared_drives": spared(problem, limit, free)})


def _plan(problem: Problem, freedoms: Freedoms | None) -> Plan:
    found = search(problem, freedoms=freedoms)
    if found.plan is None:
        frugal = search_frugal(problem, freedoms)
        found = replace(
            frugal, bound_seconds=found.bound_seconds, num_programs=found.num_programs + frugal.num_programs
        )
    if found.plan is None or found.simulation is None or found.steady is None:
        raise infeasible(found.short)
    return with_prediction(
        problem,
        found.plan,
        found.simulation,
        bound_seconds=min(found.bound_seconds, found.simulation.step_seconds),
        solver={"name": "HiGHS", "status": "optimal", "programs": found.num_programs,
                "simulations": found.num_simulations},
        seconds_per_gb=found.steady.seconds_per_gb,
    )  # fmt: skip


def plan_any(problem: Problem) -> Plan | None:
    """A plan that fits, or None: whether there is one, at the least expense. It is the one of least memory."""
    try:
        return search_frugal(problem).plan
    except ProblemError:  # no memory would help
        return None


def search(problem: Problem, *, freedoms: Freedoms | None = None) -> Search:
    """Enumerates, solves, simulates. The result has no plan where nothing fits.

    Where a head by tiles was found best, another search keeps it whole: it may find what the tiles made room for in the
    first one to be worth less than it seemed.
    """
    found = _search(problem, freedoms)
    always = any(entry.in_tiles for entry in problem.workload.classes)
    if found.plan is None or found.plan.head_tiles is None or always:
        return found
    other = _search(problem, replace(freedoms or Freedoms(), tiles=False))
    best = min(found, other, key=lambda one: float("inf") if one.simulation is None else one.simulation.step_seconds)
    return replace(
        best,
        bound_seconds=min(found.bound_seconds, other.bound_seconds),
        num_programs=found.num_programs + other.num_programs,
        num_simulations=found.num_simulations + other.num_simulations,
    )


def _search(problem: Problem, freedoms: Freedoms | None) -> Search:
    found = Search()
    unit = floor_seconds(problem)
    candidates: list[Steady] = []
    frugal: list[Knobs] = []
    sizes: set[int] = set()
    for group in combinations(problem):
        if group and group[0].slots == 1 and group[0].cuts.chunk_tokens in sizes:
            frugal += group
            continue
        candidates += (solved := _solved(problem, group, unit, freedoms, found))
        sizes |= {steady.knobs.cuts.chunk_tokens for steady in solved}
        if len(sizes) >= MAX_CUTS:
            break
    try_in_turn(problem, candidates, unit, freedoms, found)
    promising = _promising(problem, frugal, candidates, found)
    most = MAX_SIMULATIONS if found.plan is None else MORE_SIMULATIONS
    try_in_turn(problem, _solved(problem, promising, unit, freedoms, found), unit, freedoms, found, most)
    if found.simulation is not None and found.simulation.busy_seconds["ssd_write"]:
        _spare_drives(problem, unit, freedoms, found)
    return found


def _promising(problem: Problem, frugal: list[Knobs], solved: list[Steady], found: Search) -> list[Knobs]:
    """Of combinations with one slot, those that may be faster than what was found with more of them.

    One slot leaves more memory, and is otherwise no faster: a program takes no less than with two slots, less what its
    duals say of the bytes that a slot has (weak duality).
    """
    slot, _ = slot_bytes(problem)
    with_two = {steady.knobs: steady for steady in solved if steady.knobs.slots == 2}
    promising = []
    for knobs in frugal:
        buffers = replace(knobs.buffers, host_slots=host_slots(problem, 2))
        steady = with_two.get(replace(knobs, slots=2, buffers=buffers))
        if steady is None:
            promising.append(knobs)
            continue
        freed = {"device": slot, "host": (buffers.host_slots - knobs.buffers.host_slots) * slot}
        least = steady.bound_seconds - sum(
            steady.seconds_per_gb.get(tier, 0.0) * size / GB for tier, size in freed.items()
        )
        if least < found.worth_seconds:
            promising.append(knobs)
        else:
            found.bound_seconds = min(found.bound_seconds, least)
    return promising


def _solved(
    problem: Problem, group: list[Knobs], unit: float, freedoms: Freedoms | None, found: Search
) -> list[Steady]:
    """The programs of a group that have a solution. Counts them, and takes their bounds in."""
    solved = []
    for knobs in group:
        steady = solve_steady(problem, knobs, unit_seconds=unit, freedoms=freedoms)
        found.num_programs += 1
        if steady is not None:
            solved.append(steady)
            found.bound_seconds = min(found.bound_seconds, steady.bound_seconds)
    return solved


def _spare_drives(problem: Problem, unit: float, freedoms: Freedoms | None, found: Search) -> None:
    """Takes a plan that writes a good deal less, where that costs next to no time: drives wear."""
    fastest, steady = found.simulation, found.steady
    if fastest is None or steady is None:
        return
    for price in WEAR_PRICES:
        frugal = solve_steady(problem, steady.knobs, unit_seconds=unit, freedoms=freedoms, price=price)
        found.num_programs += 1
        if frugal is None:
            return
        slow = frugal.step_seconds > (1 + WEAR_SLOWDOWN) * fastest.step_seconds
        if slow or frugal.write_seconds > WEAR_LESS * fastest.busy_seconds["ssd_write"]:
            continue
        other = Search()
        if (whole := in_whole_numbers(problem, frugal, unit, freedoms, other, price)) is not None:
            try_candidate(problem, whole, unit, freedoms, other, price=price)
        found.num_simulations += other.num_simulations
        spared = other.simulation
        if (
            spared is not None
            and spared.step_seconds <= (1 + WEAR_SLOWDOWN) * fastest.step_seconds
            and spared.busy_seconds["ssd_write"] <= WEAR_LESS * fastest.busy_seconds["ssd_write"]
        ):
            found.plan, found.simulation, found.steady = other.plan, spared, other.steady
            return
