"""Checks a plan the slow, obvious way. Shares sizes of blocks with the planners, but none of their reasoning.

`check` raises `InvalidPlan` for the first thing that is wrong: a byte placed twice or nowhere, a mode that the runtime
does not have, a tier that overflows, a replay that uses what has not arrived, or that does other work than `step_work`
sums up by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from planners.errors import format_bytes
from planners.plans.activations import Group
from planners.plans.layout import Arena, Buffer
from planners.plans.placement import ClassPlan, Tier, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.plans.schedule import Phase
from planners.plans.vocabulary import Lookups, RowsSize
from planners.problems.cost import knobs_of
from planners.problems.problem import BlockClass, Problem, Workload
from planners.simulator.arenas import (
    chunk_arena_name,
    chunk_buffers,
    peak_bytes,
    slot_buffers,
    step_buffers,
    swapped_bytes,
)
from planners.simulator.division import divided
from planners.simulator.optimizer_state import update_bytes
from planners.simulator.simulate import Event, Simulation, simulate
from planners.simulator.static_memory import capacities, saving_bytes
from planners.simulator.step_work import busy_seconds, floor_seconds, written_bytes
from planners.simulator.timeline import Resource

TOLERANCE = 1e-6


class InvalidPlan(ValueError):
    """The plan does not do what a plan must do."""


def check(problem: Problem, plan: Plan) -> Simulation:
    """Everything. Returns the replay, so that what was checked is what is reported."""
    check_fingerprints(problem, plan)
    try:
        problem = divided(problem, plan)
    except ValueError as error:
        raise InvalidPlan(str(error)) from None
    check_placement(problem, plan)
    check_modes(problem, plan)
    check_layout(problem, plan)
    replay = simulate(problem, plan, keep_events=True)
    check_capacity(problem, plan, replay)
    check_busy(problem, plan, replay)
    check_replay(replay)
    floor = floor_seconds(problem)
    if replay.step_seconds < floor * (1 - TOLERANCE):
        raise InvalidPlan(f"takes {replay.step_seconds:.6g} s a step; no plan can take less than {floor:.6g} s")
    return replay


def check_fingerprints(problem: Problem, plan: Plan) -> None:
    """The plan is for this workload, and for this machine if it names one."""
    if plan.fingerprint != problem.workload.fingerprint:
        raise InvalidPlan(f"made for workload {plan.fingerprint}, this one is {problem.workload.fingerprint}")
    if plan.machine and plan.machine != problem.machine:
        raise InvalidPlan(f"made for machine {plan.machine}, this one is {problem.machine}")


def check_placement(problem: Problem, plan: Plan) -> None:
    """Each byte, token and parameter has exactly one place."""
    workload = problem.workload
    names = [entry.name for entry in plan.classes]
    if names != [entry.name for entry in workload.classes]:
        raise InvalidPlan(f"has classes {names}, the workload {[entry.name for entry in workload.classes]}")
    in_rings: dict[str, str] = {}
    for ring in plan.rings:
        for block in ring.blocks:
            if block in in_rings:
                raise InvalidPlan(f"block {block!r} is in rings {in_rings[block]!r} and {ring.name!r}")
            in_rings[block] = ring.name
    for entry, placed in zip(workload.classes, plan.classes, strict=True):
        if placed.blocks != entry.blocks:
            raise InvalidPlan(f"class {entry.name!r} has other blocks than the workload's")
        if placed.weights.total_bytes != entry.stored_bytes:
            raise InvalidPlan(
                f"class {entry.name!r} places {placed.weights.total_bytes} bytes of weights, a block has "
                f"{entry.stored_bytes}"
            )
        if [split.name for split in placed.tokens] != [saved.name for saved in entry.saved]:
            raise InvalidPlan(f"class {entry.name!r}: its saved tensors are not the workload's")
        for saved, split in zip(entry.saved, placed.tokens, strict=True):
            if split.total_tokens != workload.seq_len:
                raise InvalidPlan(f"{entry.name!r}, {saved.name!r}: {split.total_tokens} of {workload.seq_len} tokens")
            if split.recompute_tokens and not saved.recomputable:
                raise InvalidPlan(f"{entry.name!r}, {saved.name!r}: cannot be recomputed, nothing precedes it")
            if not math.isclose(split.bytes_per_token, saved.bytes_per_token, abs_tol=1e-9):
                raise InvalidPlan(
                    f"{entry.name!r}, {saved.name!r}: {split.bytes_per_token} bytes a token, it has "
                    f"{saved.bytes_per_token}"
                )
        if sum(update.params for update in placed.updates) != entry.trainable_params:
            raise InvalidPlan(f"class {entry.name!r}: updates do not cover its {entry.trainable_params} parameters")
        streams = placed.weights.streamed_bytes > 0
        if (size := workload.rows_of(entry)) is not None:
            _check_rows(plan, placed, size)
            continue
        if workload.tiles_of(entry) is not None:
            _check_tiles(workload, plan, placed, entry)
            continue
        for block in entry.blocks:
            if plan.head_tiles is not None and block == plan.head_tiles.block:
                raise InvalidPlan(f"block {block!r} goes by tiles, which the workload's cannot")
            if plan.lookups is not None and block in plan.lookups.blocks:
                raise InvalidPlan(f"block {block!r} is read by rows, which the workload's cannot be")
            if streams and (block not in in_rings or block in plan.resident):
                raise InvalidPlan(f"block {block!r} streams, and must be in a ring and not resident")
            if not streams and (block in in_rings or block not in plan.resident):
                raise InvalidPlan(f"block {block!r} stays in DEVICE memory, and must be resident and in no ring")
    for ring in plan.rings:
        most = max(
            placed.weights.streamed_bytes
            for entry, placed in zip(workload.classes, plan.classes, strict=True)
            if set(entry.blocks) & set(ring.blocks)
        )
        if ring.slot_bytes < most:
            raise InvalidPlan(f"ring {ring.name!r}: a block streams {most} bytes into slots of {ring.slot_bytes}")


def _check_rows(plan: Plan, placed: ClassPlan, size: RowsSize) -> None:
    """An embedding that can be read by rows is, as a whole from one tier and with room for a row, or is resident."""
    lookups, split = plan.lookups, placed.weights
    streams = split.streamed_bytes > 0
    for block in placed.blocks:
        by_rows = lookups is not None and block in lookups.blocks
        in_ring = any(block in ring.blocks for ring in plan.rings)
        if in_ring or by_rows is not streams or (block in plan.resident) is streams:
            raise InvalidPlan(f"block {block!r} is in no ring, but resident or read by rows, as its bytes say")
    if lookups is None or not streams:
        return
    there = {Tier.HOST: split.host_bytes, Tier.NVME: split.nvme_bytes}[lookups.rest]
    if there != split.total_bytes:
        raise InvalidPlan(
            f"class {placed.name!r} is read by rows from {lookups.rest.value}, where {there} of {split.total_bytes} "
            "bytes rest"
        )
    _check_room(lookups, size, placed.name)


def _check_room(lookups: Lookups, size: RowsSize, name: str) -> None:
    """Whether a row goes through the rooms."""
    least_bytes = replace(size, most_rows=1).pages_bytes() if lookups.rest is Tier.NVME else 0
    if lookups.room_bytes < size.row_bytes or lookups.pages_bytes < least_bytes:
        raise InvalidPlan(
            f"class {name!r}: rows of {size.row_bytes} bytes in a room of {lookups.room_bytes}, from pages of "
            f"{lookups.pages_bytes}"
        )


def _check_tiles(workload: Workload, plan: Plan, placed: ClassPlan, entry: BlockClass) -> None:
    """A head that can go by tiles does, its matrix as a whole from one tier, or is resident."""
    tiles, split, size = plan.head_tiles, placed.weights, entry.product
    streams, (block,) = split.streamed_bytes > 0, placed.blocks
    by_tiles = tiles is not None and tiles.block == block
    in_ring = any(block in ring.blocks for ring in plan.rings)
    if entry.in_tiles and not by_tiles:
        raise InvalidPlan(f"block {block!r} stays, but all plans that are asked for take it by tiles")
    if in_ring or by_tiles is not streams or (block in plan.resident) is streams:
        raise InvalidPlan(f"block {block!r} is in no ring, but resident or by tiles, as its bytes say")
    if tiles is None or size is None or not streams:
        return
    there = {Tier.HOST: split.host_bytes, Tier.NVME: split.nvme_bytes}[tiles.rest]
    if there != split.streamed_bytes or there != entry.stored_bytes - entry.beside_product_bytes:
        raise InvalidPlan(
            f"block {block!r} goes by tiles from {tiles.rest.value}, where {there} of {size.num_bytes} bytes rest"
        )
    if entry.rows is not None:
        lookups = plan.lookups
        if lookups is None or block not in lookups.blocks or lookups.rest is not tiles.rest:
            raise InvalidPlan(f"block {block!r} is the embedding, too, whose rows are looked up where its tiles rest")
        _check_room(lookups, entry.rows, placed.name)
    if tiles.tile_rows != (entry.tile_rows or tiles.tile_rows):
        raise InvalidPlan(f"tiles of {tiles.tile_rows} rows, but {entry.tile_rows} are what all plans have in common")
    if tiles.tile_rows * size.row_bytes != tiles.tile_bytes:
        raise InvalidPlan(f"tiles of {tiles.tile_rows} rows, {size.row_bytes} bytes each, in {tiles.tile_bytes} bytes")
    try:
        tiles.check_products(size, num_tokens=workload.head_tile_tokens, batch_tokens=workload.tokens)
    except ValueError as error:
        raise InvalidPlan(str(error)) from None


def check_modes(problem: Problem, plan: Plan) -> None:
    """Only what the runtime declares, and what the workload and the machine allow."""
    workload, can, unified = problem.workload, problem.capabilities, problem.hardware.unified
    mode = plan.update_mode
    if mode not in can.update_modes:
        raise InvalidPlan(f"update mode {mode.value!r} is not among the runtime's")
    updates = [(entry.name, update) for entry in plan.classes for update in entry.updates if update.params]
    if mode is UpdateMode.DEFERRED and workload.sums_gradients:
        raise InvalidPlan("updates in the next forward, where gradients of several micro-batches are summed")
    if workload.clips and mode is UpdateMode.BACKWARD:
        raise InvalidPlan("updates during backward, before the global norm is known that clipping needs")
    if workload.clips and any(not update.deferred for _, update in updates) and mode is UpdateMode.DEFERRED:
        raise InvalidPlan("updates a share during backward, before the global norm is known that clipping needs")
    on_device = any(u.place is UpdatePlace.DEVICE and u.tier is not Tier.DEVICE for _, u in updates)
    if on_device and not can.device_updates and not unified:
        raise InvalidPlan("steps state on the device, which the runtime cannot")
    cuts = knobs_of(plan).cuts
    if cuts.chunk_tokens < workload.seq_len and not can.token_chunks:
        raise InvalidPlan("cuts sequences into chunks, which the runtime cannot")
    if workload.seq_len <= cuts.chunk_tokens < workload.tokens and not can.batch_cuts:
        raise InvalidPlan("cuts the batch, which the runtime cannot")
    if any(update.tier not in can.state_tiers for _, update in updates):
        raise InvalidPlan("optimizer state rests where the runtime cannot have it")
    inputs = [split for entry in plan.classes for split in entry.tokens if split.name == "input"]
    homes = {
        tier
        for split in inputs
        for tier, tokens in ((0, split.device_tokens), (1, split.host_tokens), (2, split.nvme_tokens))
        if tokens
    }
    if len(homes) > 1 and not can.input_shares:
        raise InvalidPlan("layer inputs wait in several tiers, which the runtime cannot")
    if not can.token_shares:
        for kind, placed in zip(workload.classes, plan.classes, strict=True):
            _check_whole_chunks(kind, placed, workload.seq_len, cuts.chunk_tokens)
    for kind, placed in zip(workload.classes, plan.classes, strict=True):
        if kind.weight_cuts and placed.weights.device_bytes not in kind.weight_cuts:
            raise InvalidPlan(f"{kind.name!r}: blocks cannot be cut at {placed.weights.device_bytes} bytes")
    _check_training(problem, plan)
    if cuts.chunk_tokens > workload.seq_len and cuts.chunk_tokens % workload.seq_len:
        raise InvalidPlan(f"chunks of {cuts.chunk_tokens} tokens are no whole sequences of {workload.seq_len}")
    for entry in plan.classes:
        for split in entry.tokens:
            if split.name != "input" and not can.token_policy and split.recompute_tokens != workload.seq_len:
                raise InvalidPlan(f"{entry.name!r}, {split.name!r}: is not recomputed whole, which the runtime cannot")
        on_host = entry.weights.host_bytes or any(s.host_tokens for s in entry.tokens)
        on_host = on_host or any(u.tier is Tier.HOST or u.place is UpdatePlace.CPU for u in entry.updates if u.params)
        if unified and on_host:
            raise InvalidPlan(f"class {entry.name!r} uses HOST, which is DEVICE on this machine")


def _check_whole_chunks(entry: BlockClass, placed: ClassPlan, seq_len: int, chunk_tokens: int) -> None:
    """Of each thing that a block saves beside its input, all tokens of a chunk go one way."""
    again = [split for saved, split in zip(entry.saved, placed.tokens, strict=True) if saved.recomputable]
    for split in again:
        ends = itertools.accumulate((split.recompute_tokens, split.nvme_tokens, split.host_tokens))
        if any(end % chunk_tokens and end != seq_len for end in ends):
            raise InvalidPlan(f"{placed.name!r}: tokens of what it saves go different ways, which the runtime cannot")
    counts = {split.name: split.recompute_tokens for split in again}
    if counts.get(Group.BEFORE.value, 0) > counts.get(Group.AFTER.value, seq_len):
        raise InvalidPlan(f"{placed.name!r}: what precedes attention is computed again where what follows it is not")


def _check_training(problem: Problem, plan: Plan) -> None:
    """What trains rests, and is stepped, as the runtime can have it."""
    can, workload = problem.capabilities, problem.workload
    whole: set[tuple[bool, bool, bool]] = set()
    on_nvme = False
    for kind, placed in zip(workload.classes, plan.classes, strict=True):
        split = placed.weights
        if kind.weights_stay and split.streamed_bytes:
            raise InvalidPlan(f"{kind.name!r}: its weights stay in DEVICE memory, {split.streamed_bytes} bytes stream")
        if kind.trainable_params and kind.streamed_bytes and workload.mutable:
            whole.add((split.device_bytes > 0, split.host_bytes > 0, split.nvme_bytes > 0))
            on_nvme |= split.nvme_bytes > 0
        try:
            update_bytes(problem, placed)
        except ValueError as error:
            raise InvalidPlan(str(error)) from None
    if can.whole_weights and (len(whole) > 1 or any(sum(tiers) > 1 for tiers in whole)):
        raise InvalidPlan("weights that train rest in several tiers, which the runtime cannot")
    updates = [update for placed in plan.classes for update in placed.updates if update.params]
    in_memory = any(update.tier is not Tier.NVME for update in updates) and not workload.pinned
    if can.memory_steps_after and in_memory and on_nvme and plan.update_mode is not UpdateMode.AFTER:
        raise InvalidPlan("has state in memory of weights on NVME, which would be written twice: ahead and after")


def check_layout(problem: Problem, plan: Plan) -> None:
    """Everything that a step needs has a place, nothing live overlaps, and what is promised is what is laid out."""
    chunks = {chunk_arena_name(entry, phase): (entry, phase) for entry in problem.workload.classes for phase in Phase}
    tiers = ["device"] if problem.hardware.unified else ["device", "host"]
    names = [arena.name for arena in plan.arenas]
    if sorted(names) != sorted([*tiers, *chunks]):
        raise InvalidPlan(f"lays out {names}, a step has {[*tiers, *chunks]}")
    slots = {plan.arena(name).slot_bytes for name in chunks}
    if len(slots) > 1:
        raise InvalidPlan(f"its chunks have swap slots of different sizes: {sorted(slots)} bytes")
    for arena in plan.arenas:
        if arena.name in chunks:
            entry, phase = chunks[arena.name]
            wanted = chunk_buffers(problem, plan, entry, phase)
            wanted += slot_buffers(problem, plan, entry, phase, arena.slot_bytes)
            if swapped_bytes(problem, plan, entry, phase) > arena.slot_bytes:
                raise InvalidPlan(f"arena {arena.name!r}: what is swapped of a chunk is more than a slot")
        else:
            wanted = step_buffers(problem, plan, Tier(arena.name))
        check_arena(arena, wanted)
    promised = plan.predicted.get("peak_bytes")
    if promised is not None and promised != {t: round(n) for t, n in peak_bytes(problem, plan).items()}:
        raise InvalidPlan(f"promises peaks of {promised} bytes, its layout takes {peak_bytes(problem, plan)}")


def check_arena(arena: Arena, wanted: Sequence[Buffer]) -> None:
    """The arena holds what is `wanted`, tick by tick side by side, within its bytes and on one side of its slot."""
    for buffer in arena.buffers:
        if buffer.end_bytes > arena.num_bytes:
            raise InvalidPlan(f"arena {arena.name!r}: {buffer.name!r} ends at {buffer.end_bytes} of {arena.num_bytes}")
        if buffer.offset_bytes < arena.slot_bytes < buffer.end_bytes:
            raise InvalidPlan(f"arena {arena.name!r}: {buffer.name!r} lies across the end of the slot")
    have = sorted((b.name, b.begin, b.end, b.num_bytes) for b in arena.buffers)
    needs = sorted((b.name, b.begin, b.end, b.num_bytes) for b in wanted)
    if [h[:3] for h in have] != [n[:3] for n in needs]:
        odd = sorted({h[:3] for h in have} ^ {n[:3] for n in needs})
        raise InvalidPlan(f"arena {arena.name!r}: holds other things than the plan needs: {odd[:3]}")
    for (name, *_, size), (*_, need) in zip(have, needs, strict=True):
        if size < need:
            raise InvalidPlan(f"arena {arena.name!r}: {name!r} has {size} bytes and needs {need}")
    for tick in range(arena.period):
        live = [b for b in arena.buffers if b.begin <= tick < b.end or b.begin <= tick + arena.period < b.end]
        live.sort(key=lambda b: b.offset_bytes)
        for low, high in zip(live, live[1:], strict=False):
            if high.offset_bytes < low.end_bytes:
                raise InvalidPlan(f"arena {arena.name!r}, tick {tick}: {low.name!r} and {high.name!r} overlap")


def check_capacity(problem: Problem, plan: Plan, replay: Simulation) -> None:
    """No tier holds more than it may, in any phase, and the replay no more than the layout has room for."""
    for tier, live in replay.live_bytes.items():
        if live > replay.peak_bytes[tier] + 1:
            raise InvalidPlan(f"{live:.0f} bytes of {tier} are live at once, the layout has {replay.peak_bytes[tier]}")
    saving = saving_bytes(problem, plan)
    for tier, capacity in capacities(problem).items():
        need, phase = max((replay.peak_bytes[tier], "a step"), (saving[tier], "saving"))
        if need > capacity:
            short = format_bytes(need - capacity)
            raise InvalidPlan(
                f"{phase} needs {format_bytes(need)} of {tier}, which has {format_bytes(capacity)}: short {short}"
            )


def check_busy(problem: Problem, plan: Plan, replay: Simulation) -> None:
    """The replay did the work that the plan says, no less and no more."""
    for resource, seconds in busy_seconds(problem, plan).items():
        done = replay.busy_seconds[resource]
        if not math.isclose(seconds, done, rel_tol=1e-6, abs_tol=1e-9):
            raise InvalidPlan(f"{resource} works {done:.9g} s in the replay, and {seconds:.9g} s by the plan")
    if problem.max_written_bytes is not None:
        written = written_bytes(problem, plan)
        if written > problem.max_written_bytes * (1 + TOLERANCE) + 1:
            limit = format_bytes(problem.max_written_bytes)
            raise InvalidPlan(f"writes {format_bytes(written)} a step, {limit} are allowed")


def check_replay(replay: Simulation) -> None:
    """Each resource does one thing at a time, and every block computes after it arrived."""
    for resource in Resource:
        if resource is Resource.NONE:
            continue
        own = sorted((e for e in replay.events if e.resource is resource), key=lambda e: e.start_seconds)
        for first, second in zip(own, own[1:], strict=False):
            if second.start_seconds < first.finish_seconds - 1e-9:
                raise InvalidPlan(f"{resource.name}: {second.label} begins before {first.label} is done")
    _check_order(replay.events)


def _check_order(events: Sequence[Event]) -> None:
    """A block's swapped activations come back after they left, and before its backward.

    What takes no time is no event.
    """
    done = {event.label: event.finish_seconds for event in events}
    for event in events:
        kind, position, chunk = event.label
        if kind == "backward":
            forward = done.get(("forward", position, chunk))
            if forward is not None and event.start_seconds < forward - 1e-9:
                raise InvalidPlan(f"block {position}, chunk {chunk}: backward before forward")
        if kind == "write state" and event.start_seconds < done[("update", position, chunk)] - 1e-9:
            raise InvalidPlan(f"block {position}: writes state that is not updated yet")
