"""What an engine says of itself: what is in effect, what moved, what it cost, and who holds memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from offload_rt.config import EngineConfig
from offload_rt.memory.process_memory import peak_resident_bytes
from offload_rt.plans.cuts import cuts_to_json
from offload_rt.quantized import codec
from offload_rt.running import comparison
from offload_rt.running.comparison import compared
from offload_rt.running.rehearsal import Rehearsal
from offload_rt.running.steps import StepMeter
from offload_rt.tokenwise.layer import TokenwiseLayer
from offload_rt.wiring.runtime import Runtime
from planners.errors import format_bytes
from planners.plans.activations import Action
from planners.plans.plan import Plan, Tier


def report(
    runtime: Runtime,
    config: EngineConfig,
    *,
    step: int,
    wear_from: tuple[int, int],
    base_bytes: int,
    step_meter: StepMeter,
    rehearsal: Rehearsal,
    replanning: Mapping[str, Any],
    peaks: Mapping[str, Any],
) -> dict[str, Any]:
    """What moved, what it cost, and who holds memory, since the start. Bytes and seconds.

    Of the process's memory, `base_bytes` were there before the engine; `managed_bytes` are booked against the
    budgets: `arena_bytes` of them lie in our arenas, the rest is left to PyTorch's allocator, whose own entry says
    what it was planned to take, and by how much the process has grown beside arenas, as seen between layers: by what
    Python and libraries took as well, without pages of files. `predicted` is the
    optimiser's expectation of a steady step, `steady_step` what the newest steps took beside it (`comparison`);
    `link_busy_seconds` what emulated links and drives worked; `peaks` the most that there was, by phase (`peaks`).
    """
    rehearsed = None if rehearsal.outcome is None else rehearsal.outcome.measured_bytes
    return {
        "step": step,
        "plan": runtime.plan.planner,
        "cuts": cuts_to_json(runtime.cuts),
        "plan_choice": None if runtime.made_of.choice is None else asdict(runtime.made_of.choice),
        "predicted": runtime.plan.predicted or None,
        "steady_step": _steady_step(runtime, step_meter),
        "replanning": replanning,
        "rehearsal": None if rehearsal.outcome is None else asdict(rehearsal.outcome),
        **_moved(runtime, _bytes_written_per_step(runtime, config, step, wear_from)),
        **_waited_for(runtime),
        **_done_in_layers(runtime),
        **_store_and_device(runtime, config),
        **_memory(runtime, {**peaks, "allocator": {**peaks["allocator"], "rehearsed_bytes": rehearsed}}, base_bytes),
    }


def _moved(runtime: Runtime, written_per_step: Mapping[str, float]) -> dict[str, Any]:
    """Over links and to and from drives; of those that are emulated, what they worked."""
    links = runtime.links
    return {
        "link_busy_seconds": None if links.throttle is None else links.throttle.busy_seconds(),
        "bytes_read": links.counters.bytes_read,
        "bytes_written": links.counters.bytes_written,
        **written_per_step,
        "bytes_copied": links.counters.bytes_copied,
    }


def _waited_for(runtime: Runtime) -> dict[str, Any]:
    """How well blocks came ahead of their use."""
    executors = runtime.counters_of_rings().values()
    return {
        "stall_seconds": runtime.links.counters.stall_seconds,
        "fetches": sum(c.num_fetches for c in executors),
        "scheduled_fetches": sum(c.scheduled_fetches for c in executors),
        "prefetch_hits": sum(c.num_hits for c in executors),
        "prefetch_misses": sum(c.num_misses for c in executors),
        "replans": sum(c.num_replans for c in executors),
    }


def _done_in_layers(runtime: Runtime) -> dict[str, Any]:
    """What mechanisms of computing did, each by its own counters; None for those that are not there."""
    return {
        "layer_inputs_not_put_away": runtime.layer_counters.num_not_stashed,
        "loss_head": None if runtime.loss_head is None else runtime.loss_head.report(),
        "lookups": None if runtime.rows is None else asdict(runtime.rows.counters),
        "passed_on": runtime.turns.num_passed_on,
        "training": runtime.training.report(),
        "tokenwise": None if runtime.tokenwise is None else runtime.tokenwise.report(),
        "transients": asdict(runtime.transients.counters),
        "recomputes": runtime.layer_counters.num_recomputes,
        "products_left_out": runtime.layer_counters.num_products_left_out,
        "packed_products": runtime.products.counters.num_packed_products,
        "decodes": runtime.decoder.counters.num_decodes,
        "decoded_elements": runtime.decoder.counters.decoded_elements,
        "decode_overflow_bytes": runtime.decoder.counters.overflow_bytes,
    }


def _store_and_device(runtime: Runtime, config: EngineConfig) -> dict[str, Any]:
    """What they are, and which of the ways to read, copy and decode this machine has."""
    store, io = runtime.store, runtime.links.io
    return {
        "stored_bytes": sum(block.spec.stored_bytes for block in runtime.blocks),
        "store_was_cached": runtime.store_was_cached,
        "direct_io": None if store is None else store.direct and io.direct,
        "io": io.name,
        "io_memory_not_registered": io.refusal or None,
        "drives": [] if store is None else [asdict(profile) for profile in store.profiles],
        "device": config.device,
        "gpu": getattr(runtime.device, "report", lambda: None)(),
        "nf4": codec.backend(device=config.device),
    }


def _memory(runtime: Runtime, peaks: Mapping[str, Any], base_bytes: int) -> dict[str, Any]:
    """Who holds it: see `report`."""
    accounts, heap = runtime.tiers.accounts, runtime.heap
    in_memory = [account for tier, account in accounts.items() if tier is not Tier.NVME]
    managed, in_arenas = sum(a.used_bytes for a in in_memory), sum(a.arena_bytes for a in in_memory)
    return {
        "memory": {tier.value: account.used_bytes for tier, account in accounts.items()},
        "holdings": {tier.value: dict(account.holdings) for tier, account in accounts.items() if account.holdings},
        "peaks": peaks,
        "base_bytes": base_bytes,
        "managed_bytes": managed,
        "arena_bytes": in_arenas,
        "allocator": {
            "planned_bytes": managed - in_arenas,
            "bytes": max(0, heap.above_base_bytes() - in_arenas),
            "peak_bytes": max(0, heap.counters.peak_bytes - in_arenas),
            "trims": heap.counters.num_trims,
            "trimmed_bytes": heap.counters.returned_bytes,
            "mapped_from_bytes": heap.mapped.least_bytes,
        },
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _bytes_written_per_step(
    runtime: Runtime, config: EngineConfig, step: int, wear_from: tuple[int, int]
) -> dict[str, float]:
    """To the drives: the mean of this process's steps, with its commits and copies of state, and what is expected.

    Expected are batches of full size. Whole models that are saved are not counted.
    """
    first_step, written = wear_from
    steps = step - first_step
    # What waits between forward and backward is written once a micro-batch; layer inputs have room for two.
    waiting = runtime.tiers.accounts[Tier.NVME].holdings.get("layer inputs, activations", 0)
    micro_batches = 1 if runtime.plan.layer_major else config.accumulation_steps  # together, they all have room
    expected = waiting / (1 + (runtime.plan.layer_inputs is Tier.NVME)) * micro_batches
    training = runtime.training.report()
    if training is not None:
        expected += training["expected_bytes_written_per_step"]
    return {
        "bytes_written_per_step": (runtime.links.counters.bytes_written - written) / steps if steps else 0.0,
        "expected_bytes_written_per_step": expected,
    }


def in_short(runtime: Runtime, step_meter: StepMeter) -> str:
    """What a steady step takes, what binds and how far that is from the plan; empty while there is none."""
    steady = _steady_step(runtime, step_meter)
    return "" if steady is None else comparison.in_short(steady)


def _steady_step(runtime: Runtime, step_meter: StepMeter) -> dict[str, Any] | None:
    steady = step_meter.steady()
    if steady is None:
        return None
    return compared(
        steady.seconds, steady.outside_seconds, steady.resources, len(step_meter.steps), runtime.plan.predicted
    )


def summary(runtime: Runtime, config: EngineConfig, step_meter: StepMeter, peaks: Mapping[str, Any]) -> str:
    """What is in effect, in a few lines, and what a steady step takes, once there are some."""
    plan = runtime.plan
    lines = [f"plan: {plan.planner}; layer inputs wait in {plan.layer_inputs.value}"]
    if runtime.made_of.choice is not None:
        lines.append(str(runtime.made_of.choice))
    lines += _weights_lines(plan)
    lines += _computing_lines(runtime, config)
    if config.bits == 4:
        lines.append(str(runtime.coverage))
    lines += _memory_lines(runtime)
    direct = "" if runtime.store is None else " (buffered)"
    if runtime.store is not None and runtime.store.direct and runtime.links.io.direct:
        direct = " past the page cache"
    lines.append(f"I/O by {runtime.links.io.name}{direct}; NF4 by {codec.backend(device=config.device)}")
    if (steady := _steady_step(runtime, step_meter)) is not None:
        lines += comparison.lines(steady)
        lines.append("at most, by phase:")
        lines += [f"  {line}" for line in comparison.peak_lines(peaks)]
    return "\n".join(lines)


def _weights_lines(plan: Plan) -> Iterator[str]:
    """Where weights rest, how many are in device memory at a time, and what the plan expects of that."""
    for ring in plan.rings:
        splits = [plan.weights_of(name) for name in ring.blocks]
        in_host = sum(split is not None and split.host_bytes == split.total_bytes for split in splits)
        also = f" and {in_host} in {Tier.HOST.value}" if in_host and ring.rest is not Tier.HOST else ""
        yield (
            f"{ring.name}: {len(ring.blocks) - in_host * bool(also)} blocks rest in {ring.rest.value}{also}, "
            f"{ring.num_slots} at a time in device memory ({format_bytes(ring.device_bytes)})"
        )
    if plan.lookups is not None:
        yield (
            f"lookups: rows of {' and '.join(plan.lookups.blocks)} rest in {plan.lookups.rest.value}, "
            f"{format_bytes(plan.lookups.room_bytes)} at a time in device memory"
        )
    if plan.head_tiles is not None:
        tiles = plan.head_tiles
        yield (
            f"head: {tiles.block} rests in {tiles.rest.value}, {tiles.num_slots} tiles of {tiles.tile_rows} rows at a "
            f"time in device memory ({format_bytes(tiles.slots_bytes)})"
        )
    if plan.predicted:
        busy = plan.predicted["busy_seconds"]
        binding = max(busy, key=lambda name: float(busy[name]))
        yield f"predicted: {plan.predicted['step_seconds']:.3g} s a step, {busy[binding]:.3g} of it {binding}"
    if plan.resident:
        yield f"resident: {len(plan.resident)} blocks"


def _computing_lines(runtime: Runtime, config: EngineConfig) -> Iterator[str]:
    """Where state rests and is stepped, and what is computed otherwise than plain torch would."""
    plan, training = runtime.plan, runtime.training.report()
    if training is not None:
        state, held = training["state_bytes"], training["state_in_memory_bytes"]
        places = [f"{format_bytes(held)} in memory"] if held else []
        places += [f"{format_bytes(state - held)} on NVME"] if state > held else []
        share = sum(plan.state.on_device.values()) if plan.state is not None else 0
        there = f", {share} pieces on the device" if share else ""
        yield f"{runtime.training.state_name}: {', '.join(places)}; updates: {training['mode']}{there}"
    if plan.head_chunk_tokens is not None:
        yield f"the loss of batches over {plan.head_chunk_tokens} tokens is taken in tiles of that many"
    if plan.packed_products:
        yield f"products of few tokens by packed weights, of {len(plan.packed_products)} shapes"
    if plan.layer_major:
        declared = config.accumulation_steps
        yield f"the micro-batches of a train_batch go through the layers together, {declared} to a fetch"
    if plan.activations:
        tiers = {tier.value for policy in plan.activations.values() for tier in policy.tiers}
        swapped = f"; swapped ones wait in {' and '.join(sorted(tiers))}" if tiers else ""
        spans = [layer.policy.spans(config.seq_len) for layer in runtime.layers if isinstance(layer, TokenwiseLayer)]
        stored = sum(of[0].action is not Action.RECOMPUTE for of in spans)
        whole = f"kept or put away of {stored} of {len(runtime.layers)} layers"
        yield f"activations {whole if all(len(of) == 1 for of in spans) else 'by chunks of tokens'}{swapped}"


def _memory_lines(runtime: Runtime) -> Iterator[str]:
    for tier, account in runtime.tiers.accounts.items():
        if account.holdings:
            limit = f" of {format_bytes(account.capacity_bytes)}" if account.capacity_bytes else ""
            yield f"{tier.value} memory: {format_bytes(account.used_bytes)}{limit} planned"
    if runtime.device is not None and (pageable := runtime.device.pageable_bytes):
        way = "go through a locked ring" if runtime.device.rings is not None else "hold up the computation"
        yield f"{format_bytes(pageable)} of host memory could not be locked: copies of it {way}"
