"""The steps that planner, simulator and executor share, and how a streamed ring of blocks is walked.

A ring is a set of equal slots through which more blocks pass than it has slots. Given the order in which blocks will
compute, `ring_schedule` says when each is fetched and when it is released. It is Belady's rule, run ahead of time:
as soon as a slot can be had, the block that is needed soonest among the absent ones is fetched, and a resident block
gives way only to one that is needed sooner. For whole passes that is Belady's optimum; for an arbitrary order,
fetching early may cost a fetch more. For one micro-batch of a training step over blocks 0..4 with 2 slots:

    fetch 0 1 | compute 0, release 0, fetch 2 | compute 1, release 1, fetch 3 | ... forward
    compute 4 backward, release 4, fetch 2 | ... | compute 0            (3 and 4 are still there: nothing is fetched)

so that in a steady state each micro-batch moves 2 * (blocks - slots) blocks, and begins where the last one ended.
Times and bytes are not here: see the simulator. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache


class StepKind(str, Enum):
    """What a step does."""

    FETCH = "fetch"
    """Start bringing a block into a slot; does not block."""
    COMPUTE = "compute"
    """Wait until the block is resident, then run its forward or backward."""
    RELEASE = "release"
    """Give the block's slot back once nothing uses it."""


class Phase(str, Enum):
    """Which pass a COMPUTE belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Step:
    """One step of a schedule. `block` is an index into the ring's blocks; `phase` is None but for COMPUTE."""

    kind: StepKind
    block: int
    phase: Phase | None = None


@dataclass(frozen=True)
class Visit:
    """One computation on a block, in the order in which they will happen."""

    block: int
    phase: Phase


def walk(
    num_blocks: int,
    *,
    training: bool,
    start: Visit | None = None,
    backward: frozenset[int] | None = None,
) -> tuple[Visit, ...]:
    """The visits of one micro-batch: all blocks forward, then, when training, all in reverse.

    `start` begins in the middle (a resumed, skipped or repeated pass). `backward` names the blocks that are visited
    again in the backward pass; None is all of them (an embedding, for one, is not).
    """
    forward = [Visit(index, Phase.FORWARD) for index in range(num_blocks)]
    reverse = [
        Visit(index, Phase.BACKWARD) for index in reversed(range(num_blocks)) if backward is None or index in backward
    ]
    if start is None:
        return tuple(forward + reverse if training else forward)
    if start.phase is Phase.BACKWARD:
        return tuple(visit for visit in reverse if visit.block <= start.block)
    rest = [visit for visit in forward if visit.block >= start.block]
    return tuple(rest + reverse if training else rest)


@lru_cache(maxsize=256)
def ring_schedule(
    visits: tuple[Visit, ...],
    num_slots: int,
    resident: frozenset[int] = frozenset(),
    then: tuple[int, ...] = (),
) -> tuple[Step, ...]:
    """When to fetch and release so that `visits` run in order through `num_slots` slots.

    `resident` is what lies in the slots before the first step. `then` lists blocks that will be wanted after the last
    visit (the next token's forward, say): they are fetched as slots fall free, but never computed here.
    A block released and fetched again is counted as often as it is fetched. Deterministic.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots: must be at least 1, got {num_slots}")
    if len(resident) > num_slots:
        raise ValueError(f"resident: {len(resident)} blocks in {num_slots} slots")
    order = [visit.block for visit in visits] + list(then)
    never = len(order)
    in_slots = set(resident)
    steps: list[Step] = []

    def next_use(block: int, position: int) -> int:
        return next((i for i in range(position, len(order)) if order[i] == block), never)

    def prefetch(position: int) -> None:
        """Fetches all that is worth fetching before the visit at `position`."""
        for candidate in dict.fromkeys(order[position:]):
            if candidate in in_slots:
                continue
            if len(in_slots) >= num_slots:
                victim = max(in_slots, key=lambda block: (next_use(block, position), block))
                if next_use(victim, position) <= next_use(candidate, position):
                    return
                in_slots.remove(victim)
                steps.append(Step(StepKind.RELEASE, victim))
            in_slots.add(candidate)
            steps.append(Step(StepKind.FETCH, candidate))

    prefetch(0)
    for position, visit in enumerate(visits):
        steps.append(Step(StepKind.COMPUTE, visit.block, visit.phase))
        prefetch(position + 1)
    return tuple(steps)


def num_fetches(steps: tuple[Step, ...]) -> int:
    """How many blocks `steps` bring in."""
    return sum(step.kind is StepKind.FETCH for step in steps)
