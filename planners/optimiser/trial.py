"""Candidates of a search in turn: rounded where the runtime treats something whole, laid out, tightened, simulated.

A candidate is the solution of the program for one combination of discrete choices. Where laying it out finds a tier
too full, its capacity is tightened by the excess and the program solved again. What cannot beat the best so far by
more than `GOOD_ENOUGH`, by its bound or by what it takes in whole numbers, is never simulated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from planners.optimiser.expand import expand
from planners.optimiser.greedy import SLACK_BYTES, Shortage, host_slots, shortages
from planners.optimiser.rows import LOW_PRICE, Freedoms
from planners.optimiser.steady import Steady, solve_steady
from planners.plans.placement import DecodeScope, UpdateMode
from planners.plans.plan import Plan
from planners.problems.cost import Knobs
from planners.problems.problem import Problem
from planners.simulator.division import divided
from planners.simulator.simulate import Abandoned, Simulation, simulate
from planners.simulator.static_memory import capacities

MAX_SIMULATIONS = 10
TIGHTENINGS = 4
HARDER = 4
"""Times as much room is taken from a tier that overflows by as much as the last time, each time anew."""
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

    @property
    def worth_seconds(self) -> float:
        """What a program has to be below, to be tried."""
        return float("inf") if self.simulation is None else (1 - GOOD_ENOUGH) * self.simulation.step_seconds


def try_in_turn(
    problem: Problem,
    candidates: list[Steady],
    unit: float,
    freedoms: Freedoms | None,
    found: Search,
    num_simulations: int = MAX_SIMULATIONS,
) -> None:
    """Tries the best candidates, by so many more simulations at most."""
    most = found.num_simulations + num_simulations
    least: dict[Knobs, float] = {}

    def rounded(steady: Steady) -> Steady | None:
        knobs, fewer = steady.knobs, _with_fewer_slots(problem, steady.knobs)
        if found.num_simulations >= most or max(steady.bound_seconds, least.get(fewer, 0.0)) >= found.worth_seconds:
            return None
        whole = in_whole_numbers(problem, steady, unit, freedoms, found)
        if knobs == fewer:
            least[knobs] = float("inf") if whole is None else whole.step_seconds
        return whole

    # Stable: ties keep the order of the enumeration, simple combinations first.
    for steady in _in_turn(sorted(candidates, key=lambda s: s.step_seconds), rounded):
        if found.num_simulations >= most:
            break
        if steady.step_seconds < found.worth_seconds:
            try_candidate(problem, steady, unit, freedoms, found)


def _with_fewer_slots(problem: Problem, knobs: Knobs) -> Knobs:
    """Two slots where there are three. What more of them gain is what no program sees: one with fewer takes no longer,
    by itself, as its memory is all that differs.
    """
    slots = min(knobs.slots, 2)
    buffers = replace(knobs.buffers, swap_slots=2, host_slots=host_slots(problem, slots))
    return replace(knobs, slots=slots, buffers=buffers)


def treats_whole(problem: Problem) -> bool:
    """Whether there is anything that a program has to round."""
    workload = problem.workload
    apart = any(entry.streamed_bytes and not workload.in_ring(entry) for entry in workload.classes)
    return apart or not problem.capabilities.token_shares


def in_whole_numbers(
    problem: Problem, steady: Steady, unit: float, freedoms: Freedoms | None, found: Search, price: float = LOW_PRICE
) -> Steady | None:
    """The candidate, solved at `price`, with what has to be whole in whole numbers; None where that has no solution."""
    if not treats_whole(problem):
        return steady
    found.num_programs += 1
    return solve_steady(
        problem, steady.knobs, unit_seconds=unit, freedoms=freedoms, price=price, in_whole_numbers=True, relaxed=steady
    )


def _in_turn(candidates: list[Steady], rounded: Callable[[Steady], Steady | None]) -> Iterator[Steady]:
    """Best of each group first, then the second best: programs of one group differ by less than simulations do.

    Within a group, those with one gradient buffer and those with more take turns, and the scopes of decoding: what
    these cost is what programs see least of.
    """
    groups: dict[tuple[UpdateMode, int], dict[tuple[bool, DecodeScope], list[Steady]]] = {}
    for steady in candidates:
        knobs = steady.knobs
        group = groups.setdefault((knobs.update_mode, knobs.cuts.chunk_tokens), {})
        group.setdefault((knobs.buffers.gradient_slots == 1, knobs.decode_scope), []).append(steady)
    return _round_robin([_round_robin([_best_first(own, rounded) for own in g.values()]) for g in groups.values()])


def _best_first(candidates: list[Steady], rounded: Callable[[Steady], Steady | None]) -> Iterator[Steady]:
    """Rounded candidates, the best first: a relaxation is rounded when it comes up, and queues again by what it takes
    then, which is no less.
    """
    queue = [(steady.step_seconds, index, False, steady) for index, steady in enumerate(candidates)]
    heapify(queue)
    while queue:
        _, index, done, steady = heappop(queue)
        if done:
            yield steady
        elif (whole := rounded(steady)) is not None:
            heappush(queue, (whole.step_seconds, index, True, whole))


def _round_robin(turns: Sequence[Iterable[Steady]]) -> Iterator[Steady]:
    return (steady for turn in itertools.zip_longest(*turns) for steady in turn if steady is not None)


def try_candidate(
    problem: Problem, steady: Steady, unit: float, freedoms: Freedoms | None, found: Search, price: float = LOW_PRICE
) -> None:
    """Lays out a candidate, tightening what overflows, and simulates it; keeps it if it is the best so far."""
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    current: Steady | None = steady
    whole = treats_whole(problem)
    harder: dict[str, tuple[float, int]] = {}
    for _ in range(TIGHTENINGS):
        if current is None or current.step_seconds >= found.worth_seconds:
            return
        plan = expand(problem, current.knobs, current.fractions, planner="optimiser")
        short = shortages(divided(problem, plan), plan)
        if not short:
            break
        found.short = found.short or short
        for shortage in short:
            # Rounding and layout take their own; of a small tier less.
            slack = min(SLACK_BYTES, shortage.have_bytes / 1024)
            # Where nothing gave way the last time, only what moves as a whole is left to: push harder.
            before, factor = harder.get(shortage.tier, (0.0, 1))
            factor = HARDER * factor if shortage.need_bytes == before else 1
            harder[shortage.tier] = (shortage.need_bytes, factor)
            room[shortage.tier] -= factor * (1.05 * (shortage.need_bytes - shortage.have_bytes) + slack)
        current = solve_steady(
            problem, steady.knobs, unit_seconds=unit, freedoms=freedoms, room=room, price=price, in_whole_numbers=whole
        )
        found.num_programs += 1
    else:
        return
    found.num_simulations += 1
    best = found.simulation.step_seconds if found.simulation else float("inf")
    try:
        simulation = simulate(divided(problem, plan), plan, abandon_seconds=best)
    except Abandoned:
        return
    if simulation.step_seconds < best:
        found.plan, found.simulation, found.steady = plan, simulation, current
