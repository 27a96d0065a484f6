"""The fixed streaming rule, which `plan="auto"` follows where no rates are known: a legal plan without a solver.

Layers stream through up to three slots from NVME, or from HOST where no drive is given. Whatever else the model has
(embedding, head, final norm) stays in DEVICE memory if the budget holds it; if not, an embedding is read by rows, and
what is multiplied streams through a slot of its own; if there is no room for that, the head streams by tiles of its
rows, a cut. Layer inputs wait in the first of DEVICE, HOST, NVME that holds them. A third slot hides the latency of one
slow read and is given up early; the second one hides every read, and is given up last. A layer's decoded weights are
held from its recompute to its backward, which saves one decode of three, where there is room for them: they are given
up first. The loss is taken in tiles that need no more memory than a layer's recompute, but of no fewer than
`MIN_CHUNK_TOKENS`, which a product needs to be efficient.

Where a layer's recompute does not fit whole, layers are recomputed by chunks of tokens, the largest that fit: a cut,
which is taken only then.

Where layers train, their weights, state and gradients stay in memory if all of that fits, whatever drives there are;
otherwise weights and state rest on NVME, gradients in HOST if they fit, and as many pieces of state are on their way at
a time as there is room for. What room is left then holds state, piece by piece, of the first blocks: their gradients
arrive last, when no computation is left to hide the drive behind. Activations are kept, and the loss is taken at once,
where that fits besides; where not, those of the last layers, as many as fit. Updates run behind the backward pass where
every step is committed. Adapters keep their optimizer state beside them; it rests in HOST or on NVME where DEVICE does
not hold it (`TrainingSizes.adapters`); a device with memory of its own steps it there, piece by piece.

Memory that may be filled and is left holds layers, and what they save (`filling`). The plans there are to choose from
are made in `attempts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from planners.errors import PlanInfeasible
from planners.plans.plan import Plan, Tier
from planners.rule.attempts import CHUNK_TOKENS, attempts, could_keep, has_enough_slots, update_mode
from planners.rule.filling import LAYERS, Fill, filled_with_layers, streamed_bytes, with_kept
from planners.rule.shortage import infeasible, shortages
from planners.rule.streaming_problem import StreamingProblem


def plan_streaming(problem: StreamingProblem, *, rest: Tier | None = None, fill: Fill = Fill.ALL) -> Plan:
    """A plan within the budgets, or `PlanInfeasible` with what is short and what would fit.

    `rest` is where weights and state rest, all of them, in place of the rule's choice. fill: what is put into memory
    that may be filled (`StreamingProblem.fills`); nothing with `rest`.
    """
    if rest is not None:
        fill = Fill.NOTHING
    rests = [Tier.HOST if problem.nvme_capacity_bytes is None else Tier.NVME]
    if problem.training is not None and not problem.training.adapters and rests[0] is Tier.NVME:
        rests.insert(0, Tier.HOST)
    if rest is not None:
        rests = [rest]
    chunks: list[int | None] = [None]
    if problem.chunked is not None:
        chunks += [tokens for tokens in CHUNK_TOKENS if tokens < problem.chunked.num_tokens]
    if problem.cuts is not None:
        chunks = [problem.cuts.chunk_tokens]
    candidates: list[Plan] = []
    for chunk_tokens in chunks:
        for tier in rests:
            for _, alike in groupby(attempts(problem, tier, chunk_tokens), key=_is_lean):
                found = _best(problem, alike, candidates, fill=fill)
                if found is not None:
                    return _filled_with_state(problem, found) if rest is None else found
    raise infeasible(problem, candidates, fits=_fits)


def _fits(problem: StreamingProblem) -> bool:
    try:
        plan_streaming(problem, fill=Fill.NOTHING)
    except PlanInfeasible:
        return False
    return True


def _is_lean(plan: Plan) -> tuple[bool, bool]:
    """What no memory for layers is bought with: tiles, which are a cut, and the slot that hides reads."""
    return plan.head_tiles is not None, any(ring.num_slots == 1 for ring in plan.rings if ring.name == LAYERS)


def _best(problem: StreamingProblem, plans: Iterator[Plan], candidates: list[Plan], *, fill: Fill) -> Plan | None:
    """The first of `plans` that fits; to `fill`, the one that streams least then, of equal ones the first. None where
    none fits; those that do not are added to `candidates`.

    What would write to a drive in each step is not taken for that, but where all else streams more than the first does
    with nothing filled. Micro-batches go together only where that streams less, for nothing is kept of them then. Where
    layers train it is the plan that keeps the activations of most, which save more than weights that stay; but layers
    that stream are fetched for all micro-batches at once where the first has them so.
    """
    trains = problem.training is not None and not problem.training.adapters
    fills = fill is not Fill.NOTHING and problem.fills
    keeps = fill is Fill.ALL and (trains or (fills and problem.chunked is not None))
    first: Plan | None = None
    best: Plan | None = None
    first_bytes = 0
    least: tuple[bool | int, ...] = ()
    for plan in plans:
        if best is not None and trains and not has_enough_slots(plan):
            break  # those that follow keep nothing
        if shortages(problem, plan):
            candidates.append(plan)
            continue
        if not (trains or fills):
            return plan
        if first is None:
            first, first_bytes = plan, 0 if trains else streamed_bytes(problem, plan)
        fillings = [with_kept] if trains and keeps and could_keep(plan) else []
        fillings += [filled_with_layers] if fills else []
        filled = plan
        for filling in reversed(fillings) if first.layer_major else fillings:
            filled = filling(problem, filled)
        found: tuple[bool | int, ...]
        if trains:
            fetched_each = first.layer_major and not filled.layer_major and bool(filled.rings)
            found = fetched_each, -len(filled.activations or ())
        else:
            num_bytes = streamed_bytes(problem, filled)
            found = num_bytes > first_bytes, _writes(problem, filled), num_bytes, filled.layer_major
        if best is None or found < least:
            best, least = filled, found
        if found in ((False, False, 0, False), (False, -len(problem.layers))):
            break
    return with_kept(problem, best) if keeps and not trains and best is not None else best


def _writes(problem: StreamingProblem, plan: Plan) -> bool:
    """Whether each step writes to a drive."""
    state, sizes = plan.state, problem.training
    on_nvme = state is not None and sizes is not None and not state.is_all_in_memory(sizes)
    return plan.layer_inputs is Tier.NVME or on_nvme


def _filled_with_state(problem: StreamingProblem, plan: Plan) -> Plan:
    """The plan with pieces of state in the memory that is left."""
    state, sizes = plan.state, problem.training
    tier, capacity = Tier.HOST, problem.host_capacity_bytes
    if problem.unified:
        tier, capacity = Tier.DEVICE, problem.device_capacity_bytes
    if state is None or sizes is None or sizes.adapters or capacity is None or state.in_memory:
        return plan
    state = state.filled(sizes, capacity - plan.predicted_bytes(tier))
    items = {**plan.peak_bytes[tier.value], **state.memory_bytes(sizes)}
    return replace(
        plan, state=state, update_mode=update_mode(problem, state), peak_bytes={**plan.peak_bytes, tier.value: items}
    )
