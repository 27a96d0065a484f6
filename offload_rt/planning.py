"""The optimiser's question about the model at hand, and its plan as the runtime executes it.

Blocks have the bytes that they are stored in and the seconds that one of them was measured to take; capacities are the
budgets. Memory that the runtime needs besides (activations, freed memory held back, rounding to pages) is what the
fixed rule plans for it, so that a plan that fits the question fits the runtime.

    Workload, StreamingProblem ──► Problem ──► `planners.mip` ──► Plan with classes ──► `lowered` ──► check_plan
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from offload_rt.block_profile import profile_head, profile_layer, updates_per_second
from offload_rt.chunk_profile import profile_chunked_layer
from offload_rt.discover import BlockDraft
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.planning_tokens import (
    Rounding,
    chunked_bytes,
    policies_of,
    rounding_of,
    saved_of,
    sizes_of,
    transients_of,
)
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.workload import Workload
from offload_rt.workload_sizes import OPTIMIZER_BYTES_PER_ELEMENT
from planners.edges import tiled_block
from planners.greedy import Shortage
from planners.greedy import infeasible as refusal
from planners.hardware import Drive, Hardware
from planners.mip import plan_optimal
from planners.placement import Tier, UpdateMode
from planners.plan import Plan
from planners.problem import BlockClass, Capabilities, MeasuredSeconds, Problem, Training
from planners.problem import Workload as PlannedWorkload
from planners.static_memory import capacities
from planners.streaming import CHUNK_TOKENS, head_chunk_tokens
from planners.streaming_problem import StreamingProblem
from planners.trace import Saved, Transient
from planners.vocabulary import RowsSize
from planners.wear import rated_bytes

CAPABILITIES = Capabilities(
    update_modes=(UpdateMode.AFTER,),
    device_updates=False,
    token_chunks=False,
    token_shares=False,
    batch_cuts=False,
    input_shares=False,
    state_tiers=(Tier.DEVICE,),
    reads_ahead=False,
)
"""What the runtime does with a plan for adapters: weights by byte ranges, layer inputs in one tier, each layer kept,
swapped or recomputed as a whole, adapters stepped where they are after the last backward."""

SLACK_DIVISOR = 4
"""Of the freed memory that the allocator would hold back at best: memory is worth more to what streams. What a plan
leaves of DEVICE memory is granted besides: where too little is, a step trims the heap and faults its pages in again."""
KEPT_PER_HOLE_BYTE = 2
"""Holes among activations that are kept came to 0.33 and 0.45 of these (8 layers, 512 and 1024 tokens)."""


def measured_problem(
    workload: Workload, streaming: StreamingProblem, hardware: Hardware, *, chunk_tokens: int | None = None
) -> Problem:
    """The question, after one layer and the head were timed: blocks for seconds.

    `hardware` gives rates; memory and drives are as `streaming` says. chunk_tokens: of the chunks in which layers run;
    None: whole. ConfigError for what cannot be asked.
    """
    if workload.training is not None and not workload.training.adapters:
        raise ConfigError("plan: layers train here, about which `planning_training` asks")
    config = workload.config
    if config.device != "cpu":
        raise ConfigError("plan: the optimiser's plans run on the CPU device only so far; give plan='auto'")
    first: dict[str, MeasuredSeconds] = {}
    for draft in workload.layers:
        kind = kind_of(draft)
        if kind not in first:
            size = {"batch_size": config.batch_size, "seq_len": config.seq_len}
            if chunk_tokens is None:
                first[kind] = profile_layer(workload.model, draft, **size)
            else:
                first[kind] = profile_chunked_layer(workload.model, draft, **size, chunk_tokens=chunk_tokens)
    seconds = {draft.name: first[kind_of(draft)] for draft in workload.layers}
    trained = [p for p in workload.layers[0].modules[0].parameters() if p.requires_grad]
    if trained:
        device = replace(hardware.device, adamw_params_per_second=updates_per_second(trained))
        hardware = replace(hardware, device=device)
    return problem_of(workload, streaming, hardware, seconds, _head_seconds(workload, streaming, chunk_tokens))


def optimised_adapters(workload: Workload, streaming: StreamingProblem, hardware: Hardware) -> tuple[Plan, Problem]:
    """The optimiser's plan where adapters train, and the question that it answers. Blocks for seconds.

    With layers whole, if that fits, or by the longest chunks that do, and the head by tiles only where nothing else
    fits: `streaming.cuts` says which of these must be.
    Raises ConfigError for what cannot be asked, and what `plan_optimal` raises.
    """
    failure: PlanInfeasible | None = None
    for chunk_tokens in chunk_lengths(streaming):
        whole = measured_problem(workload, streaming, hardware, chunk_tokens=chunk_tokens)
        for problem in by_head(whole, streaming):
            try:
                return lowered(plan_optimal(problem), streaming, problem), problem
            except PlanInfeasible as error:
                # Of what is cut least, if that was asked about: it helps most.
                failure = failure or in_budgets(error, streaming, problem)
    raise failure or ConfigError("plan: no question can be asked about this workload")


def chunk_lengths(streaming: StreamingProblem) -> list[int | None]:
    """Of the chunks to ask about, the best first; None for whole layers."""
    if streaming.cuts is not None:
        return [streaming.cuts.chunk_tokens]
    if streaming.chunked is None:
        return [None]
    return [None, *(tokens for tokens in CHUNK_TOKENS if tokens < streaming.chunked.num_tokens)]


def by_head(problem: Problem, streaming: StreamingProblem) -> Iterator[Problem]:
    """The question of a head that stays as a whole, then of one by tiles; of what the cuts say, if there are any."""
    cuts = streaming.cuts
    if cuts is None or cuts.head_tile_rows is None:
        yield problem
    if (cuts is not None and cuts.head_tile_rows is not None) or (cuts is None and _can_tile(problem, streaming)):
        yield by_tiles(problem, streaming)


def _can_tile(problem: Problem, streaming: StreamingProblem) -> bool:
    """Whether there is a head that can go by tiles, and a place for it to come from."""
    block, head = tiled_block(streaming), problem.workload.classes[-1]
    somewhere = not problem.hardware.unified or bool(problem.hardware.drives)
    return somewhere and block is not None and head.blocks == (block.name,)


def by_tiles(problem: Problem, streaming: StreamingProblem) -> Problem:
    """The same question where the head goes by tiles, in every plan: a cut, with the rows that the cuts have, if they
    say. ConfigError where it cannot.
    """
    block = tiled_block(streaming)
    if block is None or not _can_tile(problem, streaming):
        raise ConfigError("plan: the head goes by tiles, about which the optimiser cannot be asked here")
    *others, head = problem.workload.classes
    tile_rows = None if streaming.cuts is None else streaming.cuts.head_tile_rows
    tiled = replace(head, product=block.product, rows=block.rows, in_tiles=True, tile_rows=tile_rows)
    classes = (*others, tiled)
    return replace(problem, workload=replace(problem.workload, classes=classes))


def problem_of(
    workload: Workload,
    streaming: StreamingProblem,
    hardware: Hardware,
    layer_seconds: dict[str, MeasuredSeconds],
    head_seconds: MeasuredSeconds,
) -> Problem:
    """The question, with the seconds that each layer takes, by its name, and those of head and loss.

    Where adapters' state rests in tiers, without what trains: `planning_adapters` adds that.
    """
    config = workload.config
    kinds: dict[tuple[str, MeasuredSeconds], list[BlockDraft]] = {}
    for draft in workload.layers:
        kinds.setdefault((kind_of(draft), layer_seconds[draft.name]), []).append(draft)
    order = {draft.name: position for position, draft in enumerate(_in_order(workload))}
    tokens = config.batch_size * config.seq_len
    chunk_tokens = next((s.chunks.num_tokens for s in layer_seconds.values() if s.chunks is not None), None)
    tile_tokens = head_chunk_tokens(streaming, chunk_tokens)
    head_bytes = 0 if streaming.loss_head is None else streaming.loss_head.peak_bytes(tile_tokens)
    classes = []
    for number, ((_, seconds), drafts) in enumerate(kinds.items()):
        classes.append(
            class_of(
                f"layer {number}" if len(kinds) > 1 else "layer", drafts, order, seconds, is_layer=True,
                trainable_params=sum(p.numel() for p in drafts[0].modules[0].parameters() if p.requires_grad)
                if workload.training is None
                else 0,
                saved=saved_of(
                    seconds, input_bytes_per_token=streaming.layer_input_bytes / tokens, num_tokens=tokens
                ),
                **_passes_of(seconds, streaming, tokens, config.seq_len),
            )
        )  # fmt: skip
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    nothing = MeasuredSeconds(forward=0.0, backward=0.0)
    rows = {block.name: block.rows for block in streaming.edges if block.product is None}  # tied: a slot, or by tiles
    for draft in edges:
        seconds, peak = (head_seconds, head_bytes) if draft is edges[-1] else (nothing, 0)
        classes.append(
            class_of(
                draft.name, [draft], order, seconds, is_layer=False,
                again=needed_again(draft, streaming, chunk_tokens), rows=rows.get(draft.name),
                **_passes_of_edge(seconds, peak, chunk_tokens, tokens),
            )
        )  # fmt: skip
    trainable = [p for p in workload.model.parameters() if p.requires_grad]
    item_bytes = max((p.element_size() for p in trainable), default=4)
    planned = PlannedWorkload(
        name=type(workload.model).__name__,
        training=Training.ADAPTERS,
        classes=tuple(classes),
        hidden=round(streaming.layer_input_bytes / tokens / 2),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        state_bytes_per_param=OPTIMIZER_BYTES_PER_ELEMENT,
        gradient_bytes_per_param=item_bytes,
        weight_bytes_per_param=item_bytes,
        clips=config.max_grad_norm is not None,
        head_tile_tokens=tile_tokens or tokens,
        slab_bytes=0,  # slabs are ordinary memory, and come when a step's activations are gone
    )
    counted = planned.trainable_params * (2 * item_bytes + OPTIMIZER_BYTES_PER_ELEMENT)
    # What lies in DEVICE memory besides, whatever the plan.
    reserve = max(0, streaming.trainable_bytes - counted) + streaming.slack_bytes(chunk_tokens) // SLACK_DIVISOR
    more = rounding_of(
        list(layer_seconds.values()), input_bytes=streaming.layer_input_bytes, seq_len=config.seq_len,
        unified=streaming.unified,
    )  # fmt: skip
    return Problem(
        hardware=within_budgets(hardware, streaming, reserve, len(workload.drafts) * IO_ALIGNMENT_BYTES, more),
        workload=planned,
        capabilities=replace(CAPABILITIES, token_chunks=chunk_tokens is not None),
    )


def _passes_of(seconds: MeasuredSeconds, streaming: StreamingProblem, num_tokens: int, seq_len: int) -> dict[str, Any]:
    """What a layer's passes need beside what it saves: by tokens, or where it runs by chunks, as it was counted."""
    if seconds.chunks is None:
        whole = streaming.layer_bytes(None)
        return {"transients": transients_of(seconds, layer_bytes=whole, num_tokens=num_tokens)}
    sequence_bytes = 0 if streaming.chunked is None else streaming.chunked.sequence_bytes
    held = chunked_bytes(
        seconds, layer_bytes=streaming.layer_input_bytes, sequence_bytes=sequence_bytes, seq_len=seq_len
    )
    return {"tile_bytes": held}


def _passes_of_edge(seconds: MeasuredSeconds, peak: int, chunk_tokens: int | None, num_tokens: int) -> dict[str, Any]:
    """The same of a block outside the layers, which takes all tokens, or the loss by tiles of its own."""
    if chunk_tokens is not None:
        return {"tile_bytes": peak}
    return {"transients": transients_of(seconds, layer_bytes=peak, num_tokens=num_tokens)}


def lowered(plan: Plan, streaming: StreamingProblem, problem: Problem) -> Plan:
    """The optimiser's plan for `problem` as the runtime reads it, with what that decides by itself: tiles of the loss,
    freed memory held back.
    """
    sizes = sizes_of(plan, problem.workload.batch_size)
    most = streaming.slack_bytes(problem.workload.measured_chunk_tokens)
    wanted = most + (0 if sizes is None else sizes.kept_bytes // KEPT_PER_HOLE_BYTE)
    slack = most // SLACK_DIVISOR
    room = capacities(problem)["device"] - plan.arena(Tier.DEVICE.value).num_bytes
    return replace(
        plan,
        fingerprint=streaming.fingerprint,
        machine="",
        activations=policies_of(plan),
        head_chunk_tokens=head_chunk_tokens(streaming, problem.workload.measured_chunk_tokens),
        allocator_slack_bytes=min(wanted, slack + max(0, room)),
    )


def class_of(
    name: str,
    drafts: list[BlockDraft],
    order: dict[str, int],
    seconds: MeasuredSeconds,
    *,
    is_layer: bool,
    again: bool = True,
    trainable_params: int = 0,
    saved: tuple[Saved, ...] = (),
    transients: tuple[Transient, ...] = (),
    tile_bytes: int = 0,
    rows: RowsSize | None = None,
) -> BlockClass:
    spec = drafts[0].spec
    quantized = [tensor.compute_bytes for tensor in spec.tensors if tensor.is_quantized]
    return BlockClass(
        name=name,
        blocks=tuple(draft.name for draft in drafts),
        positions=tuple(order[draft.name] for draft in drafts),
        is_layer=is_layer,
        stored_bytes=spec.stored_bytes,
        decoded_bytes=sum(quantized),
        largest_linear_bytes=max(quantized, default=0),
        trainable_params=trainable_params,
        forward_flops=0.0,
        backward_flops=0.0,
        attention_flops=0.0,
        moved_bytes=0.0,
        saved=saved,
        attention_bytes=0.0,
        attention_groups=1,
        transients=transients,
        tile_bytes=tile_bytes,
        visits_backward=again,
        weight_cuts=spec.cuts_bytes,
        measured=seconds,
        rows=rows,
    )


def needed_again(draft: BlockDraft, streaming: StreamingProblem, chunk_tokens: int | None = None) -> bool:
    """Whether an edge's weights are needed in backward: a product's, unless tiles take its gradients in forward."""
    at_once = head_chunk_tokens(streaming, chunk_tokens) is None
    return at_once and any(isinstance(module, nn.Linear) for module in draft.modules)


def kind_of(draft: BlockDraft) -> str:
    """Layers of one kind take equally long."""
    shapes = [(tensor.shape, tensor.dtype, tensor.encoding.value) for tensor in draft.spec.tensors]
    trained = [tuple(p.shape) for p in draft.modules[0].parameters() if p.requires_grad]
    return repr((type(draft.modules[0]).__name__, shapes, trained))


def _in_order(workload: Workload) -> list[BlockDraft]:
    """All blocks as forward visits them: the last edge is the head, the others come before the layers."""
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    return [*edges[:-1], *workload.layers, *edges[-1:]]


def _head_seconds(workload: Workload, streaming: StreamingProblem, chunk_tokens: int | None) -> MeasuredSeconds:
    """Of head and loss; nothing where the model has none that the runtime knows."""
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    if streaming.loss_head is None or not edges:
        return MeasuredSeconds(forward=0.0, backward=0.0)
    (vocabulary, hidden), dtype = edges[-1].spec.tensors[0].shape[:2], edges[-1].spec.tensors[0].dtype
    tokens = streaming.loss_head.num_tokens
    return profile_head(
        hidden_size=hidden, vocabulary=vocabulary, num_tokens=tokens,
        tile_tokens=head_chunk_tokens(streaming, chunk_tokens) or tokens, dtype=torch_dtype(dtype),
    )  # fmt: skip


def in_budgets(infeasible: PlanInfeasible, streaming: StreamingProblem, problem: Problem) -> PlanInfeasible:
    """`infeasible`, of `problem`, in the user's budgets, of which that has only what a plan may decide about."""
    device = problem.hardware.device
    budgets = {
        Tier.DEVICE.value: streaming.device_capacity_bytes or device.memory_bytes,
        Tier.HOST.value: streaming.host_capacity_bytes or problem.hardware.host.memory_bytes,
        Tier.NVME.value: streaming.nvme_capacity_bytes or problem.hardware.nvme_bytes,
    }
    beside = {tier: budgets[tier] - have for tier, have in capacities(problem).items()}
    beside[Tier.DEVICE.value] = device.reserve_bytes  # also where it is more than the budget
    short = [
        Shortage(tier, need + beside[tier], budgets[tier], infeasible.phase) for tier, need in infeasible.needs.items()
    ]
    return refusal(short)


def within_budgets(
    hardware: Hardware, streaming: StreamingProblem, reserve_bytes: int, rounding_bytes: int, more: Rounding
) -> Hardware:
    """The machine with the memory that it may use. Its drives' rates are summed, their room is what is free.

    `rounding_bytes` is what whole pages of one thing per block may take more than its bytes: in HOST an input, in
    DEVICE an input, two ends of what stays of the block, and a slot's; `more`, what activations do.
    """
    reserve = reserve_bytes + 4 * rounding_bytes + more.device_bytes + (more.host_bytes if streaming.unified else 0)
    capacity = streaming.device_capacity_bytes or hardware.device.memory_bytes
    drives = hardware.drives
    if streaming.nvme_capacity_bytes is None:
        drives = ()
    elif not drives:
        raise ConfigError("plan: nvme= gives a folder, but the hardware profile knows no drive; calibrate with --nvme")
    else:
        one = Drive(
            capacity_bytes=max(1, streaming.nvme_capacity_bytes - more.nvme_bytes),
            read_bytes_per_second=hardware.read_bytes_per_second,
            write_bytes_per_second=hardware.write_bytes_per_second,
            endurance_bytes=rated_bytes(hardware),
        )
        drives = (one,)
    host = 0 if streaming.unified else streaming.host_capacity_bytes or hardware.host.memory_bytes
    return replace(
        hardware,
        device=replace(hardware.device, memory_bytes=max(capacity, reserve + 1), reserve_bytes=reserve),
        host=replace(hardware.host, memory_bytes=max(0, host - rounding_bytes - more.host_bytes)),
        drives=drives,
        unified=streaming.unified,
    )
