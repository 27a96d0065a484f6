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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from planners.cost import Knobs
from planners.division import divided
from planners.errors import PlanInfeasible
from planners.expand import expand, with_prediction
from planners.greedy import (
    SLACK_BYTES,
    Shortage,
    boundaries,
    chunk_choices,
    homes,
    host_slots,
    infeasible,
    input_tiers,
    lookup_bytes,
    may_rest,
    room_left,
    shortages,
    slot_bytes,
    state_slots,
    tiled_bytes,
)
from planners.placement import Buffers, DecodeScope, Tier, UpdateMode
from planners.plan import Plan
from planners.problem import Problem
from planners.rows import GB, LOW_PRICE, Freedoms
from planners.simulate import Abandoned, Simulation, simulate
from planners.static_memory import capacities
from planners.steady import SHORTAGE_PRICES, Steady, solve_steady
from planners.step_work import floor_seconds
from planners.units import PAGE_BYTES, ProblemError
from planners.wear import default_limit_bytes, is_worth_its_writes, spared

MAX_SIMULATIONS = 10
MORE_SIMULATIONS = 4
"""Of combinations with one slot, where there is a plan with more."""
MAX_CUTS = 3
"""Sizes of chunks that are compared, of those that fit."""
TIGHTENINGS = 4
HARDER = 4
"""Times as much room is taken from a tier that overflows by as much as the last time, each time anew."""
GOOD_ENOUGH = 0.002
"""Gap at which the search ends."""
WEAR_PRICES = (1.0, 0.3, 0.1, 0.03, 0.01)
WEAR_SLOWDOWN = 0.02
WEAR_LESS = 0.75
"""A plan may be so much slower than the fastest if it writes at most this share of what that writes."""


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
    if found.plan is None or found.simulation is None or found.steady is None:
        raise infeasible(found.short or smallest_shortage(problem, freedoms))
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
    """The first plan of the enumeration that fits, or None: whether there is one, at the least expense."""
    unit = floor_seconds(problem)
    for knobs in itertools.chain.from_iterable(combinations(problem)):
        steady = solve_steady(problem, knobs, unit_seconds=unit)
        if steady is None:
            continue
        found = Search()
        if (whole := _in_whole_numbers(problem, steady, unit, None, found)) is not None:
            _try(problem, whole, unit, None, found)
        if found.plan is not None:
            return found.plan
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
    _try_in_turn(problem, candidates, unit, freedoms, found)
    promising = _promising(problem, frugal, candidates, found)
    most = MAX_SIMULATIONS if found.plan is None else MORE_SIMULATIONS
    _try_in_turn(problem, _solved(problem, promising, unit, freedoms, found), unit, freedoms, found, most)
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


def _try_in_turn(
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
        whole = _in_whole_numbers(problem, steady, unit, freedoms, found)
        if knobs == fewer:
            least[knobs] = float("inf") if whole is None else whole.step_seconds
        return whole

    # Stable: ties keep the order of the enumeration, simple combinations first.
    for steady in _in_turn(sorted(candidates, key=lambda s: s.step_seconds), rounded):
        if found.num_simulations >= most:
            break
        if steady.step_seconds < found.worth_seconds:
            _try(problem, steady, unit, freedoms, found)


def _with_fewer_slots(problem: Problem, knobs: Knobs) -> Knobs:
    """Two slots where there are three. What more of them gain is what no program sees: one with fewer takes no longer,
    by itself, as its memory is all that differs.
    """
    slots = min(knobs.slots, 2)
    buffers = replace(knobs.buffers, swap_slots=2, host_slots=host_slots(problem, slots))
    return replace(knobs, slots=slots, buffers=buffers)


def _treats_whole(problem: Problem) -> bool:
    """Whether there is anything that a program has to round."""
    workload = problem.workload
    apart = any(entry.stored_bytes and not workload.in_ring(entry) for entry in workload.classes)
    return apart or not problem.capabilities.token_shares


def _in_whole_numbers(
    problem: Problem, steady: Steady, unit: float, freedoms: Freedoms | None, found: Search, price: float = LOW_PRICE
) -> Steady | None:
    """The candidate with what has to be whole in whole numbers; None where that has no solution."""
    if not _treats_whole(problem):
        return steady
    found.num_programs += 1
    return solve_steady(problem, steady.knobs, unit_seconds=unit, freedoms=freedoms, price=price, in_whole_numbers=True)


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
        if (whole := _in_whole_numbers(problem, frugal, unit, freedoms, other, price)) is not None:
            _try(problem, whole, unit, freedoms, other, price=price)
        found.num_simulations += other.num_simulations
        spared = other.simulation
        if (
            spared is not None
            and spared.step_seconds <= (1 + WEAR_SLOWDOWN) * fastest.step_seconds
            and spared.busy_seconds["ssd_write"] <= WEAR_LESS * fastest.busy_seconds["ssd_write"]
        ):
            found.plan, found.simulation, found.steady = other.plan, spared, other.steady
            return


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


def _try(
    problem: Problem, steady: Steady, unit: float, freedoms: Freedoms | None, found: Search, price: float = LOW_PRICE
) -> None:
    """Lays out a candidate, tightening what overflows, and simulates it; keeps it if it is the best so far."""
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    current: Steady | None = steady
    whole = _treats_whole(problem)
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


def combinations(problem: Problem) -> Iterator[list[Knobs]]:
    """The discrete choices, by size of chunk, coarse ones first; those that cannot fit are left out."""
    workload = problem.workload
    scopes = [DecodeScope.LINEAR]
    if any(entry.decoded_bytes for entry in workload.classes):
        scopes.append(DecodeScope.LAYER)
    gradient_slots: tuple[int, ...] = (2, 3, 1) if workload.mutable else (2,)
    if problem.capabilities.whole_weights:  # there are places of weights to try instead
        gradient_slots = tuple(slots for slots in gradient_slots if slots < 3)
    swap_slots = (2,) if workload.mutable else (2, 3)
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    by_size = itertools.groupby(chunk_choices(problem), key=lambda cuts: cuts.chunk_tokens)
    for _, group in by_size:
        own = [
            knobs
            for cuts in group
            for mode, slots, gradients, swaps, boundary, scope, inputs, (weights, in_memory), states in
            itertools.product(
                _modes(problem), (2, 3, 1), gradient_slots, swap_slots, boundaries(problem, cuts), scopes,
                input_tiers(problem), homes(problem), state_slots(problem),
            )
            if may_rest(problem, mode, weights, in_memory) and _has_use(problem, slots, weights) and _may_fit(
                problem,
                knobs := Knobs(
                    update_mode=mode, slots=slots, cuts=cuts, boundary=boundary, decode_scope=scope,
                    buffers=Buffers(
                        host_slots=host_slots(problem, slots), swap_slots=swaps, gradient_slots=gradients,
                        state_slots=states,
                    ),
                    inputs=inputs, weights=weights, state_in_memory=in_memory,
                ),
                room,
            )
        ]  # fmt: skip
        # One slot serves only where two do not fit.
        yield [knobs for knobs in own if knobs.slots > 1]
        yield [knobs for knobs in own if knobs.slots == 1]


def _has_use(problem: Problem, slots: int, weights: Tier | None) -> bool:
    """False for a number of slots that nothing streams through; there are two then."""
    frozen = any(entry.streamed_bytes and not entry.trainable_params for entry in problem.workload.classes)
    return slots == 2 or weights is not Tier.DEVICE or frozen


def _may_fit(problem: Problem, knobs: Knobs, room: dict[str, float]) -> bool:
    """False if not even a plan that streams everything fits; with all weights resident it may still."""
    left = room_left(problem, knobs, room)
    slot, edge = slot_bytes(problem)
    slack = knobs.slots * slot + edge + max(lookup_bytes(problem).values()) + tiled_bytes(problem)
    return left["device"] + slack >= 0 and left["host"] + 2 * slack >= 0


def _modes(problem: Problem) -> list[UpdateMode]:
    """Modes worth trying, of those that the runtime has and clipping allows."""
    norm_first = (UpdateMode.AFTER, UpdateMode.SPECULATIVE)
    choices: tuple[tuple[UpdateMode, ...], ...] = ((*norm_first, UpdateMode.DEFERRED),)
    if not problem.workload.clips:  # where nothing waits for a norm, those two only hold gradients for longer
        choices = ((UpdateMode.BACKWARD, UpdateMode.DEFERRED), norm_first)
        if problem.capabilities.memory_steps_after:  # as AFTER does anyway; which leaves weights where they are
            choices = ((UpdateMode.BACKWARD, UpdateMode.AFTER, UpdateMode.DEFERRED), norm_first)
    allowed = problem.capabilities.update_modes
    wanted = next((found for modes in choices if (found := [m for m in modes if m in allowed])), [])
    if not wanted:
        raise ValueError("capabilities: no update mode is left that this workload can use")
    # Adapters are small: the simplest mode is as good.
    return wanted[:1] if problem.workload.pinned else wanted


def smallest_shortage(problem: Problem, freedoms: Freedoms | None = None) -> list[Shortage]:
    """What is short in the combination that comes closest, where no program has a solution at all: with a page of each
    tier for what rounding takes, so that nothing is short by less than the solver can tell from nothing.

    Raises `ProblemError` where no memory would help.
    """
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    without_page = {tier: size - PAGE_BYTES for tier, size in room.items()}
    best: tuple[float, list[Shortage]] | None = None
    mode = _modes(problem)[0]
    buffers = Buffers(host_slots=host_slots(problem, 1), gradient_slots=1, state_slots=state_slots(problem)[-1])
    for cuts in chunk_choices(problem):
        for boundary, (weights, in_memory) in itertools.product(boundaries(problem, cuts), homes(problem)):
            if not may_rest(problem, mode, weights, in_memory):
                continue
            knobs = Knobs(
                update_mode=mode, slots=1, cuts=cuts, boundary=boundary, buffers=buffers, weights=weights,
                state_in_memory=in_memory,
            )  # fmt: skip
            closest = solve_steady(
                problem, knobs, unit_seconds=floor_seconds(problem), freedoms=freedoms, room=without_page, elastic=True
            )
            if closest is None:
                continue
            missing = {tier: size for tier, size in closest.short_bytes.items() if size > PAGE_BYTES}
            missing = missing or {"device": float(PAGE_BYTES)}  # nothing but what rounding takes
            short = [Shortage(tier, room[tier] + size, room[tier], "backward") for tier, size in missing.items()]
            lack = sum(SHORTAGE_PRICES[tier] * size for tier, size in missing.items())
            if short and (best is None or lack < best[0]):
                best = (lack, short)
    if best is None and problem.max_written_bytes is not None:
        raise ProblemError(
            f"max_written: no plan writes as little as {problem.max_written_bytes} bytes a step, whatever the memory"
        )
    if best is None:
        raise ProblemError("policy: leaves no place for something that this machine has to hold")
    return best[1]
