"""The discrete choices that the optimiser enumerates, by size of chunk; those that cannot fit are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from planners.optimiser.greedy import (
    boundaries,
    chunk_choices,
    homes,
    host_slots,
    input_tiers,
    lookup_bytes,
    may_rest,
    room_left,
    slot_bytes,
    state_slots,
    tiled_bytes,
    update_modes,
)
from planners.plans.placement import Buffers, DecodeScope, Tier, UpdateMode
from planners.problems.cost import Knobs
from planners.problems.problem import Problem
from planners.simulator.static_memory import capacities


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
                modes(problem), (2, 3, 1), gradient_slots, swap_slots, boundaries(problem, cuts), scopes,
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


def modes(problem: Problem) -> list[UpdateMode]:
    """Modes worth trying, of those that the runtime has and clipping allows."""
    norm_first = (UpdateMode.AFTER, UpdateMode.SPECULATIVE)
    choices: tuple[tuple[UpdateMode, ...], ...] = ((*norm_first, UpdateMode.DEFERRED),)
    if not problem.workload.clips:  # where nothing waits for a norm, those two only hold gradients for longer
        choices = ((UpdateMode.BACKWARD, UpdateMode.DEFERRED), norm_first)
        if problem.capabilities.memory_steps_after:  # as AFTER does anyway; which leaves weights where they are
            choices = ((UpdateMode.BACKWARD, UpdateMode.AFTER, UpdateMode.DEFERRED), norm_first)
    allowed = update_modes(problem)
    wanted = next((found for modes in choices if (found := [m for m in modes if m in allowed])), [])
    if not wanted:
        raise ValueError("capabilities: no update mode is left that this workload can use")
    # Adapters are small: the simplest mode is as good.
    return wanted[:1] if problem.workload.pinned else wanted
