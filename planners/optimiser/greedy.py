"""A legal plan without a solver: what is used soonest rests highest, everything else is recomputed.

Layer inputs come first (nothing can make them again), then weights, then optimizer state, each in the highest tier that
has room, by byte fractions. It is the fallback where HiGHS is missing, the optimiser's first legal plan, and the
yardstick that the optimiser must beat.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from planners.errors import PlanInfeasible, format_bytes_up
from planners.optimiser.expand import Fractions, expand, with_prediction
from planners.plans.placement import Buffers, Cuts, Tier, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.plans.vocabulary import Lookups
from planners.problems.cost import EDGE_SLOTS, Knobs, num_chunks
from planners.problems.problem import BlockClass, Problem
from planners.simulator.arenas import chunk_bytes, peak_bytes, peak_phase
from planners.simulator.optimizer_state import whole_state_bytes
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities, fixed_device_bytes, fixed_host_bytes, saving_bytes, slab_bytes

MIN_CHUNK_TOKENS = 512
SLACK_BYTES = 2**20
ATTEMPTS = 4
"""Times that a tier which came out too full is filled less."""


@dataclass(frozen=True)
class Shortage:
    """A plan that does not fit: by how much, where."""

    tier: str
    need_bytes: float
    have_bytes: float
    phase: str


def chunk_choices(problem: Problem) -> list[Cuts]:
    """Cuts that make sense, the coarse ones first: whole sequences, then halves of one."""
    workload = problem.workload
    can = problem.capabilities
    if (measured := workload.measured_chunk_tokens) is not None:
        return [Cuts(chunk_tokens=measured)]
    sizes: list[int] = []
    rows = workload.batch_size
    while rows >= 1 and (can.batch_cuts or not sizes):
        sizes.append(rows * workload.seq_len)
        rows //= 2
    size = workload.seq_len // 2
    while size >= MIN_CHUNK_TOKENS and can.token_chunks and can.batch_cuts:
        sizes.append(size)
        size //= 2
    groups = max(entry.attention_groups for entry in workload.classes)
    cuts = []
    for size in sizes:
        cuts.append(Cuts(chunk_tokens=size))
        if size < workload.seq_len and groups > 1 and not problem.hardware.unified:
            cuts.append(Cuts(chunk_tokens=size, attention_groups=groups))
    return cuts


def boundaries(problem: Problem, cuts: Cuts) -> list[Tier]:
    """Where activations between layers may lie."""
    one = num_chunks(problem, cuts) == 1 or problem.hardware.unified or not problem.capabilities.batch_cuts
    return [Tier.DEVICE] if one else [Tier.DEVICE, Tier.HOST]


def input_tiers(problem: Problem) -> list[Tier | None]:
    """Where all layer inputs may wait together, the fast tiers first; None where they can be in several."""
    if problem.capabilities.input_shares:
        return [None]
    found: list[Tier | None] = [Tier.DEVICE]
    if not problem.hardware.unified:
        found.append(Tier.HOST)
    if problem.hardware.drives:
        found.append(Tier.NVME)
    return found


def homes(problem: Problem) -> list[tuple[Tier | None, bool]]:
    """Where all weights that train rest together, None where that is left open, and whether state rests in memory."""
    can, hardware = problem.capabilities, problem.hardware
    tiers: list[Tier | None] = [None]
    if can.whole_weights and problem.workload.mutable:
        held = {Tier.DEVICE: True, Tier.HOST: not hardware.unified, Tier.NVME: bool(hardware.drives)}
        tiers = [tier for tier, ok in held.items() if ok]
    in_memory = [True]
    if can.memory_steps_after and problem.workload.mutable and hardware.drives and Tier.NVME in can.state_tiers:
        in_memory.append(False)
    return list(itertools.product(tiers, in_memory))


def may_rest(problem: Problem, mode: UpdateMode, weights: Tier | None, state_in_memory: bool) -> bool:
    """Whether the runtime can have both so. See `Capabilities.memory_steps_after`."""
    if not problem.capabilities.memory_steps_after:
        return True
    if mode is UpdateMode.AFTER:
        return state_in_memory  # which says nothing more there
    return weights is not Tier.NVME or not state_in_memory


def state_slots(problem: Problem) -> list[int]:
    """How many buckets or pieces of state may be on their way, the most first."""
    piece = problem.workload.state_piece_bytes
    if piece is None:
        return [Buffers().state_slots]
    layer = max((whole_state_bytes(problem, e) for e in problem.workload.classes if e.is_layer), default=0)
    most = max(2, -(-2 * layer // piece))  # two layers: one is stepped while another comes
    return sorted({most, max(2, most // 4), 2}, reverse=True)


def host_slots(problem: Problem, slots: int) -> int:
    """HOST staging of weights, in blocks, for a ring of `slots`: what is read when it has a slot needs no more."""
    return Buffers().host_slots if problem.capabilities.reads_ahead else min(slots, Buffers().host_slots)


def slot_bytes(problem: Problem) -> tuple[int, int]:
    """The most that a layer can stream, and a block beside the layers that does so as a whole."""
    workload = problem.workload
    classes = [entry for entry in workload.classes if workload.in_ring(entry)]
    layer = max((e.streamed_bytes for e in classes if e.is_layer), default=0)
    return layer, max((e.streamed_bytes for e in classes if not e.is_layer), default=0)


def tiled_bytes(problem: Problem) -> int:
    """Of a head that goes by tiles where it does not stay; here it stays."""
    workload = problem.workload
    return sum(entry.stored_bytes for entry in workload.classes if workload.tiles_of(entry) is not None)


def lookup_bytes(problem: Problem) -> dict[str, int]:
    """What reading all embeddings by rows takes that can be read so, wherever they rest."""
    workload, unified = problem.workload, problem.hardware.unified
    sizes = [(size, entry.stored_bytes) for entry in workload.classes if (size := workload.rows_of(entry)) is not None]
    if not sizes:
        return {"device": 0, "host": 0}
    rest = Tier.NVME if problem.hardware.drives else Tier.HOST
    lookups = Lookups.of({str(index): size for index, (size, _) in enumerate(sizes)}, rest)
    staging = lookups.staging_bytes(unified=unified) + lookups.sums_bytes(sum(num_bytes for _, num_bytes in sizes))
    if unified:
        return {"device": lookups.room_bytes + staging, "host": 0}
    return {"device": lookups.room_bytes, "host": staging}


def update_modes(problem: Problem) -> tuple[UpdateMode, ...]:
    """Those of the runtime that the workload can use: what is summed cannot wait for the next step's forward."""
    modes = problem.capabilities.update_modes
    return tuple(mode for mode in modes if mode is not UpdateMode.DEFERRED or not problem.workload.sums_gradients)


def default_mode(problem: Problem) -> UpdateMode:
    """The simplest mode that the runtime has and clipping allows."""
    allowed = update_modes(problem)
    if UpdateMode.BACKWARD in allowed and not problem.workload.clips:
        return UpdateMode.BACKWARD
    for mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE, UpdateMode.DEFERRED):
        if mode in allowed:
            return mode
    raise ValueError("capabilities: no update mode is left that this workload can use")


def plan_greedy(problem: Problem) -> Plan:
    """The first plan that fits, going from fast to frugal. `PlanInfeasible` where none does."""
    closest: tuple[tuple[int, float], list[Shortage]] | None = None
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    for knobs in _attempts(problem):
        left = room_left(problem, knobs, room)
        short = [Shortage(t, room[t] - size, room[t], "backward") for t, size in left.items() if size < 0]
        if not short:
            plan, short = fill(problem, knobs)
        if not short:
            return with_prediction(problem, plan, simulate(problem, plan))
        lack = (len(short), sum(s.need_bytes - s.have_bytes for s in short))
        if closest is None or lack < closest[0]:
            closest = (lack, short)
    if closest is None:
        raise ValueError("no cut of the batch is allowed")
    raise infeasible(closest[1])


def _attempts(problem: Problem) -> Iterator[Knobs]:
    mode = default_mode(problem)
    states = state_slots(problem)
    for slots, gradients in ((3, 2), (2, 2), (2, 1), (1, 1)):
        buffers = Buffers(
            host_slots=host_slots(problem, slots), gradient_slots=gradients,
            state_slots=states[0] if slots > 2 else states[-1],
        )  # fmt: skip
        for cuts in chunk_choices(problem):
            for boundary in boundaries(problem, cuts):
                yield Knobs(update_mode=mode, slots=slots, cuts=cuts, boundary=boundary, buffers=buffers)


def fill(problem: Problem, knobs: Knobs) -> tuple[Plan, list[Shortage]]:
    """Fills the tiers under `knobs`; less each time that one comes out too full."""
    room = {tier: float(size) for tier, size in capacities(problem).items()}
    for attempt in range(ATTEMPTS):
        plan = expand(problem, knobs, _fractions(problem, knobs, room), planner="greedy")
        short = shortages(problem, plan)
        if not short or attempt == ATTEMPTS - 1:
            break
        for shortage in short:
            room[shortage.tier] -= 1.02 * (shortage.need_bytes - shortage.have_bytes) + SLACK_BYTES
    return plan, short


def room_left(problem: Problem, knobs: Knobs, room: dict[str, float]) -> dict[str, float]:
    """What DEVICE and HOST have beyond what every plan under `knobs` needs if all blocks stream."""
    workload = problem.workload
    classes = workload.classes
    slot, edge = slot_bytes(problem)
    through = lookup_bytes(problem)
    again = max(chunk_bytes(problem, knobs, entry) for entry in classes)
    device = room["device"] - sum(fixed_device_bytes(problem, knobs).values())
    device -= knobs.slots * slot + EDGE_SLOTS * edge + again + through["device"] + tiled_bytes(problem)
    device -= sum(e.count * e.stored_bytes for e in classes if e.weights_stay)
    host = room["host"] - sum(fixed_host_bytes(problem, knobs).values())
    if room["nvme"] > 0 and not problem.hardware.unified:
        host -= knobs.buffers.host_slots * slot + EDGE_SLOTS * edge
    host -= through["host"]
    return {"device": device, "host": host}


def _fractions(problem: Problem, knobs: Knobs, room: dict[str, float]) -> list[Fractions]:
    """Shares of each class, from the bytes that each tier has to give."""
    workload, unified = problem.workload, problem.hardware.unified
    classes = workload.classes
    left = room_left(problem, knobs, room)
    device, host = left["device"], left["host"]
    total_inputs = sum(e.count * e.saved[0].bytes_per_token for e in classes if e.saved) * workload.pass_tokens
    total_weights = float(sum(e.count * e.streamed_bytes for e in classes)) - tiled_bytes(problem)
    total_tables = float(sum(e.count * e.streamed_bytes for e in classes if workload.rows_of(e) is not None))
    total_state = float(sum(e.count * whole_state_bytes(problem, e) for e in classes))

    def share(available: float, wanted: float) -> float:
        return max(0.0, min(1.0, available / wanted)) if wanted else 1.0

    inputs_device = 1.0 if device >= total_inputs else 0.0
    device -= inputs_device * total_inputs
    inputs_host = 0.0 if unified else (1 - inputs_device) * share(host, total_inputs)
    if not problem.capabilities.input_shares:
        inputs_host = float(inputs_host == 1.0)
    host -= inputs_host * total_inputs
    whole = problem.capabilities.whole_weights and workload.mutable
    tables = (1.0, 0.0, 0.0)
    if device < total_weights:  # what is read by rows makes room for the others first
        fits = not unified and host - slab_bytes(problem) >= total_tables
        tables = (0.0, 1.0, 0.0) if fits else (0.0, 0.0, 1.0)
        host -= tables[1] * total_tables
        total_weights -= total_tables
    weights_device = share(device, total_weights)
    weights_device = float(weights_device == 1.0) if whole else weights_device
    device -= weights_device * total_weights
    weights_host = 0.0 if unified else min(1 - weights_device, share(host, total_weights))
    weights_host = float(weights_host == 1.0) if whole else weights_host
    host -= weights_host * total_weights
    state_device = share(device, total_state) if unified or not total_state else 0.0
    state_tiers = problem.capabilities.state_tiers
    # Without a drive, what does not fit above has to be in HOST (or DEVICE), and the shortage is found there.
    drives = room["nvme"] > 0
    if not drives:
        weights_host, inputs_host = (0.0, 0.0) if unified else (1 - weights_device, 1 - inputs_device)
        weights_device, inputs_device = (1.0, 1.0) if unified else (weights_device, inputs_device)
        tables = tables if tables[0] else (1.0, 0.0, 0.0) if unified else (0.0, 1.0, 0.0)
    state_host = 0.0 if unified else (share(host, total_state) if drives else 1.0)
    state_device = 1.0 if unified and not drives else state_device
    inputs = (0.0, max(0.0, 1 - inputs_device - inputs_host), inputs_host, inputs_device)
    if Tier.NVME not in state_tiers:
        state_device = float(Tier.DEVICE in state_tiers)
        state_host = 1 - state_device
    elif not may_rest(problem, knobs.update_mode, Tier.NVME if weights_device + weights_host < 1 else None, True):
        state_device, state_host = 0.0, 0.0
    place = UpdatePlace.DEVICE if unified else UpdatePlace.CPU
    deferred = knobs.update_mode is UpdateMode.DEFERRED
    updates = {
        (Tier.NVME, place, deferred): max(0.0, 1 - state_host - state_device),
        (Tier.HOST, place, deferred): state_host,
        (Tier.DEVICE, UpdatePlace.DEVICE, deferred): state_device,
    }
    streamed = (weights_device, weights_host, max(0.0, 1 - weights_device - weights_host))

    def weights(entry: BlockClass) -> tuple[float, float, float]:
        if entry.in_tiles:
            return 0.0, float(not drives), float(drives)
        if entry.weights_stay or workload.tiles_of(entry) is not None:
            return 1.0, 0.0, 0.0
        return streamed if workload.rows_of(entry) is None else tables

    return [
        Fractions(
            weights=weights(e),
            tokens=tuple((1.0, 0.0, 0.0, 0.0) if s.recomputable else inputs for s in e.saved),
            updates=updates,
        )
        for e in classes
    ]


def shortages(problem: Problem, plan: Plan, room: dict[str, float] | None = None) -> list[Shortage]:
    """Tiers that a step or a save overfills, with the phase of the peak. `room` replaces the capacities."""
    step, save, have = peak_bytes(problem, plan), saving_bytes(problem, plan), room or capacities(problem)
    found = []
    for tier in have:
        if (need := max(step[tier], save[tier])) > have[tier]:
            phase = "save" if save[tier] > step[tier] else peak_phase(problem, plan, tier)
            found.append(Shortage(tier, need, have[tier], phase))
    return found


def infeasible(short: list[Shortage], ways_out: list[str] | None = None) -> PlanInfeasible:
    """The error for the plan that came closest."""
    worst = max(short, key=lambda s: s.need_bytes / max(1.0, s.have_bytes))
    budgets = " and ".join(
        f"a drive with {format_bytes_up(round(s.need_bytes))} free"
        if s.tier == "nvme"
        else f"{s.tier}_memory of {format_bytes_up(round(s.need_bytes))}"
        for s in short
    )
    return PlanInfeasible(
        tier=worst.tier,
        phase=worst.phase,
        need_bytes=round(worst.need_bytes),
        have_bytes=round(worst.have_bytes),
        ways_out=[budgets] if ways_out is None else ways_out,
        needs={s.tier: round(s.need_bytes) for s in short},
    )
