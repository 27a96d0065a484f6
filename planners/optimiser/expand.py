"""From fractions of classes and discrete knobs to a `Plan` in whole bytes, tokens and parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planners.plans.placement import ClassPlan, Cuts, Split, Tier, TokenSplit, Update, UpdateMode, UpdatePlace
from planners.plans.plan import Plan, Ring
from planners.plans.vocabulary import HeadTiles, Lookups, RowsSize
from planners.problems.cost import EDGE_SLOTS, Knobs, num_chunks
from planners.problems.problem import BlockClass, Problem, Workload
from planners.simulator.arenas import with_arenas
from planners.simulator.division import deal, divide, divided
from planners.simulator.optimizer_state import buckets
from planners.simulator.simulate import Simulation
from planners.simulator.static_memory import saving_bytes, slab_bytes, static_bytes
from planners.units import PAGE_BYTES

UpdateKey = tuple[Tier, UpdatePlace, bool]
"""Where state rests, who steps it, and whether in the next forward."""
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Fractions:
    """The continuous choices for one class. Each tuple and the values of `updates` sum to one."""

    weights: tuple[float, float, float]
    """DEVICE, HOST, NVME."""
    tokens: tuple[tuple[float, float, float, float], ...]
    """For each saved tensor: recomputed, NVME, HOST, DEVICE."""
    updates: dict[UpdateKey, float]


def whole_numbers(total: int, fractions: tuple[float, ...]) -> list[int]:
    """`total` split as `fractions` say; the largest share takes what rounding leaves."""
    kept = [f if f > NEGLIGIBLE else 0.0 for f in fractions]
    scale = sum(kept) or 1.0
    parts = [int(total * f / scale) for f in kept]
    parts[max(range(len(kept)), key=lambda i: kept[i])] += total - sum(parts)
    return parts


def expand(problem: Problem, knobs: Knobs, fractions: list[Fractions], *, planner: str) -> Plan:
    """A plan that says what the fractions say. Its prediction is added by `with_prediction`.

    Where chunks are treated whole, shares of tokens are shares of them, and the plan may divide classes (`division`).
    """
    pairs = list(zip(problem.workload.classes, fractions, strict=True))
    if not problem.capabilities.token_shares:
        chunks = num_chunks(problem, knobs.cuts)
        pairs = [part for entry, own in pairs for part in _in_whole_chunks(entry, own, chunks)]
    workload = replace(problem.workload, classes=tuple(entry for entry, _ in pairs))
    knobs = replace(knobs, buffers=replace(knobs.buffers, buckets_per_block=max(map(buckets, workload.classes))))
    classes = tuple(_expand(problem, knobs.cuts, entry, own) for entry, own in pairs)
    rings = []
    for name, is_layer, slots in (("layers", True, knobs.slots), ("edges", False, EDGE_SLOTS)):
        placed = dict(zip((e.name for e in workload.classes), classes, strict=True))
        members = [
            e for e in workload.classes
            if e.is_layer is is_layer and workload.in_ring(e) and placed[e.name].weights.streamed_bytes
        ]  # fmt: skip
        if members:
            order = sorted((p, b) for e in members for p, b in zip(e.positions, e.blocks, strict=True))
            rests = [placed[e.name].weights for e in members]
            rings.append(
                Ring(
                    name=name,
                    blocks=tuple(block for _, block in order),
                    num_slots=min(slots, len(order)),
                    slot_bytes=max(rest.streamed_bytes for rest in rests),
                    rest=Tier.NVME if any(rest.nvme_bytes for rest in rests) else Tier.HOST,
                )
            )
    lookups = _lookups(workload, classes)
    head_tiles = _head_tiles(workload, classes)
    streamed = {block for ring in rings for block in ring.blocks} | {*(lookups.blocks if lookups is not None else ())}
    streamed |= {head_tiles.block} if head_tiles is not None else set()
    inputs = [t for entry in classes for t in entry.tokens if t.name == "input"]
    home = Tier.DEVICE
    if any(t.nvme_tokens for t in inputs):
        home = Tier.NVME
    elif any(t.host_tokens for t in inputs):
        home = Tier.HOST
    plan = Plan(
        fingerprint=problem.workload.fingerprint,
        machine=problem.machine,
        planner=planner,
        resident=tuple(block for entry in classes for block in entry.blocks if block not in streamed),
        rings=tuple(rings),
        layer_inputs=home,
        decode_scope=knobs.decode_scope,
        lookups=lookups,
        head_tiles=head_tiles,
        classes=classes,
        buffers=knobs.buffers,
        cuts=knobs.cuts,
        update_mode=knobs.update_mode,
        boundary=knobs.boundary,
        layer_major=problem.workload.layer_major,
    )
    return with_arenas(divided(problem, plan), plan)


def _lookups(workload: Workload, classes: Sequence[ClassPlan]) -> Lookups | None:
    """Of the embeddings that are read by rows. All rest in one tier, or the plan is not valid."""
    sizes: dict[str, RowsSize] = {}
    rest = Tier.HOST
    for entry, placed in zip(workload.classes, classes, strict=True):
        size = workload.looked_up_of(entry)
        if size is not None and placed.weights.streamed_bytes:
            sizes |= dict.fromkeys(entry.blocks, size)
            rest = Tier.NVME if placed.weights.nvme_bytes else rest
    return Lookups.of(sizes, rest) if sizes else None


def _head_tiles(workload: Workload, classes: Sequence[ClassPlan]) -> HeadTiles | None:
    """Of the head that goes by tiles, if one does."""
    for entry, placed in zip(workload.classes, classes, strict=True):
        if placed.weights.streamed_bytes and workload.tiles_of(entry) is not None:
            return workload.tiles_of(entry, Tier.NVME if placed.weights.nvme_bytes else Tier.HOST)
    return None


def _in_whole_chunks(entry: BlockClass, fractions: Fractions, chunks: int) -> list[tuple[BlockClass, Fractions]]:
    """A class by what is done with what its blocks save beside their input, and its fractions for each part."""
    again = [index for index, saved in enumerate(entry.saved) if saved.recomputable]
    if not again:
        return [(entry, fractions)]
    if chunks > 1:
        dealt = deal(entry, [whole_numbers(entry.count * chunks, fractions.tokens[index]) for index in again])
        return [(part, _with_shares(fractions, dict(zip(again, own, strict=True)), chunks)) for own, part in dealt]
    counts = whole_numbers(entry.count, fractions.tokens[again[0]])
    found = []
    for home, part in divide(entry, counts):
        own = tuple(int(home == each) for each in range(4))
        found.append((part, _with_shares(fractions, dict.fromkeys(again, own), 1)))
    return found


def _with_shares(fractions: Fractions, counts: dict[int, tuple[int, ...]], chunks: int) -> Fractions:
    """The fractions with so many of the chunks of a block, for each saved tensor that `counts` names."""
    tokens = list(fractions.tokens)
    for index, (again, low, middle, kept) in counts.items():
        tokens[index] = (again / chunks, low / chunks, middle / chunks, kept / chunks)
    return replace(fractions, tokens=tuple(tokens))


def _token_counts(problem: Problem, cuts: Cuts, split: tuple[float, float, float, float], *, whole: bool) -> list[int]:
    """A sequence's tokens as a split says. whole: of chunks, the last of which may be shorter."""
    seq_len = problem.workload.seq_len
    if not whole:
        return whole_numbers(seq_len, split)
    parts, done, begin = [], 0, 0
    for count in whole_numbers(num_chunks(problem, cuts), split):
        done += count
        end = min(done * cuts.chunk_tokens, seq_len)
        parts.append(end - begin)
        begin = end
    return parts


def _expand(problem: Problem, cuts: Cuts, entry: BlockClass, fractions: Fractions) -> ClassPlan:
    tokens = []
    for saved, split in zip(entry.saved, fractions.tokens, strict=True):
        whole = saved.recomputable and not problem.capabilities.token_shares
        parts = _token_counts(problem, cuts, split, whole=whole)
        again, low, middle, kept = parts
        tokens.append(
            TokenSplit(
                name=saved.name,
                recompute_tokens=again,
                nvme_tokens=low,
                host_tokens=middle,
                device_tokens=kept,
                bytes_per_token=saved.bytes_per_token,
            )  # fmt: skip
        )
    updates: list[Update] = []
    if entry.trainable_params:
        if problem.workload.device_steps is not None and entry.state_cuts:
            updates = _in_pieces(entry, fractions.updates)
        else:
            updates = _in_ranges(entry, fractions.updates)
    return ClassPlan(
        name=entry.name,
        blocks=entry.blocks,
        weights=_split(
            entry,
            fractions.weights,
            drives=bool(problem.hardware.drives),
            whole=not problem.workload.in_ring(entry),
        ),
        tokens=tuple(tokens),
        updates=tuple(updates),
    )


def _in_ranges(entry: BlockClass, shares: dict[UpdateKey, float]) -> list[Update]:
    """A range for each share. What is stepped on the device comes first: gradients there are the scarcer ones."""
    keys = sorted(shares, key=lambda key: key[1] is UpdatePlace.CPU)
    counts = _cut(entry, keys, whole_numbers(entry.trainable_params, tuple(shares[key] for key in keys)))
    return [
        Update(params=count, tier=tier, place=place, deferred=deferred)
        for (tier, place, deferred), count in zip(keys, counts, strict=True)
        if count
    ]


def _in_pieces(entry: BlockClass, shares: dict[UpdateKey, float]) -> list[Update]:
    """The first pieces rest in memory, NVME gets the more; the last ones are the device's, the nearest number of them.

    pieces      |  HOST, CPU  |  HOST, DEVICE  |  NVME, DEVICE  |        or     | HOST, CPU | NVME, CPU | NVME, DEVICE |
    """
    params, cuts = entry.trainable_params, [end for end, _ in entry.state_cuts]
    on_nvme = sum(share for (tier, _, _), share in shares.items() if tier is Tier.NVME)
    on_device = sum(share for (_, place, _), share in shares.items() if place is UpdatePlace.DEVICE)
    first, _ = whole_numbers(params, (sum(shares.values()) - on_nvme, on_nvme))
    in_memory = max(cut for cut in cuts if cut <= first)
    begin = min(cuts, key=lambda cut: abs(cut - (1 - on_device) * params))
    updates = []
    for low, high in itertools.pairwise(sorted({0, in_memory, begin, params})):
        tier = Tier.HOST if high <= in_memory else Tier.NVME
        place = UpdatePlace.CPU if high <= begin else UpdatePlace.DEVICE
        updates.append(Update(params=high - low, tier=tier, place=place))
    return updates


def _cut(entry: BlockClass, keys: list[UpdateKey], counts: list[int]) -> list[int]:
    """The counts, of which those in memory come first, so that state is cut where it can be; NVME gets the more."""
    if not entry.state_cuts:
        return counts
    wanted = end = 0
    found = []
    for key, count in zip(keys, counts, strict=True):
        wanted += count
        last = key is keys[-1]
        cut = entry.trainable_params if last else max(p for p, _ in entry.state_cuts if p <= wanted)
        found.append(cut - end)
        end = cut
    return found


def _split(entry: BlockClass, fractions: tuple[float, float, float], *, drives: bool, whole: bool) -> Split:
    """A block's bytes as the fractions say; where they can only be cut in some places, lower tiers get the more.

    whole: not cut at all, the largest fraction gets them; but for what stays beside the matrix of a head.
    """
    if whole:
        most = max(range(len(fractions)), key=lambda tier: fractions[tier])
        fractions = (float(most == 0), float(most == 1), float(most == 2))
    beside = entry.beside_product_bytes if whole else 0
    device, host, nvme = whole_numbers(entry.stored_bytes - beside, fractions)
    device += beside
    if entry.weight_cuts and device < entry.stored_bytes:
        device = max(cut for cut in entry.weight_cuts if cut <= device)
        streamed = entry.stored_bytes - device
        host = host // PAGE_BYTES * PAGE_BYTES if drives and nvme else streamed if not nvme else host
        nvme = streamed - host
    return Split(device_bytes=device, host_bytes=host, nvme_bytes=nvme)


def with_prediction(
    problem: Problem, plan: Plan, simulation: Simulation, *, bound_seconds: float | None = None, **more: object
) -> Plan:
    """`plan` with what the simulator expects of it. Without a bound there is no gap."""
    problem = divided(problem, plan)
    workload, hardware = problem.workload, problem.hardware
    seconds = simulation.step_seconds
    written = simulation.busy_seconds["ssd_write"] * hardware.write_bytes_per_second if hardware.drives else 0.0
    predicted: dict[str, object] = {
        "step_seconds": seconds,
        "tokens_per_second": workload.micro_batches * workload.tokens / seconds,
        "flops_per_second": workload.useful_flops / seconds,
        "lower_bound_seconds": bound_seconds,
        "gap": None if bound_seconds is None else max(0.0, 1 - bound_seconds / seconds),
        "busy_seconds": simulation.busy_seconds,
        "peak_bytes": {tier: round(size) for tier, size in simulation.peak_bytes.items()},
        "phase_peak_bytes": phase_peaks(problem, plan, simulation),
        "ssd_bytes_written_per_step": round(written),
        "days_to_endurance": None,
        "expected_redo_seconds": expected_redo_seconds(problem, plan),
        **more,
    }
    if written and hardware.endurance_bytes:
        predicted["days_to_endurance"] = hardware.endurance_bytes / (written / seconds) / 86400
    items = {
        tier: {name: round(size) for name, size in sizes.items()} for tier, sizes in static_bytes(problem, plan).items()
    }
    for tier in ("device", "host"):
        moving = round(simulation.peak_bytes[tier]) - sum(items[tier].values())
        if moving > 0:
            items[tier]["activations, gradients and state in flight"] = moving
    return replace(plan, predicted=predicted, peak_bytes=items)


def expected_redo_seconds(problem: Problem, plan: Plan) -> float:
    """What doing speculative updates again costs a step on average; not part of `step_seconds`.

    All updates once more, as fast as their slowest resource, in one step of `1 / redo_probability`.
    """
    if plan.update_mode is not UpdateMode.SPECULATIVE:
        return 0.0
    workload, hardware = problem.workload, problem.hardware
    cpu = device = state = 0.0
    for entry, placed in zip(workload.classes, plan.classes, strict=True):
        for update in placed.updates:
            params = entry.count * update.params
            if update.place is UpdatePlace.CPU:
                cpu += params / hardware.host.adamw_params_per_second
            else:
                device += params / hardware.device.adamw_params_per_second
            state += workload.state_bytes_per_param * params if update.tier is Tier.NVME else 0
    drives = 0.0
    if state:
        both = state / hardware.read_bytes_per_second + state / hardware.write_bytes_per_second
        drives = both / (1 + hardware.drive_mix)
    return workload.redo_probability * max(cpu, device, drives)


def phase_peaks(problem: Problem, plan: Plan, simulation: Simulation) -> dict[str, dict[str, int]]:
    """Peak bytes by tier in every phase of a run. Reading a model in and saving it go through slabs."""
    static = static_bytes(problem, plan)
    weights = {tier: static[tier].get("weights", 0.0) + static[tier].get("optimizer state", 0.0) for tier in static}
    weights["device"] += static["device"].get("resident weights", 0.0)
    weights["device"] += static["device"].get("adapters and their gradients", 0.0)
    slab, through = slab_bytes(problem), "device" if problem.hardware.unified else "host"
    saving = saving_bytes(problem, plan)
    everything = {tier: sum(items.values()) for tier, items in static.items()}
    phases = {}
    for tier in ("device", "host", "nvme"):
        at_rest = round(weights[tier]) + (slab if tier == through else 0)
        own = simulation.phase_peak_bytes.get(tier, {})
        phases[tier] = {
            "ingest": at_rest,
            **{phase: round(own.get(phase, everything[tier])) for phase in ("forward", "backward", "update")},
            "save": round(saving[tier]),
            "resume": at_rest,
        }
    return phases
