"""What one operation takes, and how often a step makes it. Shared by simulator, optimiser and validator.

Seconds are work over rate: products and attention at the device's matmul rate, element-wise operations at its memory
rate, NF4 decoding at its own, bytes at the links' and drives' rates. Nothing here knows how operations overlap.

[Note: chunks]
`Cuts.chunk_tokens` cuts a batch inside each block: into micro-batches of whole sequences, or, when it is less than a
sequence, into parts of one. Either way a block's weights are fetched once for all chunks. A part of a sequence needs
the sequence's keys and values; see `Cuts.attention_groups`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from planners.plans.placement import Buffers, Cuts, DecodeScope, Tier, UpdateMode
from planners.plans.plan import Plan
from planners.plans.schedule import Phase, Step, StepKind, ring_schedule, walk
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import BlockClass, Problem

FLASH_BACKWARD = 2.5
"""FLOPs of attention's backward over its forward, with scores computed again as flash attention does."""
EDGE_SLOTS = 1


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The discrete choices of a plan; what they leave open is continuous."""

    update_mode: UpdateMode
    slots: int
    """Of the ring of layers."""
    cuts: Cuts
    boundary: Tier = Tier.DEVICE
    decode_scope: DecodeScope = DecodeScope.LINEAR
    buffers: Buffers = Buffers()
    inputs: Tier | None = None
    """Where all layer inputs wait; None leaves that to the fractions."""
    weights: Tier | None = None
    """Where all weights rest that train and can stream; None leaves that to the fractions."""
    state_in_memory: bool = True
    """Whether state may rest in memory."""


def knobs_of(plan: Plan) -> Knobs:
    """The discrete choices that `plan` made. ValueError if it does not say them."""
    if plan.cuts is None:
        raise ValueError("plan: says no cuts; only a plan with classes can be simulated")
    layers = next((ring for ring in plan.rings if ring.name == "layers"), None)
    return Knobs(
        update_mode=plan.update_mode,
        slots=layers.num_slots if layers else 1,
        cuts=plan.cuts,
        boundary=plan.boundary,
        decode_scope=plan.decode_scope,
        buffers=plan.buffers,
    )


@lru_cache(maxsize=512)
def steady_ring(
    num_blocks: int, slots: int, backward: frozenset[int], mutable: bool, *, later: bool = False
) -> tuple[Step, ...]:
    """What a ring does for one micro-batch of a step of a steady state: for the first one, or for a later one.

    Frozen blocks stay in their slots over the end of a step; blocks that were updated are stale and fetched anew.
    Either stay over the end of a micro-batch.
    """
    visits = walk(num_blocks, training=True, backward=backward)
    slots = min(slots, num_blocks)
    resident: frozenset[int] = frozenset()
    steps = ring_schedule(visits, slots, resident)
    while later or not mutable:
        here = set(resident)
        for step in steps:
            if step.kind is StepKind.FETCH:
                here.add(step.block)
            elif step.kind is StepKind.RELEASE:
                here.discard(step.block)
        if frozenset(here) == resident:
            break
        resident = frozenset(here)
        steps = ring_schedule(visits, slots, resident)
    return steps


@dataclass(frozen=True)
class RingWalk:
    """One ring of a workload: whose blocks, in which order, and what it does for each micro-batch of a steady step."""

    name: str
    members: tuple[tuple[int, int], ...]
    """For each block of the ring, in order: class, and number within the class."""
    steps: tuple[Step, ...]
    """For the first one."""
    later_steps: tuple[Step, ...]
    """For each of the others."""


def ring_walks(problem: Problem, slots: int) -> tuple[RingWalk, ...]:
    """The rings: layers through `slots` slots, embedding and head through one, if not by rows or tiles."""
    workload, classes = problem.workload, problem.workload.classes
    rings = []
    for name, is_layer, num_slots in (("layers", True, slots), ("edges", False, EDGE_SLOTS)):
        members = sorted(
            (position, c, k)
            for c, entry in enumerate(classes)
            for k, position in enumerate(entry.positions)
            if entry.is_layer is is_layer and workload.in_ring(entry)
        )
        if members:
            backward = frozenset(i for i, (_, c, _) in enumerate(members) if classes[c].visits_backward)
            steps, later = (
                steady_ring(len(members), num_slots, backward, workload.mutable, later=later) for later in (False, True)
            )
            rings.append(RingWalk(name, tuple((c, k) for _, c, k in members), steps, later))
    return tuple(rings)


def fetch_counts(problem: Problem, slots: int, *, later: bool = False) -> list[tuple[int, int]]:
    """For each class, how many fetches of its blocks the first micro-batch of a steady step makes, or a later one, for
    forward and for backward visits.
    """
    counts = [[0, 0] for _ in problem.workload.classes]
    for ring in ring_walks(problem, slots):
        steps = ring.later_steps if later else ring.steps
        for index, step in enumerate(steps):
            if step.kind is StepKind.FETCH:
                use = next(s for s in steps[index:] if s.kind is StepKind.COMPUTE and s.block == step.block)
                counts[ring.members[step.block][0]][use.phase is Phase.BACKWARD] += 1
    return [(forward, backward) for forward, backward in counts]


def num_chunks(problem: Problem, cuts: Cuts) -> int:
    """In how many parts a micro-batch goes through a block."""
    whole = problem.workload.tokens if problem.capabilities.batch_cuts else problem.workload.seq_len
    return -(-whole // cuts.chunk_tokens)


def tokens_at_once(problem: Problem, cuts: Cuts) -> int:
    """Tokens that go through a block together, at most."""
    rows = 1 if problem.capabilities.batch_cuts else problem.workload.batch_size
    return min(rows * cuts.chunk_tokens, problem.workload.tokens)


def in_a_chunk(problem: Problem, cuts: Cuts, num_tokens: float) -> float:
    """Of `num_tokens` of every sequence that are treated alike, those that one chunk has, at most."""
    if problem.capabilities.token_shares:
        return problem.workload.batch_size * num_tokens / num_chunks(problem, cuts)
    return problem.workload.batch_size * min(num_tokens, cuts.chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class ClassCost:
    """Seconds on the device for one block of a class and all tokens of a pass."""

    forward_seconds: float
    backward_seconds: float
    """Without recomputation."""
    forward_attention_seconds: float
    """Part of `forward_seconds`."""
    backward_attention_seconds: float
    recompute_seconds: tuple[float, ...]
    """For each saved tensor, if all of its tokens are computed again."""
    swap_seconds: tuple[tuple[float, float], ...]
    """For each saved tensor, if all of its tokens are swapped: what computes is held up by, in forward and backward."""
    drive_seconds: tuple[tuple[float, float], ...]
    """More of it, if all of them are swapped to NVMe."""
    spill_bytes: tuple[float, float]
    """What attention in groups moves each way between DEVICE and HOST, in forward and in backward."""


@lru_cache(maxsize=64)
def class_costs(problem: Problem, cuts: Cuts, decode_scope: DecodeScope) -> tuple[ClassCost, ...]:
    """The costs of every class under these cuts."""
    return tuple(_class_cost(problem, entry, cuts, decode_scope) for entry in problem.workload.classes)


def _class_cost(problem: Problem, entry: BlockClass, cuts: Cuts, decode_scope: DecodeScope) -> ClassCost:
    if entry.measured is not None:
        return _measured_cost(problem, entry, entry.measured.times(problem.workload.together), cuts, decode_scope)
    device, tokens = problem.hardware.device, problem.workload.pass_tokens
    chunks = problem.workload.together * num_chunks(problem, cuts)
    matmul, memory = device.matmul_flops_per_second, device.memory_bytes_per_second
    attention = tokens * entry.attention_flops / matmul
    attention_forward = attention / device.attention_forward_efficiency
    attention_backward = FLASH_BACKWARD * attention / device.attention_backward_efficiency
    decode = entry.decoded_bytes / device.nf4_decode_bytes_per_second
    decodes = _decodes(decode_scope, chunks)
    fixed = chunks * device.operation_seconds
    spill = (0.0, 0.0)
    if cuts.attention_groups > 1 and entry.attention_bytes:
        spill = (tokens * entry.attention_bytes, 2 * tokens * entry.attention_bytes)
    backward = 0.0
    if entry.visits_backward or entry.trainable_params:
        backward = tokens * (entry.backward_flops / matmul + 2 * entry.moved_bytes / memory)
        backward += attention_backward + decodes[1] * decode + fixed
    return ClassCost(
        forward_seconds=tokens * (entry.forward_flops / matmul + entry.moved_bytes / memory)
        + attention_forward
        + decodes[0] * decode
        + fixed,
        backward_seconds=backward,
        forward_attention_seconds=attention_forward,
        backward_attention_seconds=attention_backward,
        recompute_seconds=tuple(
            tokens * (saved.flops_per_token / matmul + saved.moved_bytes_per_token / memory)
            + (attention_forward if saved.is_attention else 0.0)
            for saved in entry.saved
        ),
        swap_seconds=((0.0, 0.0),) * len(entry.saved),
        drive_seconds=((0.0, 0.0),) * len(entry.saved),
        spill_bytes=spill,
    )


def _decodes(scope: DecodeScope, chunks: int) -> tuple[int, int]:
    """How often weights are decoded in forward, and in backward with what it computes again.

    LINEAR decodes for every product of every chunk, and once more for what is computed again.
    """
    return (1, 1) if scope is DecodeScope.LAYER else (chunks, 2 * chunks)


def _measured_cost(
    problem: Problem, entry: BlockClass, seconds: MeasuredSeconds, cuts: Cuts, scope: DecodeScope
) -> ClassCost:
    """What was measured is of the whole batch, cut as it was then. ValueError for what that says nothing about.

    Where a block can keep what it saves, that is the base, and the price of computing it again is what both passes take
    more then; of groups, each has its part of it.
    """
    again = [saved.recomputable for saved in entry.saved]
    chunks = num_chunks(problem, cuts) if entry.is_layer else 1
    timed = 1 if seconds.chunks is None else num_chunks(problem, Cuts(chunk_tokens=seconds.chunks.num_tokens))
    if chunks != timed or cuts.attention_groups > 1:
        how = "whole" if timed == 1 else f"in {timed} chunks"
        raise ValueError(f"{entry.name!r}: its seconds were measured {how}, and say nothing of {cuts}")
    kept = seconds.kept
    groups = () if kept is None else kept.groups
    if sum(again) != (len(groups) or (kept is not None)):
        raise ValueError(f"{entry.name!r}: {sum(again)} of what it saves is computed again, at other prices")
    decodes = _decodes(scope, chunks)
    whole = ClassCost(
        forward_seconds=seconds.forward + decodes[0] * seconds.decode,
        backward_seconds=seconds.backward + decodes[1] * seconds.decode if entry.visits_backward else 0.0,
        forward_attention_seconds=0.0,
        backward_attention_seconds=0.0,
        recompute_seconds=(0.0,) * len(again),
        swap_seconds=((0.0, 0.0),) * len(again),
        drive_seconds=((0.0, 0.0),) * len(again),
        spill_bytes=(0.0, 0.0),
    )
    if kept is None:
        return whole
    forward, backward = kept.forward + decodes[0] * seconds.decode, kept.backward + decodes[0] * seconds.decode
    price = max(0.0, whole.forward_seconds + whole.backward_seconds - forward - backward)
    all_groups = sum(group.again for group in groups)
    prices = iter([price * (g.again / all_groups if all_groups else 1 / len(groups)) for g in groups] or [price])
    sizes = iter([group.num_bytes / kept.saved_bytes for group in groups] or [1.0])
    swaps = [next(sizes) if is_again else 0.0 for is_again in again]
    return replace(
        whole,
        forward_seconds=forward,
        backward_seconds=backward,
        recompute_seconds=tuple(next(prices) if is_again else 0.0 for is_again in again),
        swap_seconds=tuple((share * kept.put_away, share * kept.taken_back) for share in swaps),
        drive_seconds=tuple((share * kept.put_on_drive, share * kept.taken_off_drive) for share in swaps),
    )


def held_up_seconds(cost: ClassCost, j: int, phase: int, nvme: float, host: float) -> float:
    """For which swapping keeps a block from computing in forward (0) or backward (1), of shares of saved tensor `j`."""
    return cost.swap_seconds[j][phase] * (host + nvme) + cost.drive_seconds[j][phase] * nvme


def tiles_again_seconds(problem: Problem, entry: BlockClass) -> float:
    """What a head takes longer by tiles: its logits are computed twice."""
    if entry.measured is not None:
        return problem.workload.together * entry.measured.product
    return problem.workload.pass_tokens * entry.forward_flops / problem.hardware.device.matmul_flops_per_second
