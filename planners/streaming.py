"""The fixed streaming rule that `plan="auto"` follows until the optimiser is there: a legal plan without a solver.

Layers stream through up to three slots from NVME, or from HOST where no drive is given. Whatever else the model has
(embedding, head, final norm) stays in DEVICE memory if the budget holds it and streams through a slot of its own if
not. Layer inputs wait in the first of DEVICE, HOST, NVME that holds them. More slots than two hide the latency of one
slow read; below three the rule gives up slots before it gives up anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from planners.errors import PlanInfeasible, format_bytes
from planners.plan import DecodeScope, Plan, Ring, Tier

MAX_SLOTS = 3


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """A block as the planner sees it."""

    name: str
    stored_bytes: int
    largest_module_bytes: int
    """Decoded bytes of the module that decodes most at once; 0 where nothing is quantized."""
    decoded_bytes: int
    """Decoded bytes of all quantized tensors of the block."""
    streams: bool
    """False: it holds what cannot be fetched on use (buffers and parameters read outside their module)."""


@dataclass(frozen=True, kw_only=True)
class StreamingProblem:
    """What the rule decides from. Bytes; None as a capacity means that the tier is not limited."""

    fingerprint: str
    layers: tuple[BlockSize, ...]
    edges: tuple[BlockSize, ...]
    """Blocks outside the layers, in the order of use."""
    trainable_bytes: int
    """Adapters with their gradients and optimizer state."""
    layer_input_bytes: int
    """One layer's input for the largest batch."""
    activation_bytes: int
    """Peak of transient activations: one layer's recompute, or the head with the loss, whichever is more."""
    device_capacity_bytes: int | None
    host_capacity_bytes: int | None
    nvme_capacity_bytes: int | None
    """None here means that there is no drive."""
    unified: bool
    """DEVICE and HOST are one tier (the CPU device without `host_memory`)."""


def plan_streaming(problem: StreamingProblem) -> Plan:
    """A plan within the budgets, or `PlanInfeasible` with what is short and what would fit."""
    rest = Tier.HOST if problem.nvme_capacity_bytes is None else Tier.NVME
    candidates = [
        attempt
        for slots in range(min(MAX_SLOTS, max(1, len(problem.layers))), 0, -1)
        for attempt in _attempts(problem, rest, slots)
    ]
    for plan in candidates:
        if _shortage(problem, plan) is None:
            return plan
    leanest = min(candidates, key=lambda plan: plan.predicted_bytes(Tier.DEVICE))
    raise _infeasible(problem, leanest)


def _attempts(problem: StreamingProblem, rest: Tier, slots: int) -> list[Plan]:
    """Plans with `slots` layer slots, the fast ones first."""
    attempts = []
    homes = [Tier.DEVICE]
    if not problem.unified:
        homes.append(Tier.HOST)
    if problem.nvme_capacity_bytes is not None:
        homes.append(Tier.NVME)
    for stream_edges in (False, True):
        for home in homes:
            attempts.append(_plan(problem, rest, slots, home, stream_edges=stream_edges))
    return attempts


def _plan(problem: StreamingProblem, rest: Tier, slots: int, home: Tier, *, stream_edges: bool) -> Plan:
    streamed_edges = tuple(block for block in problem.edges if stream_edges and block.streams)
    resident = tuple(block for block in problem.edges if block not in streamed_edges)
    # Where HOST is DEVICE, a layer that rests in HOST is already where it is used.
    in_place = problem.unified and rest is Tier.HOST
    rings = []
    if problem.layers and not in_place:
        rings.append(_ring("layers", problem.layers, slots, rest))
    if streamed_edges and not in_place:
        rings.append(_ring("edges", streamed_edges, 1, rest))
    if in_place:
        resident = (*problem.edges, *problem.layers)
    scratch = 2 * max((block.largest_module_bytes for block in problem.layers), default=0)
    input_bytes = problem.layer_input_bytes * len(problem.layers)
    device = {
        "resident blocks": sum(block.stored_bytes for block in resident),
        **{f"ring of {ring.name}": ring.device_bytes for ring in rings},
        "decoded weights": scratch,
        "adapters, gradients, optimizer": problem.trainable_bytes,
        "activations": problem.activation_bytes,
        "layer inputs": input_bytes if home is Tier.DEVICE else 2 * problem.layer_input_bytes,
    }
    host = {}
    nvme = {}
    if rest is Tier.NVME:
        nvme["weights"] = sum(block.stored_bytes for block in problem.layers + problem.edges)
        if not problem.unified:
            host = {f"staging for {ring.name}": ring.device_bytes for ring in rings}
    elif not in_place:
        host["weights"] = sum(block.stored_bytes for ring in rings for block in _members(problem, ring))
    if home is Tier.HOST:
        host["layer inputs"] = input_bytes
    elif home is Tier.NVME:
        nvme["layer inputs"] = input_bytes
    return Plan(
        fingerprint=problem.fingerprint,
        planner="fixed streaming rule",
        resident=tuple(block.name for block in resident),
        rings=tuple(rings),
        layer_inputs=home,
        decode_scope=DecodeScope.LINEAR,
        peak_bytes={"device": device, "host": host, "nvme": nvme},
    )


def _ring(name: str, blocks: tuple[BlockSize, ...], slots: int, rest: Tier) -> Ring:
    return Ring(
        name=name,
        blocks=tuple(block.name for block in blocks),
        num_slots=min(slots, len(blocks)),
        slot_bytes=max(block.stored_bytes for block in blocks),
        rest=rest,
    )


def _members(problem: StreamingProblem, ring: Ring) -> list[BlockSize]:
    return [block for block in problem.layers + problem.edges if block.name in ring.blocks]


def _shortage(problem: StreamingProblem, plan: Plan) -> tuple[Tier, int, int] | None:
    """The tier that `plan` overfills, with need and capacity, or None."""
    capacities = (
        (Tier.DEVICE, problem.device_capacity_bytes),
        (Tier.HOST, problem.host_capacity_bytes),
        (Tier.NVME, problem.nvme_capacity_bytes),
    )
    for tier, capacity in capacities:
        need = plan.predicted_bytes(tier)
        if capacity is not None and need > capacity:
            return tier, need, capacity
    return None


def _infeasible(problem: StreamingProblem, leanest: Plan) -> PlanInfeasible:
    shortage = _shortage(problem, leanest)
    if shortage is None:  # the leanest in DEVICE memory overfills no tier: it would have been taken
        raise ValueError("planners.streaming: asked to explain a feasible plan")
    tier, need, have = shortage
    items = leanest.peak_bytes[tier.value]
    largest = max(items, key=lambda item: items[item])
    ways = [
        f"{tier.value}_memory of {format_bytes(need)}"
        if tier is not Tier.NVME
        else f"a drive with {format_bytes(need)} free"
    ]
    token_bytes = problem.activation_bytes + items.get("layer inputs", 0)
    if tier is Tier.DEVICE and token_bytes > need - have:
        share = 1 - (need - have) / token_bytes
        ways.append(f"batch_size x seq_len cut to {share:.0%} (activations are {format_bytes(token_bytes)})")
    if tier is not Tier.NVME and problem.nvme_capacity_bytes is None:
        ways.append("nvme= a folder on an SSD, so that weights rest there")
    phase = f"training step; largest item: {largest}, {format_bytes(items[largest])}"
    return PlanInfeasible(tier=tier.value, phase=phase, need_bytes=need, have_bytes=have, ways_out=ways)
