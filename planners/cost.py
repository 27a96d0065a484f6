"""What one operation takes, and what lies in memory all the time. Shared by simulator, optimiser and validator.

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

from planners.placement import Buffers, ClassPlan, Cuts, DecodeScope, Tier, UpdateMode, UpdatePlace
from planners.plan import Plan
from planners.problem import BlockClass, MeasuredSeconds, Problem
from planners.schedule import Phase, Step, StepKind, ring_schedule, walk
from planners.trace import ITEM_BYTES

FLASH_BACKWARD = 2.5
"""FLOPs of attention's backward over its forward, with scores computed again as flash attention does."""
EDGE_SLOTS = 1
BUCKET_PARAMS = 128 * 10**6
MAX_BUCKETS = 8


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
def steady_ring(num_blocks: int, slots: int, backward: frozenset[int], mutable: bool) -> tuple[Step, ...]:
    """What a ring does in one step of a steady state.

    Frozen blocks stay in their slots over the end of a step; blocks that were updated are stale and fetched anew.
    """
    visits = walk(num_blocks, training=True, backward=backward)
    slots = min(slots, num_blocks)
    resident: frozenset[int] = frozenset()
    steps = ring_schedule(visits, slots, resident)
    while not mutable:
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
    """One ring of a workload: whose blocks, in which order, and its steady step."""

    name: str
    members: tuple[tuple[int, int], ...]
    """For each block of the ring, in order: class, and number within the class."""
    steps: tuple[Step, ...]


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
            steps = steady_ring(len(members), num_slots, backward, workload.mutable)
            rings.append(RingWalk(name, tuple((c, k) for _, c, k in members), steps))
    return tuple(rings)


def fetch_counts(problem: Problem, slots: int) -> list[tuple[int, int]]:
    """For each class, how many fetches of its blocks a steady step makes for forward and for backward visits."""
    counts = [[0, 0] for _ in problem.workload.classes]
    for ring in ring_walks(problem, slots):
        for index, step in enumerate(ring.steps):
            if step.kind is StepKind.FETCH:
                use = next(s for s in ring.steps[index:] if s.kind is StepKind.COMPUTE and s.block == step.block)
                counts[ring.members[step.block][0]][use.phase is Phase.BACKWARD] += 1
    return [(forward, backward) for forward, backward in counts]


def num_chunks(problem: Problem, cuts: Cuts) -> int:
    """In how many parts a batch goes through a block."""
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
    """Seconds on the device for one block of a class and all tokens of a step."""

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
    spill_bytes: tuple[float, float]
    """What attention in groups moves each way between DEVICE and HOST, in forward and in backward."""


@lru_cache(maxsize=64)
def class_costs(problem: Problem, cuts: Cuts, decode_scope: DecodeScope) -> tuple[ClassCost, ...]:
    """The costs of every class under these cuts."""
    return tuple(_class_cost(problem, entry, cuts, decode_scope) for entry in problem.workload.classes)


def _class_cost(problem: Problem, entry: BlockClass, cuts: Cuts, decode_scope: DecodeScope) -> ClassCost:
    if entry.measured is not None:
        return _measured_cost(problem, entry, entry.measured, cuts, decode_scope)
    device, tokens, chunks = problem.hardware.device, problem.workload.tokens, num_chunks(problem, cuts)
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
    )


def tiles_again_seconds(problem: Problem, entry: BlockClass) -> float:
    """What a head takes longer by tiles: its logits are computed twice."""
    if entry.measured is not None:
        return entry.measured.product
    return problem.workload.tokens * entry.forward_flops / problem.hardware.device.matmul_flops_per_second


def buckets(entry: BlockClass) -> int:
    """Pieces in which a block's optimizer state moves."""
    return max(1, min(MAX_BUCKETS, -(-entry.trainable_params // BUCKET_PARAMS)))


def whole_state_bytes(problem: Problem, entry: BlockClass) -> int:
    """Optimizer state of one block; one copy."""
    if entry.state_cuts:
        return entry.state_cuts[-1][1]
    return problem.workload.state_bytes_per_param * entry.trainable_params


def update_bytes(problem: Problem, placed: ClassPlan) -> tuple[int, ...]:
    """Optimizer state of each update of one block, one copy. ValueError where it cannot be cut so."""
    cuts = dict(next(entry.state_cuts for entry in problem.workload.classes if entry.name == placed.name))
    if not cuts:
        return tuple(problem.workload.state_bytes_per_param * update.params for update in placed.updates)
    found, end = [], 0
    for update in placed.updates:
        begin, end = end, end + update.params
        if begin not in cuts or end not in cuts:
            raise ValueError(f"plan: state of {placed.name!r} cannot be cut into parameters [{begin}, {end})")
        found.append(cuts[end] - cuts[begin])
    return tuple(found)


def state_bytes(problem: Problem, placed: ClassPlan, tier: Tier) -> int:
    """Optimizer state of one block that rests in `tier`; one copy."""
    sizes = zip(placed.updates, update_bytes(problem, placed), strict=True)
    return sum(num_bytes for update, num_bytes in sizes if update.tier is tier)


def steps_after(problem: Problem, mode: UpdateMode, tier: Tier) -> bool:
    """Whether what rests in `tier` is stepped after the last backward."""
    return mode is UpdateMode.AFTER or (problem.capabilities.memory_steps_after and tier is not Tier.NVME)


def state_copies(problem: Problem, mode: UpdateMode) -> int:
    """Of state in memory: a second one where it is stepped before the norm is known."""
    return 2 if mode is UpdateMode.SPECULATIVE and not problem.capabilities.memory_steps_after else 1


def gradients_stay(problem: Problem, plan: Plan) -> bool:
    """Whether gradients of all blocks wait until the end of the step."""
    if plan.update_mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE):
        return True
    updates = [update for entry in plan.classes for update in entry.updates if update.params]
    return any(problem.capabilities.memory_steps_after and update.tier is not Tier.NVME for update in updates)


def fixed_device_bytes(problem: Problem, knobs: Knobs) -> dict[str, float]:
    """What lies in DEVICE memory whatever the fractions are, itemised, but for activations of a chunk (`arenas`)."""
    workload, cuts = problem.workload, knobs.cuts
    chunk = tokens_at_once(problem, cuts)
    classes = workload.classes
    items = {
        "activations between layers": float(workload.boundary_bytes)
        if knobs.boundary is Tier.DEVICE
        else 2.0 * ITEM_BYTES * workload.hidden * chunk,
        "decoded weights": 2.0 * max(c.largest_linear_bytes for c in classes),
    }
    if knobs.decode_scope is DecodeScope.LAYER:
        items["decoded weights"] += max(c.decoded_bytes for c in classes)
    if cuts.chunk_tokens < workload.seq_len:
        # Keys, values and queries of a sequence with their gradients, one group of heads at a time.
        whole = workload.seq_len * max(c.attention_bytes for c in classes)
        items["attention of a sequence"] = 2.0 * whole / cuts.attention_groups
    trains = max(c.trainable_params for c in classes)
    if workload.pinned:
        each = workload.weight_bytes_per_param + workload.gradient_bytes_per_param
        items["adapters and their gradients"] = float(each * workload.trainable_params)
    else:
        items["gradients"] = float(knobs.buffers.gradient_slots * workload.gradient_bytes_per_param * trains)
        if num_chunks(problem, cuts) > 1:  # summed over chunks in fp32
            items["gradients"] += 4.0 * trains
    return items


def fixed_host_bytes(problem: Problem, knobs: Knobs) -> dict[str, float]:
    """What lies in HOST memory whatever the fractions are, itemised."""
    workload = problem.workload
    items: dict[str, float] = {}
    if problem.hardware.unified:
        return items
    if knobs.boundary is Tier.HOST:
        items["activations between layers"] = float(workload.boundary_bytes)
    if knobs.cuts.attention_groups > 1:
        items["attention of a sequence"] = 3.0 * workload.seq_len * max(c.attention_bytes for c in workload.classes)
    return items


def ring_slot_bytes(plan: Plan, problem: Problem) -> dict[str, int]:
    """The most that a block of each ring streams."""
    found = {"layers": 0, "edges": 0}
    for entry in problem.workload.classes:
        name = "layers" if entry.is_layer else "edges"
        if problem.workload.in_ring(entry):
            found[name] = max(found[name], plan.entry(entry.name).weights.streamed_bytes)
    return found


def static_bytes(problem: Problem, plan: Plan) -> dict[str, dict[str, float]]:
    """What lies in each tier during a whole step, itemised. `arenas` says what comes and goes between its blocks.

    ValueError if the plan has no arenas for the chunks of its classes.
    """
    workload, knobs, unified = problem.workload, knobs_of(plan), problem.hardware.unified
    device, host = fixed_device_bytes(problem, knobs), fixed_host_bytes(problem, knobs)
    nvme: dict[str, float] = {}
    entries = [(entry, plan.entry(entry.name)) for entry in workload.classes]
    slots = ring_slot_bytes(plan, problem)

    def add(items: dict[str, float], name: str, num_bytes: float) -> None:
        if num_bytes:
            items[name] = items.get(name, 0.0) + num_bytes

    chunks = [arena for arena in plan.arenas if arena.name not in ("device", "host")]
    if not chunks:
        raise ValueError("plan: says no arenas; only a plan that is laid out can be simulated")
    slot = chunks[0].slot_bytes
    add(device, "transient activations", max(arena.num_bytes for arena in chunks) - slot)
    add(device, "slots of swapped activations", plan.buffers.swap_slots * slot)
    add(device, "ring of layers", knobs.slots * slots["layers"])
    add(device, "ring of edges", EDGE_SLOTS * slots["edges"])
    whole = [(entry, placed) for entry, placed in entries if workload.in_ring(entry)]
    staged = {
        is_layer: max((p.weights.nvme_bytes for e, p in whole if e.is_layer is is_layer), default=0)
        for is_layer in (True, False)
    }
    copies = state_copies(problem, plan.update_mode)
    on_device = 0.0
    for entry, placed in entries:
        add(device, "resident weights", entry.count * placed.weights.device_bytes)
        add(host, "weights", entry.count * placed.weights.host_bytes)
        # What changes has two slots on the drive, so that a commit never overwrites the last one.
        changes = workload.mutable and bool(entry.trainable_params)
        if not changes or workload.log_bytes is None:
            add(nvme, "weights", entry.count * placed.weights.nvme_bytes * (2 if changes else 1))
        states = {tier: entry.count * state_bytes(problem, placed, tier) for tier in Tier}
        add(device, "optimizer state", copies * states[Tier.DEVICE])
        add(host, "optimizer state", copies * states[Tier.HOST])
        committed = sum(states.values()) if workload.commit_every else states[Tier.NVME]
        if workload.log_bytes is None:
            add(nvme, "optimizer state", 2 * committed)
        if workload.commit_every and workload.pinned:
            add(nvme, "adapters", 2 * entry.count * entry.trainable_params * workload.weight_bytes_per_param)
        for saved, split in zip(entry.saved, placed.tokens, strict=True):
            add(nvme, "activations", entry.count * saved.bytes_per_token * workload.batch_size * split.nvme_tokens)
        moved = sum(u.params for u in placed.updates if u.place is UpdatePlace.DEVICE and u.tier is not Tier.DEVICE)
        piece = workload.state_bytes_per_param * moved / plan.buffers.buckets_per_block
        if not unified:  # where the tiers are one, it is stepped where it is staged
            on_device = max(on_device, 2 * piece)
    add(device, "state updated on the device", on_device)
    add(nvme, "what changes, twice", workload.log_bytes or 0)
    if (lookups := plan.lookups) is not None:
        tables = sum(p.weights.streamed_bytes * e.count for e, p in entries if {*e.blocks} & {*lookups.blocks})
        add(device, "rows of embeddings", lookups.room_bytes)
        add(host, "rows on their way", lookups.staging_bytes(unified=unified) + lookups.sums_bytes(tables))
    if (tiles := plan.head_tiles) is not None:
        add(device, "tiles of the head", tiles.slots_bytes)
        add(device, "products by tiles", tiles.product_bytes)
        if tiles.rest is Tier.NVME and not unified:
            add(host, "staging for tiles of the head", tiles.slots_bytes)
    for name, size in _host_rings(problem, plan).items():
        add(host, name, size)
    if unified:
        return {"device": {**device, **{f"{k} (staging)": v for k, v in host.items()}}, "host": {}, "nvme": nvme}
    add(host, "staging of weights", plan.buffers.host_slots * staged[True] + EDGE_SLOTS * staged[False])
    return {"device": device, "host": host, "nvme": nvme}


def saving_bytes(problem: Problem, plan: Plan) -> dict[str, float]:
    """What lies in each tier while a model is saved: all but a layer's activations, and two slabs that it goes through.

    A step may hold less besides what lies there all the time, and so may reading the model in.
    """
    items = static_bytes(problem, plan)
    totals = {tier: sum(sizes.values()) - sizes.get("transient activations", 0.0) for tier, sizes in items.items()}
    totals["device" if problem.hardware.unified else "host"] += slab_bytes(problem)
    return totals


def slab_bytes(problem: Problem) -> int:
    """Memory through which a model is read in and saved: one slab while another is on its way."""
    return 2 * min(problem.workload.slab_bytes, max(entry.stored_bytes for entry in problem.workload.classes))


def _host_rings(problem: Problem, plan: Plan) -> dict[str, float]:
    """Slots in HOST through which activations, gradients and optimizer state pass."""
    workload, buffers, cuts = problem.workload, plan.buffers, knobs_of(plan).cuts
    activations = state = new = 0.0
    for entry in workload.classes:
        placed = plan.entry(entry.name)
        saved = zip(entry.saved, placed.tokens, strict=True)
        swapped = sum(one.bytes_per_token * in_a_chunk(problem, cuts, split.nvme_tokens) for one, split in saved)
        activations = max(activations, swapped)
        state = max(state, state_bytes(problem, placed, Tier.NVME) / buffers.buckets_per_block)
        if problem.capabilities.whole_weights and workload.mutable and entry.trainable_params:
            new = max(new, placed.weights.nvme_bytes)
    if state and workload.state_piece_bytes is not None:
        state = workload.state_piece_bytes
    return {
        # Leaving for the drive, and coming from it: each chunk is in one of the two.
        "staging of activations": 2 * buffers.swap_slots * activations,
        "gradients": float(buffers.host_gradient_slots * passing_gradient_bytes(problem, plan)),
        "staging of state": buffers.state_slots * state,
        "new weights": buffers.weight_slots * new,
    }


def passing_gradient_bytes(problem: Problem, plan: Plan) -> int:
    """The most gradients of one block that pass through HOST without staying until the step's end."""
    if gradients_stay(problem, plan):
        return 0
    return max(
        problem.workload.gradient_bytes_per_param
        * sum(u.params for u in entry.updates if u.place is UpdatePlace.CPU and not u.deferred)
        for entry in plan.classes
    )


def capacities(problem: Problem) -> dict[str, int]:
    """Bytes that a plan may use of each tier."""
    hardware = problem.hardware
    return {
        "device": hardware.device.memory_bytes - hardware.device.reserve_bytes,
        "host": hardware.host.memory_bytes,
        "nvme": hardware.nvme_bytes,
    }
