"""What lies in memory when, as buffers to be laid out: a chunk in a block of each class, then a step in each tier.

Two levels, as MEMO plans. The clock of the first is operations of a block. What is swapped of a chunk lies in one of
`swap_slots` equal slots, which chunks take in turn: computation waits until a slot's last content has left. So while a
chunk computes, its slot is its own, and what is not yet made of it, or not needed any more, is room for transients:

    forward     slot ▲ free for transients ┌──────     backward   slot ▲ ────────┐ free for transients
                     │           ┌─────────┘ product                   │ product └───────────┐
                     │  ┌────────┘ up                                  │ up                  └─────────
                     └──┴──────────────────► tick                      └──────────────────────────────► tick

The clock of the second level is visits: block p is visited at tick p and at 2N - 1 - p, and updates that wait for all
gradients come at tick 2N. Of several micro-batches each has these ticks, and gradients that are summed are there in all
of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from planners.plans.layout import Arena, Buffer, aligned, lay_out, live_bytes
from planners.plans.placement import ClassPlan, Tier, UpdateMode
from planners.plans.plan import Plan
from planners.plans.schedule import Phase
from planners.problems.cost import Knobs, in_a_chunk, knobs_of, tokens_at_once
from planners.problems.problem import BlockClass, Problem
from planners.shapes.trace import ATTENTION, Saved, backward_tick, num_ticks
from planners.simulator.optimizer_state import gradients_stay
from planners.simulator.static_memory import static_bytes


def with_arenas(problem: Problem, plan: Plan) -> Plan:
    """`plan` with everything laid out. ValueError if it does not say what it needs."""
    slot = swap_slot_bytes(problem, plan)
    chunks: dict[str, Arena] = {}
    asked = [(entry, phase) for entry in problem.workload.classes for phase in Phase]
    buffers = {chunk_arena_name(*pair): chunk_buffers(problem, plan, *pair) for pair in asked}
    # All lie in the same place, one after the other: only the largest has to be small.
    for entry, phase in sorted(asked, key=lambda pair: -_most(buffers[chunk_arena_name(*pair)])):
        name = chunk_arena_name(entry, phase)
        chunks[name] = lay_out(
            name, Tier.DEVICE, buffers[name], _num_ticks(entry, phase),
            in_slot=slot_buffers(problem, plan, entry, phase, slot), slot_bytes=slot,
            enough_bytes=max((arena.num_bytes for arena in chunks.values()), default=0),
        )  # fmt: skip
    plan = replace(plan, arenas=tuple(chunks.values()))
    tiers = (Tier.DEVICE,) if problem.hardware.unified else (Tier.DEVICE, Tier.HOST)
    period = 2 * problem.workload.num_blocks + 1
    steps = [lay_out(tier.value, tier, step_buffers(problem, plan, tier), period) for tier in tiers]
    return replace(plan, arenas=(*steps, *chunks.values()))


def _most(buffers: list[Buffer]) -> int:
    return max(live_bytes(buffers, max(buffer.end for buffer in buffers)), default=0) if buffers else 0


def chunk_arena_name(entry: BlockClass, phase: Phase) -> str:
    return f"{entry.name}, {phase.value}"


def chunk_buffers(problem: Problem, plan: Plan, entry: BlockClass, phase: Phase) -> list[Buffer]:
    """What comes and goes in DEVICE memory while a chunk passes through a block of the class.

    Neither what is swapped is part of it, nor what stays there from forward to backward.
    """
    cuts = knobs_of(plan).cuts
    buffers = [
        _buffer(
            saved.name,
            saved.bytes_per_token * in_a_chunk(problem, cuts, split.recompute_tokens),
            *_span(entry, saved, phase),
        )
        for saved, split in zip(entry.saved, plan.entry(entry.name).tokens, strict=True)
    ]
    buffers += [_buffer(*transient) for transient in _transients(problem, knobs_of(plan), entry, phase)]
    return [buffer for buffer in buffers if buffer.num_bytes]


def swapped_buffers(problem: Problem, plan: Plan, entry: BlockClass, phase: Phase) -> list[Buffer]:
    """What a chunk's slot holds, in the order in which it is made; the last one made is the first one not needed."""
    cuts = knobs_of(plan).cuts
    buffers = [
        _buffer(
            f"{saved.name}, swapped",
            saved.bytes_per_token * in_a_chunk(problem, cuts, split.host_tokens + split.nvme_tokens),
            *_slot_span(entry, saved, phase),
        )
        for saved, split in zip(entry.saved, plan.entry(entry.name).tokens, strict=True)
        if not problem.workload.goes_apart(saved)
    ]
    return [buffer for buffer in buffers if buffer.num_bytes]


def slot_buffers(problem: Problem, plan: Plan, entry: BlockClass, phase: Phase, slot_bytes: int) -> list[Buffer]:
    """What transients of a chunk must leave alone of its slot: in an embedding or a head, one operation, all of it."""
    if entry.num_operations > 1:
        return swapped_buffers(problem, plan, entry, phase)
    return [_buffer("slot", slot_bytes, 0, _num_ticks(entry, phase))] if slot_bytes else []


def swap_slot_bytes(problem: Problem, plan: Plan) -> int:
    """The most that is swapped of a chunk, in any block."""
    return max(swapped_bytes(problem, plan, entry, phase) for entry in problem.workload.classes for phase in Phase)


def swapped_bytes(problem: Problem, plan: Plan, entry: BlockClass, phase: Phase) -> int:
    """What is swapped of a chunk in a block of the class."""
    return sum(aligned(buffer.num_bytes) for buffer in swapped_buffers(problem, plan, entry, phase))


def _buffer(name: str, num_bytes: float, begin: int, end: int) -> Buffer:
    return Buffer(name=name, num_bytes=-int(-num_bytes // 1), begin=begin, end=end)


def _span(entry: BlockClass, saved: Saved, phase: Phase) -> tuple[int, int]:
    """Ticks of a chunk in which a saved tensor exists that is computed again."""
    if phase is Phase.FORWARD:
        return saved.made, saved.read + 1
    return saved.made, backward_tick(entry.num_operations, saved.needed) + 1


def _slot_span(entry: BlockClass, saved: Saved, phase: Phase) -> tuple[int, int]:
    """Ticks of a chunk in which its swapped part is in the slot: from when it is made, or until it is not needed."""
    if phase is Phase.FORWARD:
        return saved.made, num_ticks(entry.num_operations, phase)
    last = backward_tick(entry.num_operations, saved.needed)
    return 0, max(last + 1, _num_ticks(entry, phase) if entry.alone_bytes else 0)


def _num_ticks(entry: BlockClass, phase: Phase) -> int:
    """Of a pass, with the one behind all others that `alone_bytes` has."""
    alone = entry.alone_bytes and phase is Phase.BACKWARD
    return num_ticks(entry.num_operations, phase) + (1 if alone else 0)


def _transients(
    problem: Problem, knobs: Knobs, entry: BlockClass, phase: Phase
) -> Iterator[tuple[str, float, int, int]]:
    """Name, bytes, first and last tick of what comes and goes with every chunk."""
    tokens = tokens_at_once(problem, knobs.cuts)
    for transient in entry.transients:
        if transient.phase is phase:
            yield transient.name, tokens * transient.bytes_per_token, transient.begin, transient.end
    if entry.attention_tiles_bytes and phase is Phase.BACKWARD:
        begin = backward_tick(entry.num_operations, ATTENTION)
        yield "attention's tiles", float(entry.attention_tiles_bytes), begin, begin + 1
    if entry.tile_bytes:
        yield "tile", float(entry.tile_bytes), 0, num_ticks(entry.num_operations, phase)
    if entry.alone_bytes and phase is Phase.BACKWARD:
        begin = num_ticks(entry.num_operations, phase)
        yield "attention's backward", float(entry.alone_bytes), begin, begin + 1


@dataclass(frozen=True)
class Demand:
    """What is live at one tick of a chunk: some bytes, and which of the saved tensors."""

    fixed_bytes: float
    again: tuple[bool, ...]
    """For each saved tensor: whether what is computed again of it is live."""
    swapped: tuple[bool, ...]
    """For each saved tensor: whether it is in the slot."""


@lru_cache(maxsize=4096)
def demands(problem: Problem, knobs: Knobs, entry: BlockClass) -> tuple[Demand, ...]:
    """The ticks of both passes at which the most may be live, whatever is kept, swapped and computed again.

    The most of these sums is the max-live bound of the two layouts: what the optimiser charges is what `layout` meets.
    """
    found: set[Demand] = set()
    for phase in Phase:
        comes_and_goes = list(_transients(problem, knobs, entry, phase))
        spans = [_span(entry, saved, phase) for saved in entry.saved]
        slots = [_slot_span(entry, saved, phase) for saved in entry.saved]
        for tick in range(_num_ticks(entry, phase)):
            found.add(
                Demand(
                    fixed_bytes=sum(size for _, size, begin, end in comes_and_goes if begin <= tick < end),
                    again=tuple(begin <= tick < end for begin, end in spans),
                    swapped=tuple(begin <= tick < end for begin, end in slots),
                )
            )
    return tuple(d for d in sorted(found, key=repr) if not any(_covers(e, d) for e in found if e != d))


def _covers(more: Demand, less: Demand) -> bool:
    pairs = zip(more.again + more.swapped, less.again + less.swapped, strict=True)
    return more.fixed_bytes >= less.fixed_bytes and all(a >= b for a, b in pairs)


def chunk_bytes(problem: Problem, knobs: Knobs, entry: BlockClass) -> float:
    """What a chunk needs in a block of the class if all that can be is computed again, and the rest is swapped."""
    each = in_a_chunk(problem, knobs.cuts, problem.workload.seq_len)
    inputs = each * sum(saved.bytes_per_token for saved in entry.saved if not saved.recomputable)
    most = 0.0
    for demand in demands(problem, knobs, entry):
        live = demand.fixed_bytes
        for saved, again, swapped in zip(entry.saved, demand.again, demand.swapped, strict=True):
            live += each * saved.bytes_per_token * (again if saved.recomputable else swapped)
        most = max(most, live)
    if any(problem.workload.goes_apart(saved) for saved in entry.saved):
        return most
    return most + (knobs.buffers.swap_slots - 1) * inputs


def peak_bytes(problem: Problem, plan: Plan) -> dict[str, float]:
    """What the plan's layout takes of each tier; on NVME nothing comes and goes."""
    host = 0 if problem.hardware.unified else plan.arena("host").num_bytes
    nvme = sum(static_bytes(problem, plan)["nvme"].values())
    return {"device": plan.arena("device").num_bytes, "host": host, "nvme": nvme}


def peak_phase(problem: Problem, plan: Plan, tier: str) -> str:
    """In which phase of a step the most is live in `tier`."""
    if tier == "nvme":
        return "update" if plan.update_mode is UpdateMode.AFTER else "backward"
    live = live_bytes(plan.arena(tier).buffers, plan.arena(tier).period)
    most = max(live)
    if min(live) < most:
        n = problem.workload.num_blocks
        return "forward" if most in live[: n - 1] else "backward" if most in live[: 2 * n] else "update"
    chunks = [arena for arena in plan.arenas if arena.name not in ("device", "host")]
    return max(chunks, key=lambda arena: arena.num_bytes).name.rpartition(", ")[2] if tier == "device" else "backward"


def step_buffers(problem: Problem, plan: Plan, tier: Tier) -> list[Buffer]:
    """What lies in `tier` during a step. The plan has the arenas of its chunks."""
    workload = problem.workload
    n = workload.num_blocks
    period = 2 * n + 1
    buffers = [_buffer(name, size, 0, period) for name, size in static_bytes(problem, plan)[tier.value].items()]
    for entry in workload.classes:
        placed = plan.entry(entry.name)
        between = waiting_bytes(problem, placed, entry, tier)
        for position, block in zip(entry.positions, entry.blocks, strict=True):
            buffers.append(_buffer(f"activations of {block}", between, position, 2 * n - position))
            for deferred, size in retained_gradients(problem, plan, placed, tier):
                # Until all updates are done: at the end of the step, or of the next forward.
                begin, until = 2 * n - position, period + n if deferred else period
                if problem.capabilities.gradients_apart or workload.sums_gradients:
                    begin, until = 0, period  # all the time
                buffers.append(_buffer(f"gradients of {block}", size, begin, until))
    return [buffer for buffer in buffers if buffer.num_bytes]


def waiting_bytes(problem: Problem, placed: ClassPlan, entry: BlockClass, tier: Tier) -> float:
    """Saved tensors of one block that wait in `tier` for its backward."""
    total = 0.0
    for saved, split in zip(entry.saved, placed.tokens, strict=True):
        tokens = {Tier.DEVICE: split.device_tokens, Tier.HOST: split.host_tokens, Tier.NVME: split.nvme_tokens}
        total += saved.bytes_per_token * problem.workload.pass_rows * tokens[tier]
    return total


def retained_gradients(problem: Problem, plan: Plan, placed: ClassPlan, tier: Tier) -> list[tuple[bool, int]]:
    """Gradients of one block that stay in `tier` until its update: whether into the next forward, and bytes."""
    found = []
    workload, in_host = problem.workload, tier is not Tier.DEVICE
    if not in_host and workload.pinned:
        return []  # they have a place of their own, all the time
    stays = gradients_stay(problem, plan)
    for deferred in (False, True):
        own = [u for u in placed.updates if workload.in_host(u.tier, u.place) is in_host and u.deferred is deferred]
        if (params := sum(u.params for u in own)) and (stays or deferred):
            found.append((deferred, workload.waiting_gradient_bytes_per_param * params))
    return found
