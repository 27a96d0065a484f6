"""A plan with what the runtime's options override, and what a plan says of one layer of a workload."""

from __future__ import annotations

from dataclasses import replace

from offload_rt.layers.discover import BlockDraft
from offload_rt.plans.workload_sizes import block_size, is_looked_up, is_multiplied, is_tied
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.wiring.runtime_options import DEVICE_SLOTS, RuntimeOptions
from offload_rt.wiring.workload import Workload
from planners.plans.activations import ActivationPolicy
from planners.plans.placement import ClassPlan
from planners.plans.plan import Plan, Ring, Split
from planners.plans.training_state import TrainingSizes
from planners.rule.attempts import STEPPED_THERE
from planners.rule.edges import head_tiles_of, lookups_of


def policy_of(plan: Plan, draft: BlockDraft) -> ActivationPolicy | None:
    """How the plan wants a layer's activations treated; None recomputes it whole."""
    policies = plan.activations or {}
    return policies.get(draft.name, policies.get(type(draft.modules[0]).__name__)) if draft.is_layer else None


def chunk_tokens_of(plan: Plan, workload: Workload) -> int | None:
    """The largest chunk in which `plan` runs layers; None where one of them runs whole."""
    largest = 0
    for draft in workload.layers:
        policy = policy_of(plan, draft)
        spans = () if policy is None else policy.spans(workload.config.seq_len)
        if len(spans) < 2:
            return None
        largest = max(largest, *(span.end - span.start for span in spans))
    return largest or None


def with_options(plan: Plan, workload: Workload, options: RuntimeOptions, sizes: TrainingSizes | None = None) -> Plan:
    """The plan with what the options override."""
    drafts = workload.drafts
    if options.layer_inputs is not None:
        plan = replace(plan, layer_inputs=options.layer_inputs)
    if options.decode_scope is not None:
        plan = replace(plan, decode_scope=options.decode_scope)
    if options.head_chunk_tokens is not None:
        plan = replace(plan, head_chunk_tokens=options.head_chunk_tokens)
    if isinstance(options.activations, ActivationPolicy):
        plan = replace(plan, activations={d.name: options.activations for d in drafts if d.is_layer})
    elif options.activations is not None:
        plan = replace(plan, activations=dict(options.activations))
    if options.state is not None:
        plan = replace(plan, state=options.state)
    if isinstance(options.packed_products, dict):
        plan = replace(plan, packed_products=options.packed_products)
    if options.device_share is not None and plan.state is not None and sizes is not None:
        state = plan.state.stepped_on_device(sizes, options.device_share, slots=DEVICE_SLOTS)
        items = {**plan.peak_bytes.get("device", {}), STEPPED_THERE: state.device_bytes(sizes)}
        plan = replace(plan, state=state, peak_bytes={**plan.peak_bytes, "device": items})
    if options.weight_shares is not None:
        plan = with_shares(plan, drafts, *options.weight_shares)
    if options.layer_major is not None:
        plan = replace(plan, layer_major=options.layer_major)
    if options.update_mode is not None:
        plan = replace(plan, update_mode=options.update_mode)
    if options.num_slots is not None:
        rings = tuple(
            replace(ring, num_slots=min(options.num_slots, len(ring.blocks))) if ring.name == "layers" else ring
            for ring in plan.rings
        )
        plan = replace(plan, rings=rings)
    if options.stream_edges and plan.rings:
        by_rows = sizes is None or sizes.adapters
        plan = _with_streamed_edges(
            plan, workload, options.head_tile_rows if by_rows else None, look_up_rows=options.look_up_rows and by_rows
        )
    if options.room_bytes is not None and plan.lookups is not None:
        pages_bytes = 2 * options.room_bytes if plan.lookups.pages_bytes else 0
        lookups = replace(plan.lookups, room_bytes=options.room_bytes, pages_bytes=pages_bytes)
        plan = replace(plan, lookups=lookups)
    return plan


def _with_streamed_edges(plan: Plan, workload: Workload, head_tile_rows: int | None, *, look_up_rows: bool) -> Plan:
    """The plan with what of embedding and head is resident streaming."""
    num_tokens = workload.config.batch_size * workload.config.seq_len
    edges = [d for d in workload.drafts if not d.is_layer and d.name in plan.resident]
    by_tiles = (d for d in edges if is_multiplied(d) or (look_up_rows and is_tied(d)))
    tiled = None if head_tile_rows is None else next(by_tiles, None)
    looked_up = [d for d in edges if look_up_rows and (is_looked_up(d) or (is_tied(d) and d is tiled))]
    whole = [d for d in edges if d not in looked_up and d is not tiled]
    rest = plan.rings[0].rest
    if tiled is not None:
        size = block_size(tiled, most_rows=num_tokens)
        plan = replace(plan, head_tiles=head_tiles_of(size, rest, plan.head_chunk_tokens, head_tile_rows))
    if looked_up:
        sizes = tuple(block_size(d, most_rows=num_tokens) for d in looked_up)
        plan = replace(plan, lookups=lookups_of(sizes, rest))
    if whole:
        ring = Ring(
            name="edges", blocks=tuple(d.name for d in whole), num_slots=1,
            slot_bytes=max(d.spec.stored_bytes for d in whole), rest=rest,
        )  # fmt: skip
        plan = replace(plan, rings=(*plan.rings, ring))
    names = {d.name for d in edges}
    return replace(plan, resident=tuple(name for name in plan.resident if name not in names))


def with_shares(plan: Plan, drafts: list[BlockDraft], in_device: float, in_host: float) -> Plan:
    """The plan with the blocks of its rings cut so. Its classes say nothing else."""
    specs = {draft.name: draft.spec for draft in drafts}
    splits: dict[str, Split] = {}
    for name in (name for ring in plan.rings for name in ring.blocks):
        total = specs[name].stored_bytes
        device_bytes = max(cut for cut in specs[name].cuts_bytes if cut <= in_device * total and cut < total)
        host_bytes = int(in_host * total) // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES
        host_bytes = total - device_bytes if in_device + in_host >= 1.0 else min(host_bytes, total - device_bytes)
        splits[name] = Split(
            device_bytes=device_bytes, host_bytes=host_bytes, nvme_bytes=total - device_bytes - host_bytes
        )
    rings = tuple(
        replace(ring, slot_bytes=max(splits[name].streamed_bytes for name in ring.blocks)) for ring in plan.rings
    )
    classes = tuple(ClassPlan(name=name, blocks=(name,), weights=split) for name, split in splits.items())
    return replace(plan, rings=rings, classes=classes)
