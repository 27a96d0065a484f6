"""The optimiser: linear programs inside an enumeration of discrete choices, ranked by the simulator.

Update mode, ring slots, chunks, buffers, decode scope and where activations wait between layers are enumerated; for
each combination `steady` gives the best fractions and a bound. The best few are simulated; where a simulation finds a
tier too full, its capacity is tightened by the excess and the program solved again. A combination whose bound is
already beaten is never simulated. Nothing depends on the clock: the same problem gives the same plan.

The lower bound that is reported is the least of all combinations' bounds: none of the plans that can be said within
the enumeration takes less.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from planners.cost import Knobs, capacities
from planners.expand import expand, with_prediction
from planners.greedy import SLACK_BYTES, Shortage, boundaries, chunk_choices, infeasible, room_left, shortages
from planners.placement import Buffers, Cuts, DecodeScope, UpdateMode
from planners.plan import Plan
from planners.problem import Problem
from planners.simulate import Abandoned, Simulation, simulate
from planners.steady import Freedoms, Steady, solve_steady
from planners.validate import floor_seconds

MAX_SIMULATIONS = 10
MAX_CUTS = 3
TIGHTENINGS = 4
GOOD_ENOUGH = 0.002
"""Gap at which the search ends."""


@dataclass
class Search:
    """What a search did, and found."""

    plan: Plan | None = None
    simulation: Simulation | None = None
    steady: Steady | None = None
    bound_seconds: float = float("inf")
    num_programs: int = 0
    num_simulations: int = 0
    short: list[Shortage] = field(default_factory=list)


def plan_optimal(problem: Problem, *, freedoms: Freedoms | None = None) -> Plan:
    """The best plan found, with its bound. `PlanInfeasible` where none fits; raises `SolverMissing`, `SolverFailed`."""
    found = search(problem, freedoms=freedoms)
    if found.plan is None or found.simulation is None or found.steady is None:
        raise infeasible(found.short or smallest_shortage(problem))
    return with_prediction(
        problem,
        found.plan,
        found.simulation,
        bound_seconds=min(found.bound_seconds, found.simulation.step_seconds),
        solver={"name": "HiGHS", "status": "optimal", "programs": found.num_programs,
                "simulations": found.num_simulations},
        seconds_per_gb=found.steady.seconds_per_gb,
    )  # fmt: skip


def search(problem: Problem, *, freedoms: Freedoms | None = None) -> Search:
    """Enumerates, solves, simulates. The result has no plan where nothing fits."""
    found = Search()
    unit = floor_seconds(problem)
    candidates: list[Steady] = []
    for knobs in combinations(problem):
        steady = solve_steady(problem, knobs, unit_seconds=unit, freedoms=freedoms)
        found.num_programs += 1
        if steady is not None:
            candidates.append(steady)
            found.bound_seconds = min(found.bound_seconds, steady.bound_seconds)
    # Stable: ties keep the order of the enumeration, simple combinations first.
    for steady in _in_turn(sorted(candidates, key=lambda s: s.step_seconds)):
        best = found.simulation.step_seconds if found.simulation else float("inf")
        if found.num_simulations >= MAX_SIMULATIONS:
            break
        if steady.bound_seconds < best * (1 - GOOD_ENOUGH):
            _try(problem, steady, unit, freedoms, found)
    return found


def _in_turn(candidates: list[Steady]) -> list[Steady]:
    """Best of each group first, then the second best: programs of one group differ by less than simulations do."""
    groups: dict[tuple[UpdateMode, int], list[Steady]] = {}
    for steady in candidates:
        groups.setdefault((steady.knobs.update_mode, steady.knobs.cuts.chunk_tokens), []).append(steady)
    rounds = itertools.zip_longest(*groups.values())
    return [steady for turn in rounds for steady in turn if steady is not None]


def _try(problem: Problem, steady: Steady, unit: float, freedoms: Freedoms | None, found: Search) -> None:
    """Simulates a candidate, tightening what overflows; keeps it if it is the best so far."""
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    current: Steady | None = steady
    for _ in range(TIGHTENINGS):
        if current is None:
            return
        plan = expand(problem, current.knobs, current.fractions, planner="optimiser")
        found.num_simulations += 1
        try:
            best = found.simulation.step_seconds if found.simulation else float("inf")
            simulation = simulate(problem, plan, abandon_seconds=best)
        except Abandoned:
            return
        short = shortages(problem, simulation)
        if not short:
            if found.simulation is None or simulation.step_seconds < found.simulation.step_seconds:
                found.plan, found.simulation, found.steady = plan, simulation, current
            return
        found.short = found.short or short
        for shortage in short:
            room[shortage.tier] -= 1.05 * (shortage.need_bytes - shortage.have_bytes) + SLACK_BYTES
        current = solve_steady(problem, steady.knobs, unit_seconds=unit, freedoms=freedoms, room=room)
        found.num_programs += 1


def combinations(problem: Problem) -> list[Knobs]:
    """The discrete choices, the simple ones first; those that cannot fit are left out."""
    workload = problem.workload
    scopes = [DecodeScope.LINEAR]
    if any(entry.decoded_bytes for entry in workload.classes):
        scopes.append(DecodeScope.LAYER)
    gradient_slots = (2, 3, 1) if workload.mutable else (2,)
    swap_slots = (2,) if workload.mutable else (2, 3)
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    found: list[Knobs] = []
    num_cuts = 0
    last: Cuts | None = None
    for cuts in chunk_choices(problem):
        if num_cuts >= MAX_CUTS and (last is None or cuts.chunk_tokens != last.chunk_tokens):
            break
        own = [
            knobs
            for mode, slots, gradients, swaps, boundary, scope in itertools.product(
                _modes(problem), (2, 3, 1), gradient_slots, swap_slots, boundaries(problem, cuts), scopes
            )
            if _may_fit(
                problem,
                knobs := Knobs(
                    update_mode=mode, slots=slots, cuts=cuts, boundary=boundary, decode_scope=scope,
                    buffers=Buffers(gradient_slots=gradients, swap_slots=swaps),
                ),
                room,
            )
        ]  # fmt: skip
        # One slot serves only where two do not fit.
        roomy = [knobs for knobs in own if knobs.slots > 1]
        found += roomy or own
        if own and (last is None or cuts.chunk_tokens != last.chunk_tokens):
            num_cuts += 1
            last = cuts
    return found


def _may_fit(problem: Problem, knobs: Knobs, room: dict[str, float]) -> bool:
    """False if not even a plan that streams everything fits; with all weights resident it may still."""
    left = room_left(problem, knobs, room)
    slack = knobs.slots * max(e.stored_bytes for e in problem.workload.classes if e.is_layer)
    slack += max(e.stored_bytes for e in problem.workload.classes if not e.is_layer)
    return left["device"] + slack >= 0 and left["host"] + 2 * slack >= 0


def _modes(problem: Problem) -> list[UpdateMode]:
    """Modes worth trying, of those that the runtime has and clipping allows."""
    norm_first = (UpdateMode.AFTER, UpdateMode.SPECULATIVE)
    choices: tuple[tuple[UpdateMode, ...], ...] = ((*norm_first, UpdateMode.DEFERRED),)
    if not problem.workload.clips:  # where nothing waits for a norm, those two only hold gradients for longer
        choices = ((UpdateMode.BACKWARD, UpdateMode.DEFERRED), norm_first)
    allowed = problem.capabilities.update_modes
    wanted = next((found for modes in choices if (found := [m for m in modes if m in allowed])), [])
    if not wanted:
        raise ValueError("capabilities: no update mode is left that this workload can use")
    # Adapters are small: the simplest mode is as good.
    return wanted[:1] if problem.workload.pinned else wanted


def smallest_shortage(problem: Problem) -> list[Shortage]:
    """What is short in the combination that comes closest, where no program has a solution at all."""
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    best: tuple[float, list[Shortage]] | None = None
    for cuts in chunk_choices(problem):
        for boundary in boundaries(problem, cuts):
            knobs = Knobs(
                update_mode=_modes(problem)[0], slots=1, cuts=cuts, boundary=boundary, buffers=Buffers(gradient_slots=1)
            )
            left = room_left(problem, knobs, room)
            short = [Shortage(t, room[t] - size, room[t], "backward") for t, size in left.items() if size < 0]
            lack = sum(s.need_bytes - s.have_bytes for s in short)
            if short and (best is None or lack < best[0]):
                best = (lack, short)
    if best is not None:
        return best[1]
    # The fixed part fits; what rests does not: all tiers together are too small.
    workload = problem.workload
    need = float(sum(e.count * e.stored_bytes for e in workload.classes))
    need += workload.state_bytes_per_param * workload.trainable_params * (2 if workload.commit_every else 1)
    need += sum(e.count * e.saved[0].bytes_per_token for e in workload.classes if e.saved) * workload.tokens
    tier = "nvme" if problem.hardware.drives else ("device" if problem.hardware.unified else "host")
    return [Shortage(tier, max(need, room[tier] + 1), room[tier], "step")]
