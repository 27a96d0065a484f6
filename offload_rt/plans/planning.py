"""The optimiser's question about the model at hand, and its plan as the runtime executes it.

Blocks have the bytes that they are stored in and the seconds that one of them was measured to take; capacities are the
budgets. Memory that the runtime needs besides (activations, freed memory held back, rounding to pages) is what the
fixed rule plans for it, so that a plan that fits the question fits the runtime.

    Workload, StreamingProblem ──► Problem ──► `optimiser.mip` ──► Plan with classes ──► `lowered` ──► check_plan
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from offload_rt.dtypes import torch_dtype
from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.layers.discover import BlockDraft
from offload_rt.plans.planning_blocks import class_of, kind_of, needed_again, passes_of, passes_of_edge
from offload_rt.plans.planning_budgets import in_budgets, passing_of, with_slack, within_budgets
from offload_rt.plans.planning_tokens import input_staging_bytes, policies_of, rounding_of, sizes_of
from offload_rt.plans.workload_sizes import OPTIMIZER_BYTES_PER_ELEMENT
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.profiling.chunk_profile import profile_chunked_layer
from offload_rt.profiling.edge_profile import profile_head, updates_per_second
from offload_rt.profiling.profile_cost import profiled
from offload_rt.profiling.workbench import Workbench, workbench_of
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.wiring.workload import Workload
from planners.optimiser.mip import plan_optimal
from planners.optimiser.rows import Freedoms
from planners.plans.placement import Tier, UpdateMode
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import BlockClass, Capabilities, Problem, Training
from planners.problems.problem import Workload as PlannedWorkload
from planners.rule.attempts import CHUNK_TOKENS, TIGHT_SLACK_BYTES, head_chunk_tokens
from planners.rule.edges import tiled_block
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.static_memory import capacities

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
leaves of DEVICE memory is granted besides: where too little is, a step trims the heap and faults its pages in again.
Where nothing fits beside that, as little is reserved as by the fixed rule's tightest plans (`optimal`)."""
KEPT_PER_HOLE_BYTE = 2
"""Holes among activations that are kept came to 0.33 and 0.45 of these (8 layers, 512 and 1024 tokens)."""


def measured_problem(
    workload: Workload, streaming: StreamingProblem, hardware: Hardware, *, chunk_tokens: int | None = None
) -> Problem:
    """The question, after one layer and the head were timed on the device that will compute: blocks for seconds.

    `hardware` gives rates; memory and drives are as `streaming` says. chunk_tokens: of the chunks in which layers run;
    None: whole. ConfigError for what cannot be asked, PlanInfeasible where a GPU has no room for that.
    """
    if workload.training is not None and not workload.training.adapters:
        raise ConfigError("plan: layers train here, about which `planning_training` asks")

    def profile() -> tuple[dict[str, MeasuredSeconds], Hardware, MeasuredSeconds]:
        machine = hardware
        with workbench_of(workload.config) as bench:
            seconds = layer_seconds(workload, chunk_tokens, bench)
            trained = [p for p in workload.layers[0].modules[0].parameters() if p.requires_grad]
            if trained:
                device = replace(hardware.device, adamw_params_per_second=updates_per_second(trained, bench))
                machine = replace(hardware, device=device)
            return seconds, machine, _head_seconds(workload, streaming, chunk_tokens, bench)

    seconds, machine, head = profiled(profile, workload, streaming, hardware, chunk_tokens)
    return problem_of(workload, streaming, machine, seconds, head)


def layer_seconds(workload: Workload, chunk_tokens: int | None, bench: Workbench) -> dict[str, MeasuredSeconds]:
    """Of each layer by its name, one of each kind being timed."""
    config = workload.config
    first: dict[str, MeasuredSeconds] = {}
    for draft in workload.layers:
        kind = kind_of(draft)
        if kind not in first:
            size = {"batch_size": config.batch_size, "seq_len": config.seq_len}
            if chunk_tokens is None:
                first[kind] = profile_layer(workload.model, draft, **size, bench=bench)
            else:
                first[kind] = profile_chunked_layer(
                    workload.model, draft, **size, chunk_tokens=chunk_tokens, bench=bench
                )
    return {draft.name: first[kind_of(draft)] for draft in workload.layers}


def optimised_adapters(workload: Workload, streaming: StreamingProblem, hardware: Hardware) -> tuple[Plan, Problem]:
    """The optimiser's plan where adapters train, and the question that it answers. Blocks for seconds.

    With layers whole, if that fits, or by the longest chunks that do, and the head by tiles only where nothing else
    fits: `streaming.cuts` says which of these must be.
    Raises ConfigError for what cannot be asked, and what `plan_optimal` raises.
    """
    failure: PlanInfeasible | None = None
    for chunk_tokens in chunk_lengths(streaming):
        try:
            whole = measured_problem(workload, streaming, hardware, chunk_tokens=chunk_tokens)
        except PlanInfeasible as error:
            failure = failure or error
            continue
        for problem in by_head(whole, streaming):
            try:
                plan, problem = optimal(problem, streaming)
                return lowered(plan, streaming, problem), problem
            except PlanInfeasible as error:
                failure = failure or error  # of what is cut least, if that was asked about: it helps most
    raise failure or ConfigError("plan: no question can be asked about this workload")


def optimal(problem: Problem, streaming: StreamingProblem, freedoms: Freedoms | None = None) -> tuple[Plan, Problem]:
    """The optimiser's plan for `problem`, or, where none fits, for the same with as little slack as the rule grants at
    least; and which of them it answers.

    Raises what `plan_optimal` raises, `PlanInfeasible` in the user's budgets.
    """
    slack_bytes = min(problem.slack_bytes, TIGHT_SLACK_BYTES)
    memory_bytes = problem.hardware.device.memory_bytes  # more than a budget that is less than what is reserved
    tight = with_slack(problem, slack_bytes, min(memory_bytes, streaming.device_capacity_bytes or memory_bytes))
    for asked in [problem] if slack_bytes == problem.slack_bytes else [problem, tight]:
        try:
            return plan_optimal(asked, freedoms=freedoms), asked
        except PlanInfeasible as error:
            failure = in_budgets(error, streaming, asked)
    raise failure


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
    tokens = config.batch_size * config.seq_len
    chunk_tokens = next((s.chunks.num_tokens for s in layer_seconds.values() if s.chunks is not None), None)
    trainable = [p for p in workload.model.parameters() if p.requires_grad]
    item_bytes = max((p.element_size() for p in trainable), default=4)
    planned = PlannedWorkload(
        name=type(workload.model).__name__,
        training=Training.ADAPTERS,
        classes=_classes(workload, streaming, layer_seconds, head_seconds, chunk_tokens),
        hidden=round(streaming.layer_input_bytes / tokens / 2),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        state_bytes_per_param=OPTIMIZER_BYTES_PER_ELEMENT,
        gradient_bytes_per_param=item_bytes,
        weight_bytes_per_param=item_bytes,
        clips=config.max_grad_norm is not None,
        head_tile_tokens=head_chunk_tokens(streaming, chunk_tokens) or tokens,
        slab_bytes=0,  # slabs are ordinary memory, and come when a step's activations are gone
        input_staging_bytes=input_staging_bytes(streaming),
        micro_batches=config.accumulation_steps,
    )
    counted = planned.trainable_params * (2 * item_bytes + OPTIMIZER_BYTES_PER_ELEMENT)
    # What lies in DEVICE memory besides, whatever the plan.
    slack_bytes = streaming.slack_bytes(chunk_tokens) // SLACK_DIVISOR
    reserve = max(0, streaming.trainable_bytes - counted) + slack_bytes
    more = rounding_of(
        list(layer_seconds.values()), input_bytes=streaming.layer_input_bytes, seq_len=config.seq_len,
        unified=streaming.unified,
    )  # fmt: skip
    more += passing_of(workload, streaming, chunk_tokens)
    return Problem(
        hardware=within_budgets(hardware, streaming, reserve, len(workload.drafts) * IO_ALIGNMENT_BYTES, more),
        workload=planned,
        capabilities=replace(CAPABILITIES, token_chunks=chunk_tokens is not None),
        slack_bytes=slack_bytes,
    )


def _classes(
    workload: Workload,
    streaming: StreamingProblem,
    layer_seconds: dict[str, MeasuredSeconds],
    head_seconds: MeasuredSeconds,
    chunk_tokens: int | None,
) -> tuple[BlockClass, ...]:
    """Layers by kind and by what they were measured to take; then each block outside them."""
    config = workload.config
    tokens = config.batch_size * config.seq_len
    order = {draft.name: position for position, draft in enumerate(_in_order(workload))}
    kinds: dict[tuple[str, MeasuredSeconds], list[BlockDraft]] = {}
    for draft in workload.layers:
        kinds.setdefault((kind_of(draft), layer_seconds[draft.name]), []).append(draft)
    classes = []
    for number, ((_, seconds), drafts) in enumerate(kinds.items()):
        name = f"layer {number}" if len(kinds) > 1 else "layer"
        passes = passes_of(seconds, streaming, tokens, config.seq_len)
        params = sum(p.numel() for p in drafts[0].modules[0].parameters() if p.requires_grad)
        stepped = params if workload.training is None else 0
        classes.append(class_of(name, drafts, order, passes, is_layer=True, trainable_params=stepped))
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    nothing = MeasuredSeconds(forward=0.0, backward=0.0)
    tile_tokens = head_chunk_tokens(streaming, chunk_tokens)
    head_bytes = 0 if streaming.loss_head is None else streaming.loss_head.peak_bytes(tile_tokens)
    rows = {block.name: block.rows for block in streaming.edges if block.product is None}  # tied: a slot, or by tiles
    for draft in edges:
        seconds, peak = (head_seconds, head_bytes) if draft is edges[-1] else (nothing, 0)
        again = needed_again(draft, streaming, chunk_tokens)
        passes = passes_of_edge(seconds, peak, chunk_tokens, tokens, visits_backward=again)
        classes.append(class_of(draft.name, [draft], order, passes, is_layer=False, rows=rows.get(draft.name)))
    return tuple(classes)


def lowered(plan: Plan, streaming: StreamingProblem, problem: Problem) -> Plan:
    """The optimiser's plan for `problem` as the runtime reads it, with what that decides by itself: tiles of the loss,
    freed memory held back.
    """
    sizes = sizes_of(plan, problem.workload.batch_size)
    most = streaming.slack_bytes(problem.workload.measured_chunk_tokens)
    wanted = most + (0 if sizes is None else sizes.kept_bytes // KEPT_PER_HOLE_BYTE)
    room = capacities(problem)["device"] - plan.arena(Tier.DEVICE.value).num_bytes
    return replace(
        plan,
        fingerprint=streaming.fingerprint,
        machine="",
        activations=policies_of(plan),
        head_chunk_tokens=head_chunk_tokens(streaming, problem.workload.measured_chunk_tokens),
        allocator_slack_bytes=min(wanted, problem.slack_bytes + max(0, room)),
    )


def _in_order(workload: Workload) -> list[BlockDraft]:
    """All blocks as forward visits them: the last edge is the head, the others come before the layers."""
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    return [*edges[:-1], *workload.layers, *edges[-1:]]


def _head_seconds(
    workload: Workload, streaming: StreamingProblem, chunk_tokens: int | None, bench: Workbench
) -> MeasuredSeconds:
    """Of head and loss; nothing where the model has none that the runtime knows."""
    edges = [draft for draft in workload.drafts if not draft.is_layer]
    if streaming.loss_head is None or not edges:
        return MeasuredSeconds(forward=0.0, backward=0.0)
    (vocabulary, hidden), dtype = edges[-1].spec.tensors[0].shape[:2], edges[-1].spec.tensors[0].dtype
    tokens = streaming.loss_head.num_tokens
    return profile_head(
        hidden_size=hidden, vocabulary=vocabulary, num_tokens=tokens,
        tile_tokens=head_chunk_tokens(streaming, chunk_tokens) or tokens, dtype=torch_dtype(dtype), bench=bench,
    )  # fmt: skip
