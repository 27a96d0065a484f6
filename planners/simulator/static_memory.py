"""What lies in each tier during a whole step, itemised, and while a model is saved; what a plan may use of each.

Shared by simulator, optimiser and validator. What comes and goes between the blocks of a step is for `arenas` to say.
"""

from __future__ import annotations

from planners.plans.placement import DecodeScope, Tier, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.cost import EDGE_SLOTS, Knobs, in_a_chunk, knobs_of, num_chunks, tokens_at_once
from planners.problems.problem import Problem
from planners.shapes.trace import ITEM_BYTES
from planners.simulator.optimizer_state import passing_gradient_bytes, state_bytes, state_copies


def fixed_device_bytes(problem: Problem, knobs: Knobs) -> dict[str, float]:
    """What lies in DEVICE memory whatever the fractions are, itemised, but for activations of a chunk (`arenas`)."""
    workload, cuts = problem.workload, knobs.cuts
    chunk = tokens_at_once(problem, cuts)
    classes = workload.classes
    items = {"decoded weights": 2.0 * max(c.largest_linear_bytes for c in classes)}
    if not workload.is_measured:  # what a layer was measured to hold has its input and its output
        items["activations between layers"] = (
            float(workload.boundary_bytes)
            if knobs.boundary is Tier.DEVICE
            else 2.0 * ITEM_BYTES * workload.hidden * chunk
        )
        if knobs.boundary is Tier.DEVICE:
            items |= _others_hidden_states(problem)
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
        items |= {"activations between layers": float(workload.boundary_bytes), **_others_hidden_states(problem)}
    if knobs.cuts.attention_groups > 1:
        items["attention of a sequence"] = 3.0 * workload.seq_len * max(c.attention_bytes for c in workload.classes)
    return items


def _others_hidden_states(problem: Problem) -> dict[str, float]:
    """A layer has inputs and outputs of those whose turn it is not, where several go through it together. Measured
    questions have their room for that set apart.
    """
    workload = problem.workload
    if workload.together == 1 or workload.is_measured:
        return {}
    return {"hidden states of other micro-batches": float(workload.boundary_bytes)}


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
    add(device, "layer input in use", input_in_use_bytes(problem, plan))
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
            add(nvme, "activations", entry.count * saved.bytes_per_token * workload.pass_rows * split.nvme_tokens)
        moved = sum(u.params for u in placed.updates if u.place is UpdatePlace.DEVICE and u.tier is not Tier.DEVICE)
        piece = workload.state_bytes_per_param * moved / plan.buffers.buckets_per_block
        if moved and workload.device_steps is not None:
            on_device = float(workload.device_steps.num_slots * workload.device_steps.slot_bytes)
        elif not unified:  # where the tiers are one, it is stepped where it is staged
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


def input_in_use_bytes(problem: Problem, plan: Plan) -> float:
    """Of a chunk's layer input that waits elsewhere, where such inputs have a way of their own; of one micro-batch."""
    workload, cuts = problem.workload, knobs_of(plan).cuts
    most = 0.0
    for entry in workload.classes:
        for saved, split in zip(entry.saved, plan.entry(entry.name).tokens, strict=True):
            if workload.goes_apart(saved):
                swapped_tokens = split.host_tokens + split.nvme_tokens
                most = max(most, saved.bytes_per_token * in_a_chunk(problem, cuts, swapped_tokens))
    return most


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
    activations = inputs = state = new = 0.0
    for entry in workload.classes:
        placed = plan.entry(entry.name)
        swapped = 0.0
        for saved, split in zip(entry.saved, placed.tokens, strict=True):
            if workload.goes_apart(saved):
                inputs = max(inputs, float(workload.input_staging_bytes or 0) if split.nvme_tokens else 0.0)
            else:
                swapped += saved.bytes_per_token * in_a_chunk(problem, cuts, split.nvme_tokens)
        activations = max(activations, swapped)
        state = max(state, state_bytes(problem, placed, Tier.NVME) / buffers.buckets_per_block)
        if problem.capabilities.whole_weights and workload.mutable and entry.trainable_params:
            new = max(new, placed.weights.nvme_bytes)
    if state and workload.state_piece_bytes is not None:
        state = workload.state_piece_bytes
    return {
        # Leaving for the drive, and coming from it: each chunk is in one of the two.
        "staging of activations": 2 * buffers.swap_slots * activations,
        "staging of layer inputs": inputs,
        "gradients": float(buffers.host_gradient_slots * passing_gradient_bytes(problem, plan)),
        "staging of state": buffers.state_slots * state,
        "new weights": buffers.weight_slots * new,
    }


def capacities(problem: Problem) -> dict[str, int]:
    """Bytes that a plan may use of each tier."""
    hardware = problem.hardware
    return {
        "device": hardware.device.memory_bytes - hardware.device.reserve_bytes,
        "host": hardware.host.memory_bytes,
        "nvme": hardware.nvme_bytes,
    }
