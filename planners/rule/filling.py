"""What the fixed rule does with memory that a plan of it leaves: layers rest there, and what they save is kept.

Whole layers stay in DEVICE memory, as many as there is room for, and of those that still stream as many rest in HOST,
where the rule has them on a drive. Those that stream lie evenly between those that stay, so that each is fetched while
others compute, and those that come from the drive evenly between those that come from HOST:

    D D n D D h D D n D D h D D        D: stays in DEVICE, h: comes from HOST, n: comes from NVME

What is left then keeps what the last layers save, whose backward comes first, as many as there is room for. That is no
cut. Nothing is filled so far that a plan would have less than `SPARE_SHARE` of a layer's activations to spare: formulas
may be wrong by as much, and a rehearsal that finds it would make the plan again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from planners.plans.activations import Action, whole_batch
from planners.plans.placement import ClassPlan, Split
from planners.plans.plan import Plan, Ring, Tier
from planners.rule.streaming_problem import INPUTS_OF_CHUNKS, StreamingProblem
from planners.units import PAGE_BYTES, whole_pages

SPARE_SHARE = 1
"""Of transient activations, that much more is left where layers fill DEVICE memory. Formulas were 1.8 times too small
at worst (`offload_rt.running.rehearsal`)."""
KEPT_TENSORS = 64
"""Of a layer or chunk, each of which begins at an address of its own; a Llama layer with adapters saves about 50."""
LAYERS = "layers"
"""The ring of these."""
IN_HOST = "layers in HOST"
"""The class of blocks that rest there, of a ring whose others rest on NVME."""


class Fill(Enum):
    """What memory that is left is given to."""

    NOTHING = 1
    LAYERS = 2
    """Their weights alone."""
    ALL = 3
    """These, and what layers save."""


class _Streamed(NamedTuple):
    """Layers that stream, evenly between the others; or of these, those that come from a drive."""

    positions: tuple[int, ...]
    num_bytes: int
    largest_bytes: int


@lru_cache(maxsize=16)
def _spread(sizes: tuple[int, ...]) -> tuple[_Streamed, ...]:
    """For each number of layers, from none to all, those that stream."""
    found = []
    for count in range(len(sizes) + 1):
        positions = tuple((2 * number + 1) * len(sizes) // (2 * count) for number in range(count))
        chosen = [sizes[position] for position in positions]
        found.append(_Streamed(positions, sum(chosen), max(chosen, default=0)))
    return tuple(found)


def fetched_bytes(sizes: Sequence[int], num_slots: int, streamed: Sequence[int]) -> int:
    """What a micro-batch fetches in a steady state of `streamed`, positions in the ring, forward and backward.

    By `schedule`: the last ones are still in the slots when backward begins, the first ones when it has ended.
    """
    if len(sizes) <= num_slots:
        return 0
    chosen, last = set(streamed), len(sizes) - num_slots
    forward = sum(sizes[position] for position in chosen if position >= num_slots)
    return forward + sum(sizes[position] for position in chosen if position < last)


def streamed_bytes(problem: StreamingProblem, plan: Plan) -> int:
    """What a step of `plan` moves of what is frozen, of layer inputs and of state: over the link, and to and from the
    drives, added up.
    """
    sizes = {block.name: block.stored_bytes for block in problem.layers + problem.edges}
    passes = 1 if plan.layer_major else problem.num_micro_batches
    crossings = {Tier.HOST: 1, Tier.NVME: 1 if problem.unified else 2}  # of what comes to DEVICE
    total = 0
    for ring in plan.rings:
        rests = [_rest(plan, ring, name) for name in ring.blocks]
        in_ring = [sizes[name] for name in ring.blocks]
        for tier, times in crossings.items():
            chosen = [position for position, rest in enumerate(rests) if rest is tier]
            if ring.name == LAYERS:
                total += times * passes * fetched_bytes(in_ring, ring.num_slots, chosen)
            elif len(in_ring) > ring.num_slots:
                total += times * passes * sum(in_ring[position] for position in chosen)
    if plan.lookups is not None:
        blocks = {block.name: block for block in problem.edges}
        rows = [size for name in plan.lookups.blocks if (size := blocks[name].rows) is not None]
        read = sum(size.most_rows * size.row_bytes for size in rows)
        total += crossings[plan.lookups.rest] * problem.num_micro_batches * read
    if plan.layer_inputs is not Tier.DEVICE and not (problem.unified and plan.layer_inputs is Tier.HOST):
        inputs = problem.num_micro_batches * len(problem.layers) * problem.layer_input_bytes
        total += 2 * crossings[plan.layer_inputs] * inputs
    if plan.state is not None and problem.training is not None:
        total += 2 * (problem.training.state_bytes - plan.state.in_memory_bytes(problem.training))
    return total


def filled_with_layers(problem: StreamingProblem, plan: Plan) -> Plan:
    """The plan with layers in the memory that it leaves: in DEVICE, and frozen ones in HOST in place of NVME."""
    ring = next((ring for ring in plan.rings if ring.name == LAYERS), None)
    if ring is None:
        return plan
    sizes = tuple(block.stored_bytes for block in problem.layers)
    choices, room = _spread(sizes), None
    if problem.device_capacity_bytes is not None:
        items = plan.peak_bytes[Tier.DEVICE.value]
        spare = SPARE_SHARE * items["activations"]
        room = problem.device_capacity_bytes - plan.predicted_bytes(Tier.DEVICE) + ring.device_bytes - spare
    least: tuple[int, int] | None = None
    for count, choice in enumerate(choices[:-1]):
        slots = min(ring.num_slots, count)
        if room is not None and sum(sizes) - choice.num_bytes + slots * choice.largest_bytes > room:
            continue
        in_ring = [sizes[position] for position in choice.positions]
        fetched = fetched_bytes(in_ring, slots, range(count))
        if least is None or (fetched, count) < least:
            least = fetched, count
        if not fetched:
            break
    before = fetched_bytes(sizes, ring.num_slots, range(len(sizes))), len(sizes)
    if least is not None and least < before:
        plan = _with_resident(problem, plan, ring, choices[least[1]])
    ring = next((ring for ring in plan.rings if ring.name == LAYERS), None)
    trains = problem.training is not None and not problem.training.adapters
    if ring is None or ring.rest is not Tier.NVME or problem.unified or trains:
        return plan
    return _with_some_in_host(problem, plan, ring)


def _rest(plan: Plan, ring: Ring, name: str) -> Tier:
    split = plan.weights_of(name)
    return Tier.HOST if split is not None and split.host_bytes else ring.rest


def _with_resident(problem: StreamingProblem, plan: Plan, ring: Ring, streamed: _Streamed) -> Plan:
    """The plan with all layers in DEVICE memory but those."""
    names = [problem.layers[position].name for position in streamed.positions]
    stay = [block for block in problem.layers if block.name not in names]
    smaller = replace(
        ring, blocks=tuple(names), num_slots=max(1, min(ring.num_slots, len(names))), slot_bytes=streamed.largest_bytes
    )
    peaks = {tier: dict(items) for tier, items in plan.peak_bytes.items()}
    device = peaks[Tier.DEVICE.value]
    device["resident blocks"] += sum(block.stored_bytes for block in stay)
    host = peaks[Tier.HOST.value]
    for items, item in ((device, f"ring of {LAYERS}"), (host, f"staging for {LAYERS}")):
        if item in items:
            items[item] = smaller.device_bytes
            if not names:
                del items[item]
    if ring.rest is Tier.HOST:
        host["weights"] -= sum(block.stored_bytes for block in stay)
    rings = tuple(smaller if one is ring else one for one in plan.rings)
    return replace(
        plan,
        resident=(*plan.resident, *(block.name for block in stay)),
        rings=rings if names else tuple(one for one in rings if one is not smaller),
        peak_bytes=peaks,
    )


def _with_some_in_host(problem: StreamingProblem, plan: Plan, ring: Ring) -> Plan:
    """The plan with as many layers of its ring in HOST as it has room for there."""
    stored = {block.name: block.stored_bytes for block in problem.layers}
    sizes = tuple(stored[name] for name in ring.blocks)
    if len(sizes) <= ring.num_slots:
        return plan  # they come once, and stay in their slots
    items = plan.peak_bytes[Tier.HOST.value]
    staging = items[f"staging for {LAYERS}"]
    room = None
    if problem.host_capacity_bytes is not None:
        room = problem.host_capacity_bytes - plan.predicted_bytes(Tier.HOST) + staging
    best: tuple[int, int] | None = None
    choices = _spread(sizes)
    for count, choice in enumerate(choices[:-1]):
        if room is not None and sum(sizes) - choice.num_bytes + ring.num_slots * choice.largest_bytes > room:
            continue
        read = fetched_bytes(sizes, ring.num_slots, choice.positions)
        if best is None or (read, count) < best:
            best = read, count
        if not read:
            break
    if best is None or best[0] >= fetched_bytes(sizes, ring.num_slots, range(len(sizes))):
        return plan
    on_nvme = choices[best[1]]
    read_names = {ring.blocks[position] for position in on_nvme.positions}
    in_host = [name for name in ring.blocks if name not in read_names]
    weights_bytes = items.get("weights", 0) + sum(stored[name] for name in in_host)
    host = {**items, "weights": weights_bytes, f"staging for {LAYERS}": ring.num_slots * on_nvme.largest_bytes}
    peaks = {**plan.peak_bytes, Tier.HOST.value: host}
    if not read_names:
        del host[f"staging for {LAYERS}"]
        rings = tuple(replace(one, rest=Tier.HOST) if one is ring else one for one in plan.rings)
        return replace(plan, rings=rings, peak_bytes=peaks)
    by_size: dict[int, list[str]] = {}
    for name in in_host:
        by_size.setdefault(stored[name], []).append(name)
    classes = tuple(
        ClassPlan(
            name=IN_HOST if len(by_size) == 1 else f"{IN_HOST}, {size} bytes", blocks=tuple(names),
            weights=Split(device_bytes=0, host_bytes=size, nvme_bytes=0),
        )
        for size, names in by_size.items()
    )  # fmt: skip
    return replace(plan, classes=classes, buffers=replace(plan.buffers, host_slots=ring.num_slots), peak_bytes=peaks)


def with_kept(problem: StreamingProblem, plan: Plan) -> Plan:
    """The plan with what as many of the last layers save as there is room for kept in DEVICE memory: no cut."""
    if plan.activations is not None or plan.layer_inputs is not Tier.DEVICE or plan.layer_major:
        return plan
    items, num_layers = plan.peak_bytes[Tier.DEVICE.value], len(problem.layers)
    inputs_bytes = whole_pages(problem.layer_input_bytes)
    each = problem.activation_bytes + KEPT_TENSORS * PAGE_BYTES
    count = num_layers
    if problem.device_capacity_bytes is not None:
        spare = SPARE_SHARE * items["activations"] + PAGE_BYTES
        room = problem.device_capacity_bytes - plan.predicted_bytes(Tier.DEVICE) - spare
        count = min(count, room // (each + (INPUTS_OF_CHUNKS - 1) * inputs_bytes))
    return keeping(problem, plan, count) if count > 0 else plan


def keeping(problem: StreamingProblem, plan: Plan, count: int) -> Plan:
    """The plan with what so many of the last layers save kept in DEVICE memory."""
    first, inputs_bytes = len(problem.layers) - count, whole_pages(problem.layer_input_bytes)
    device = {
        **plan.peak_bytes[Tier.DEVICE.value],
        "kept activations": whole_pages(count * (problem.activation_bytes + KEPT_TENSORS * PAGE_BYTES)),
        "layer inputs": (first + INPUTS_OF_CHUNKS * count) * inputs_bytes,
    }
    policy = whole_batch(Action.KEEP)
    return replace(
        plan,
        activations={block.name: policy for block in problem.layers[first:]},
        peak_bytes={**plan.peak_bytes, Tier.DEVICE.value: device},
    )
