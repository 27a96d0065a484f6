"""The optimiser's question where layers train, and its plan as the runtime executes it.

A block that trains has the state that its pieces take, the gradients that wait for it, and the seconds that stepping
it was measured to take. Two questions are asked where there is a drive, since what a commit writes is no choice within
one: with state on NVMe every step is committed, wherever the rest of it lies; with all of it in memory none is, unless
`commit_every=` says so. The faster plan runs; with all of it in memory, where that costs next to no time.

    TrainedBlock.pieces ──► BlockClass.state_cuts ──► classes[].updates ──► `placement_of` ──► StatePlacement

What the plan's classes say of state is the truth; the `StatePlacement` that is run is made of it here, and `plan_check`
holds a plan that says both to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from offload_rt.errors import ConfigError
from offload_rt.layers.discover import BlockDraft
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.plans.device_share import device_steps
from offload_rt.plans.planning import CAPABILITIES, SLACK_DIVISOR, lowered
from offload_rt.plans.planning_blocks import Passes, class_of, kind_of, needed_again
from offload_rt.plans.planning_budgets import passing_of, within_budgets
from offload_rt.plans.planning_together import by_order
from offload_rt.plans.planning_tokens import input_staging_bytes, rounding_of, saved_of, transients_of
from offload_rt.plans.training_seconds import NOTHING, TrainingSeconds, measured_seconds
from offload_rt.profiling.profile_cost import profiled
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.wiring.runtime_options import DEVICE_SLOTS
from offload_rt.wiring.workload import Workload
from planners.optimiser.rows import Freedoms
from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.plans.plan import Plan, StatePlacement
from planners.plans.training_state import TrainingSizes
from planners.problems.hardware import Hardware
from planners.problems.measured import MeasuredSeconds
from planners.problems.model_workload import SUMMED_BYTES
from planners.problems.problem import BlockClass, Capabilities, Problem, Training
from planners.problems.problem import Workload as PlannedWorkload
from planners.rule.attempts import PAGED_SLOTS, SAVING, STEPPED_THERE, head_chunk_tokens
from planners.rule.streaming_problem import StreamingProblem
from planners.shapes.trace import Transient

MODES = (UpdateMode.BACKWARD, UpdateMode.SPECULATIVE, UpdateMode.AFTER)
LOSS = "loss"
"""The block that takes the head's time, where no weights come after the layers."""


def questions_of(
    workload: Workload, streaming: StreamingProblem, hardware: Hardware, optimizer: torch.optim.Optimizer
) -> list[tuple[Problem, Freedoms]]:
    """`questions` about layers that train, after they were timed. Blocks for seconds; ConfigError for what cannot be
    asked.
    """
    check_can_be_asked(workload)
    seconds = profiled(
        lambda: measured_seconds(workload, streaming, optimizer), workload, streaming, hardware
    )  # fmt: skip
    return list(questions(workload, streaming, hardware, seconds))


def check_can_be_asked(workload: Workload) -> None:
    """Raises ConfigError for what the planner has no words for."""
    if why := why_not_asked(workload):
        raise ConfigError(f"plan: {why}; give plan='auto'")


def why_not_asked(workload: Workload) -> str:
    """What of layers that train the planner has no words for; empty where it can be asked about them."""
    layers = tuple(f"{draft.name}." for draft in workload.layers)
    for block in workload.require_training().blocks:
        if block.weights is None and block.name.startswith(layers):
            return f"{block.name} trains inside a layer, whose weights stay"
    return ""


def questions(
    workload: Workload, streaming: StreamingProblem, hardware: Hardware, seconds: TrainingSeconds
) -> Iterator[tuple[Problem, Freedoms]]:
    """What to ask the optimiser: with all state in memory, and with a drive for it; see above. Of either, where a step
    has several micro-batches, with these one after the other, and with all of them together.
    """
    config = workload.config
    memory = Tier.DEVICE if streaming.unified else Tier.HOST

    def ask(layers: dict[str, MeasuredSeconds], *, commit_every: int | None) -> Problem:
        own = replace(seconds, layers=layers)
        return training_problem(workload, streaming, hardware, own, commit_every=commit_every)

    if not config.nvme or config.commit_every is None:
        for asked in by_order(streaming, seconds.layers, partial(ask, commit_every=None)):
            can = replace(_capabilities(asked, (memory,)), update_modes=(UpdateMode.AFTER,))
            yield replace(asked, capabilities=can), Freedoms(weights=(True, True, bool(config.nvme)))
    if config.nvme:
        every = config.commit_every or 1
        for asked in by_order(streaming, seconds.layers, partial(ask, commit_every=every)):
            can = _capabilities(asked, (memory, Tier.NVME))
            if every > 1:  # there is no commit to go back to
                can = replace(can, update_modes=(UpdateMode.AFTER,))
            yield replace(asked, capabilities=can), Freedoms()


def _capabilities(asked: Problem, state_tiers: tuple[Tier, ...]) -> Capabilities:
    return replace(
        CAPABILITIES, update_modes=MODES, state_tiers=state_tiers, whole_weights=True, memory_steps_after=True,
        device_updates=asked.workload.device_steps is not None, gradients_apart=True,
    )  # fmt: skip


def training_problem(
    workload: Workload,
    streaming: StreamingProblem,
    hardware: Hardware,
    seconds: TrainingSeconds,
    *,
    commit_every: int | None = None,
) -> Problem:
    """The question, but for what the runtime can do: every block that trains, with its pieces of state."""
    config, training, sizes = workload.config, workload.require_training(), streaming.training
    if sizes is None:
        raise ConfigError("plan: no layer trains")
    tokens = config.batch_size * config.seq_len
    items = {trained.parameter.element_size() for block in training.blocks for trained in block.parameters}
    classes = _classes(workload, streaming, seconds)
    params = sum(block.num_elements for block in training.blocks)
    state_bytes_per_param = -(-sizes.state_bytes // params)
    summed = SUMMED_BYTES if config.accumulation_steps > 1 else max(items)
    changing_bytes = sizes.state_bytes + sum(block.weight_bytes for block in sizes.blocks)
    planned = PlannedWorkload(
        name=type(workload.model).__name__,
        training=Training.FULL,
        classes=classes,
        hidden=round(streaming.layer_input_bytes / tokens / 2),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        state_bytes_per_param=state_bytes_per_param,
        gradient_bytes_per_param=max(items),
        weight_bytes_per_param=max(items),
        clips=config.max_grad_norm is not None,
        commit_every=commit_every,
        slab_bytes=0,  # slabs are ordinary memory, and come when a step's activations are gone
        input_staging_bytes=input_staging_bytes(streaming),
        state_piece_bytes=sizes.piece_bytes,
        # Where there is a drive: extents of all that changes, and gradients of a first step, which waits for its norm.
        log_bytes=2 * changing_bytes + sizes.gradient_bytes if config.nvme else 0,
        device_steps=device_steps(
            workload,
            hardware,
            moved_bytes_per_param=2 * state_bytes_per_param + max(items) + summed,
            arrivals_per_second=seconds.arrivals_per_second,
        ),
        micro_batches=config.accumulation_steps,
        summed_gradient_bytes_per_param=SUMMED_BYTES,
        summing_seconds_per_param=1 / seconds.arrivals_per_second,
    )
    # What lies in DEVICE memory besides, whatever the plan: of what trains, the gradient that is made is the planner's
    # where gradients leave DEVICE, and one more where they wait in what is DEVICE as well.
    counted = sum(entry.count * entry.stored_bytes for entry in classes if entry.weights_stay)
    if not streaming.unified:
        counted += max(items) * max(entry.trainable_params for entry in classes)
    slack_bytes = streaming.allocator_slack_bytes // SLACK_DIVISOR
    reserve = max(0, streaming.trainable_bytes - counted) + slack_bytes
    pages = len(workload.drafts) + 2 * len(training.blocks)
    rates = seconds.steps_per_second
    more = rounding_of(
        list(seconds.layers.values()), input_bytes=streaming.layer_input_bytes, seq_len=config.seq_len,
        unified=streaming.unified,
    )  # fmt: skip
    more += passing_of(workload, streaming, None)
    more = replace(more, host_bytes=more.host_bytes + sum(beside_steps(sizes).values()))
    device = hardware.device if workload.has_streams else replace(hardware.device, adamw_params_per_second=rates)
    hardware = replace(hardware, device=device, host=replace(hardware.host, adamw_params_per_second=rates))
    return Problem(
        hardware=within_budgets(hardware, streaming, reserve, pages * IO_ALIGNMENT_BYTES, more),
        workload=planned,
        slack_bytes=slack_bytes,
    )


def lowered_training(plan: Plan, workload: Workload, streaming: StreamingProblem, problem: Problem) -> Plan:
    """The optimiser's plan with what the runtime decides by itself, and where its classes place state."""
    streamed = {draft.name for draft in workload.drafts}
    memory = (Tier.DEVICE if streaming.unified else Tier.HOST).value
    sizes, state = streaming.training, placement_of(plan, workload, unified=streaming.unified)
    peaks = {tier: dict(items) for tier, items in plan.peak_bytes.items()}
    if sizes is not None:
        peaks[memory] = {**peaks.get(memory, {}), **beside_steps(sizes)}
        if state.device_slots:
            device = peaks[Tier.DEVICE.value]
            device.pop("state updated on the device", None)
            device[STEPPED_THERE] = state.device_bytes(sizes)
    return replace(
        lowered(plan, streaming, problem),
        resident=tuple(name for name in plan.resident if name in streamed),
        state=state,
        peak_bytes=peaks,
    )


def beside_steps(sizes: TrainingSizes) -> dict[str, int]:
    """HOST memory that state takes, whatever the plan; of a device's new weights and gradients, on their way."""
    return {
        "commit log": sizes.log_bytes, SAVING: sizes.saving_bytes,
        "new weights on their way to DEVICE": sizes.landing_bytes, "gradients arriving": sizes.arriving_bytes,
    }  # fmt: skip


def placement_of(plan: Plan, workload: Workload, *, unified: bool) -> StatePlacement:
    """What the plan's classes say of state, as the runtime places it. ConfigError for what it cannot."""
    blocks = {block.name: block for block in workload.require_training().blocks}
    named = [name for entry in plan.classes for name in entry.blocks if entry.updates]
    if sorted(named) != sorted(blocks):
        odd = sorted(set(named) ^ set(blocks)) or ["one twice"]
        raise ConfigError(f"plan: updates of its classes are not those of what trains, first odd one: {odd[0]}")
    in_memory: dict[str, int] = {}
    on_device: dict[str, int] = {}
    on_nvme = weights_on_nvme = False
    for entry in plan.classes:
        params = sum(update.params for update in entry.updates if update.tier is not Tier.NVME)
        for block in (blocks[name] for name in entry.blocks if entry.updates):
            cuts = [cut for cut, _ in state_cuts(block)]
            if params not in cuts:
                raise ConfigError(
                    f"plan: state of {params} parameters of {block.name} in memory, which is cut at {cuts}"
                )
            if count := cuts.index(params):
                in_memory[block.name] = count
            if not unified and (there := sum(u.params for u in entry.updates if u.place is UpdatePlace.DEVICE)):
                if cuts[-1] - there not in cuts:
                    raise ConfigError(
                        f"plan: state of the last {there} parameters of {block.name} stepped on the device, which is "
                        f"cut at {cuts}"
                    )
                on_device[block.name] = len(block.pieces) - cuts.index(cuts[-1] - there)
            on_nvme |= count < len(block.pieces)
            weights_on_nvme |= entry.weights.nvme_bytes > 0
    several = workload.config.accumulation_steps > 1
    waits = plan.update_mode is not UpdateMode.BACKWARD or bool(in_memory) or several
    slots = plan.buffers.gradient_slots if unified else plan.buffers.host_gradient_slots
    paged = workload.require_training().adapters and workload.has_streams  # see `planning_adapters`
    if paged:
        on_device = {name: len(block.pieces) for name, block in blocks.items()}
    return StatePlacement(
        in_memory=in_memory,
        gradients=Tier.HOST if waits else Tier.NVME,
        state_slots=plan.buffers.state_slots if on_nvme else 0,
        weight_slots=plan.buffers.weight_slots if weights_on_nvme else 0,
        gradient_slots=0 if waits else slots,
        on_device=on_device,
        device_slots=PAGED_SLOTS if paged else DEVICE_SLOTS if on_device else 0,
    )


def state_cuts(block: TrainedBlock) -> tuple[tuple[int, int], ...]:
    """See `BlockClass.state_cuts`."""
    cuts = [(0, 0)]
    for piece in block.pieces:
        params, num_bytes = cuts[-1]
        cuts.append((params + sum(s.end - s.begin for s in piece.segments), num_bytes + piece.num_bytes))
    return tuple(cuts)


def _classes(workload: Workload, streaming: StreamingProblem, seconds: TrainingSeconds) -> tuple[BlockClass, ...]:
    """Layers by kind; what trains outside them, a class each; what is frozen there, as it is stored."""
    trained = {block.name: block for block in workload.require_training().blocks}
    order = _in_order(workload)
    tokens = workload.config.batch_size * workload.config.seq_len
    tile_tokens = head_chunk_tokens(streaming)
    head_bytes = 0 if streaming.loss_head is None else streaming.loss_head.peak_bytes(tile_tokens)
    kinds: dict[tuple[str, MeasuredSeconds, bool], list[BlockDraft]] = {}
    for draft in workload.layers:
        kinds.setdefault((kind_of(draft), seconds.layers[draft.name], draft.trains), []).append(draft)
    classes = []
    for number, ((_, taken, trains), drafts) in enumerate(kinds.items()):
        block = trained.get(drafts[0].name)
        params = 0 if block is None else block.num_elements
        taken = _with_deliveries(taken, params / seconds.deliveries_per_second)
        passes = Passes(
            seconds=taken,
            saved=saved_of(taken, input_bytes_per_token=streaming.layer_input_bytes / tokens, num_tokens=tokens),
            transients=transients_of(taken, layer_bytes=streaming.layer_bytes(None), num_tokens=tokens),
        )
        name = f"layer {number}" if len(kinds) > 1 else "layer"
        entry = class_of(name, drafts, order, passes, is_layer=True, trainable_params=params)
        if trains and block is not None:
            entry = replace(entry, weight_cuts=(), state_cuts=state_cuts(block))
        classes.append(entry)
    last = max(order, key=lambda name: order[name])
    of_head = transients_of(seconds.head, layer_bytes=head_bytes, num_tokens=tokens)
    for draft in workload.drafts:
        if not draft.is_layer:
            taken, held = (seconds.head, of_head) if draft.name == last else (NOTHING, ())
            passes = Passes(seconds=taken, visits_backward=needed_again(draft, streaming), transients=held)
            classes.append(class_of(draft.name, [draft], order, passes, is_layer=False))
    for block in trained.values():
        if block.weights is None:
            own = seconds.embeddings.get(block.name, NOTHING)
            taken = MeasuredSeconds(
                forward=seconds.head.forward if block.name == last else 0.0,
                backward=own.backward + block.num_elements / seconds.deliveries_per_second,
            )
            held = of_head if block.name == last else ()
            classes.append(_staying_class(block.name, order[block.name], taken, block, held))
    if last == LOSS:
        classes.append(_staying_class(LOSS, order[LOSS], seconds.head, None, of_head))
    return tuple(classes)


def _with_deliveries(taken: MeasuredSeconds, seconds: float) -> MeasuredSeconds:
    """Of a block whose gradients are put where they wait, which takes so long, whatever backward computes again."""
    kept = taken.kept
    if kept is not None:
        kept = replace(kept, backward=kept.backward + seconds)
    return replace(taken, backward=taken.backward + seconds, kept=kept)


def _staying_class(
    name: str, position: int, taken: MeasuredSeconds, block: TrainedBlock | None, transients: tuple[Transient, ...]
) -> BlockClass:
    """What stays in DEVICE memory as a whole: outside the layers, what trains does."""
    return BlockClass(
        name=name, blocks=(name,), positions=(position,), is_layer=False,
        stored_bytes=0 if block is None else block.weights_bytes, decoded_bytes=0, largest_linear_bytes=0,
        trainable_params=0 if block is None else block.num_elements, forward_flops=0.0, backward_flops=0.0,
        attention_flops=0.0, moved_bytes=0.0, saved=(), attention_bytes=0.0, attention_groups=1, transients=transients,
        measured=taken, weights_stay=True, state_cuts=() if block is None else state_cuts(block),
    )  # fmt: skip


def _in_order(workload: Workload) -> dict[str, int]:
    """All blocks by the position at which forward visits them: outside the layers, in the model's order."""
    order = {name: index for index, (name, _) in enumerate(workload.model.named_parameters(remove_duplicate=False))}
    begins: dict[str, float] = {}
    for draft in workload.drafts:
        begins[draft.name] = min(order[entry.name] for entry in draft.parameters)
    for block in workload.require_training().blocks:
        if block.weights is None:
            begins[block.name] = order[block.name]
    if not workload.layers or max(begins[draft.name] for draft in workload.layers) == max(begins.values()):
        begins[LOSS] = float("inf")
    return {name: position for position, name in enumerate(sorted(begins, key=lambda name: begins[name]))}
