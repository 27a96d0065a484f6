"""What is to be run: a model's blocks, where their values come from, and the question that the planner is asked.

Reads headers and shapes only; nothing of the model, the drive or memory is changed here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import nn

from offload_rt.checkpoint import Checkpoint, map_checkpoint
from offload_rt.checkpoint.ingest import Sources, sources_in_memory, store_key
from offload_rt.checkpoint.sources import TensorSource
from offload_rt.commit_layout import LOG_BUFFER_BYTES
from offload_rt.config import EngineConfig
from offload_rt.cuda_memory import capacity_bytes
from offload_rt.discover import BlockDraft, find_blocks
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.nf4_products import Way
from offload_rt.optimizer.arrivals import ARRIVING_SLOTS, largest_arrival_bytes
from offload_rt.optimizer.landing import LANDING_SLOTS, largest_range_bytes
from offload_rt.optimizer.on_device import stepping_bytes
from offload_rt.optimizer.pieces import PIECE_ELEMENTS, TrainedBlock, TrainedParameter, trained_block
from offload_rt.optimizer.rules import UpdateRule, rule_for
from offload_rt.profile import (
    chunked_size,
    estimate_activation_bytes,
    free_memory_bytes,
    layer_input_bytes,
    loss_head_size,
)
from offload_rt.store import store_folders, usable_bytes
from offload_rt.streams import Device
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transients import LEAST_BYTES
from planners.activations import ActivationPolicy
from planners.placement import ClassPlan, UpdateMode
from planners.plan import DecodeScope, Plan, Ring, Split, Tier
from planners.products import PackedProducts
from planners.streaming import BlockSize, Cuts, StreamingProblem, head_tiles_of, lookups_of
from planners.training_state import StatePlacement, TrainedSize, TrainingSizes
from planners.vocabulary import RowsSize


class MemoryMeter(Protocol):
    """A context manager that counts what torch allocates inside."""

    peak_bytes: int
    """The most that was live at once, of what was allocated inside. Once it is left."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...


class TensorDevice(Device, Protocol):
    """A device with streams whose memory torch computes in."""

    @property
    def device(self) -> torch.device: ...

    def meter(self) -> MemoryMeter:
        """Counts what its allocator hands out, arenas included."""

    def keep_within(self, budget_bytes: int) -> None:
        """Gives freed memory back where all that the process holds of the device is more than `budget_bytes`."""


OPTIMIZER_BYTES_PER_ELEMENT = 8
"""AdamW's two fp32 moments, which is the most that the usual optimizers keep for an adapter."""

ALLOCATOR_SLACK_BYTES = 384 << 20
SLACK_BESIDE_ACTIVATIONS_BYTES = 256 << 20
SLACK_PER_ACTIVATION_BYTE = 2
"""What the C library may hold back of freed memory, see `heap`: the first, or the second and such a share of what a
layer's activations take, where that is more; at most twice what is in use. Measured on TinyLlama's shape. 512 tokens,
one thread: with 256 MiB two trims and 0.8 seconds of system time a step, with 384 none and 0.5. 2048 tokens, two
threads: with 384 MiB 25 trims and 15 seconds, with a share of 1.25 eight and 7.5, of 2.0 four and 6.3. Activations
that lie in an arena (`transients`) need no such share: then 384 MiB and none."""

PLACED_RESULTS = 192
"""Of the least size that is placed: so many make the activations of a layer for which an arena is worth its while. In
smaller layers no result reaches the 32 MiB that glibc maps anew each time, and what placing costs is more than it
gains: at 512 tokens a step of TinyLlama's shape took 1.06 times as long. At 2048 two layers' forward and backward made
8 to 14 thousand page faults instead of 445 to 465 (docs/log.md)."""

DEVICE_SLOTS = 4
"""Pieces of `RuntimeOptions.device_share` in DEVICE memory: one comes, one is stepped, one goes, one to spare."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Switches that tests and the stress mode turn; none changes a number that training gives, but for cuts, which
    change the order of sums (tiles of the loss and of the head, activations by chunks, packed products).
    """

    record: bool = False
    """Keep every transfer and use for the happens-before check."""
    poison: bool = False
    """Fill memory with NaN before it is leased and after it is returned."""
    delay_seconds: float = 0.0
    """Start every transfer late by a random time up to this."""
    num_slots: int | None = None
    """Slots of the layer ring, in place of the plan's."""
    stream_edges: bool | None = None
    """Stream embedding and head although the budget would hold them."""
    look_up_rows: bool = True
    """Where `stream_edges` is set: embeddings are read by rows, not whole."""
    head_tile_rows: int | None = None
    """Where `stream_edges` is set: rows of the head in memory at a time, in place of all. Of one that is tied to the
    embedding only with `look_up_rows`."""
    room_bytes: int | None = None
    """Of rows of embeddings in DEVICE memory at a time, in place of the plan's; twice that of pages from NVMe."""
    layer_inputs: Tier | None = None
    """Where layer inputs wait, in place of the plan's choice."""
    decode_scope: DecodeScope | None = None
    leave_out_products: bool = True
    """Recompute layers without their last product, where nobody wants its result."""
    placed_bytes: int = LEAST_BYTES
    """The least result of an operation that lies in the activations' arena (see `transients`); 0 leaves all results to
    the allocator."""
    head_chunk_tokens: int | None = None
    """Rows of a tile of the loss head, in place of the plan's."""
    activations: ActivationPolicy | None = None
    """Of all layers, in place of the plan's."""
    packed_products: PackedProducts | Literal["measured"] | None = None
    """In place of the plan's; "measured": the fastest that this device has, see `nf4_products`. A cut."""
    product_ways: Mapping[str, Way] | None = None
    """What these may be, in place of what is installed."""
    rest: Tier | None = None
    """Where weights and state rest, all of them, in place of the rule's choice."""
    state: StatePlacement | None = None
    """Of what trains in blocks, in place of the plan's."""
    weight_shares: tuple[float, float] | None = None
    """Of each block that streams, how much of it stays in DEVICE and how much rests in HOST, in place of the plan's; as
    far as tensors and pages can be cut."""
    update_mode: UpdateMode | None = None
    device_share: float | None = None
    """Of every block's pieces, the share that the device steps, in place of the plan's."""
    layer_major: bool | None = None
    serial_updates: bool = False
    """Step blocks on the calling thread. On where transfers are recorded."""
    piece_elements: int = PIECE_ELEMENTS
    """Parameters whose state moves as one. Part of what training state is identified by."""
    device: TensorDevice | None = None
    """DEVICE, in place of the machine's."""
    replan: bool = True
    """Make the optimiser's plan again where the machine has drifted from it."""
    cuts: Cuts | None = None
    """Those that the plan must have; see `cuts`."""


@dataclass(frozen=True, kw_only=True)
class TrainingDraft:
    """What trains in blocks, before anything of it is anywhere."""

    rule: UpdateRule
    blocks: tuple[TrainedBlock, ...]
    """In the order of the model's parameters."""
    key: str
    """Names the state."""
    adapters: bool = False
    """Only adapters train: weights and gradients stay in memory."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model taken apart, before anything of it is anywhere."""

    model: nn.Module
    config: EngineConfig
    drafts: list[BlockDraft]
    sources: Sources
    """Of the blocks' parameters."""
    rest: dict[str, TensorSource]
    """Of everything that the checkpoint holds, blocks or not; empty for a model that has its values."""
    key: str
    """Names the store."""
    training: TrainingDraft | None = None
    """None where only adapters train, and their state is where they are."""
    has_streams: bool = False
    """DEVICE is a device whose work is asynchronous."""
    placed_bytes: int = LEAST_BYTES
    """As `RuntimeOptions.placed_bytes`."""

    @property
    def frozen(self) -> list[BlockDraft]:
        """The blocks that never change."""
        return [draft for draft in self.drafts if not draft.trains]

    @property
    def layers(self) -> list[BlockDraft]:
        return [draft for draft in self.drafts if draft.is_layer]

    def draft(self, name: str) -> BlockDraft:
        return next(draft for draft in self.drafts if draft.name == name)


def find_workload(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    config: EngineConfig,
    optimizer: torch.optim.Optimizer | None = None,
    options: RuntimeOptions = RuntimeOptions(),
) -> Workload:
    """Takes `model` apart. Raises `ConfigError`, `CheckpointError` and `UnsupportedModule`."""
    drafts, sources, rest = _find_sources(model, checkpoint, config)
    training = None
    if any(draft.trains for draft in drafts):
        if optimizer is None:
            raise ConfigError("optimizer: layers train, but there is none")
        training = _find_training(model, drafts, sources, config, optimizer, options)
    frozen = [draft for draft in drafts if not draft.trains]
    return Workload(
        model=model, config=config, drafts=drafts, sources=sources, rest=rest, key=store_key(frozen, sources),
        training=training, has_streams=config.device != "cpu" or options.device is not None,
        placed_bytes=options.placed_bytes,
    )  # fmt: skip


def _find_training(
    model: nn.Module,
    drafts: list[BlockDraft],
    sources: Sources,
    config: EngineConfig,
    optimizer: torch.optim.Optimizer,
    options: RuntimeOptions,
) -> TrainingDraft:
    rule = rule_for(optimizer)
    draft_of = {id(entry.parameter): draft for draft in drafts if draft.trains for entry in draft.parameters}
    blocks: dict[str, TrainedBlock] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        draft = draft_of.get(id(parameter))
        parameters = [TrainedParameter(name, parameter, None)]
        if draft is not None:
            if draft.name in blocks:
                continue
            parameters = [
                TrainedParameter(entry.name, entry.parameter, spec)
                for entry, spec in zip(draft.parameters, draft.spec.tensors, strict=True)
            ]
        block_name = name if draft is None else draft.name
        blocks[block_name] = trained_block(
            block_name, parameters, rule, weights=None if draft is None else draft.spec,
            accumulates=config.accumulation_steps > 1, piece_elements=options.piece_elements,
        )  # fmt: skip
    state = [
        [block.name, block.weights is not None]
        + [[p.name, p.num_bytes, [[s.parameter, s.begin, s.end] for s in p.segments]] for p in block.pieces]
        for block in blocks.values()
    ]
    text = json.dumps(["state/1", rule.name, sources.fingerprint, state])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return TrainingDraft(rule=rule, blocks=tuple(blocks.values()), key=key)


def training_sizes(workload: Workload) -> TrainingSizes:
    """What trains, as the planner sees it."""
    training, config = workload.training, workload.config
    if training is None:
        raise ConfigError("optimizer: no layer trains")
    on_a_device = workload.has_streams
    lands = on_a_device and not training.adapters
    stepping = max(piece.num_bytes for block in training.blocks for piece in block.pieces)
    if not training.adapters:
        stepping = stepping_bytes(training.blocks)
    return TrainingSizes(
        blocks=tuple(
            TrainedSize(
                name=block.name, pieces=tuple(piece.num_bytes for piece in block.pieces),
                gradient_bytes=0 if training.adapters else block.gradients.stored_bytes,
                weight_bytes=0 if block.weights is None else block.weights.stored_bytes,
            )
            for block in training.blocks
        ),
        clips=config.max_grad_norm is not None,
        commits_each_step=config.commit_every in (None, 1) and not training.adapters,
        adapters=training.adapters,
        landing_bytes=LANDING_SLOTS * largest_range_bytes(training.blocks) if lands else 0,
        arriving_bytes=ARRIVING_SLOTS * largest_arrival_bytes(training.blocks)
        if lands and config.accumulation_steps > 1
        else 0,
        stepping_bytes=stepping if on_a_device else 0,
        log_bytes=LOG_BUFFER_BYTES if config.nvme else 0,
        saving_bytes=saving_bytes(training.blocks),
    )  # fmt: skip


def saving_bytes(blocks: Sequence[TrainedBlock]) -> int:
    """HOST memory through which state is saved and loaded, at most: two of the largest piece, and the other log that
    it may be loaded from.
    """
    return 2 * max(piece.num_bytes for block in blocks for piece in block.pieces) + LOG_BUFFER_BYTES


def streaming_problem(workload: Workload) -> StreamingProblem:
    """The planner's question: sizes of this workload, capacities of this machine within the budgets."""
    model, config, drafts = workload.model, workload.config, workload.drafts
    trainable = [p for p in model.parameters() if p.requires_grad]
    stored = {id(s.parameter) for d in drafts for s in d.parameters}
    leftovers = sum(
        p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad and id(p) not in stored
    )
    if workload.training is None:
        trainable_bytes = leftovers + sum(
            p.numel() * (2 * p.element_size() + OPTIMIZER_BYTES_PER_ELEMENT) for p in trainable
        )
    elif workload.training.adapters:
        trainable_bytes = leftovers + sum(2 * p.numel() * p.element_size() for p in trainable)
    else:
        weights_bytes = sum(p.numel() * p.element_size() for p in trainable if id(p) not in stored)
        trainable_bytes = leftovers + weights_bytes + gradients_under_way_bytes(workload)
    activation_bytes = estimate_activation_bytes(model, drafts, batch_size=config.batch_size, seq_len=config.seq_len)
    input_bytes = layer_input_bytes(drafts, batch_size=config.batch_size, seq_len=config.seq_len)
    passing_bytes = input_bytes if workload.has_streams else 0
    activation_bytes += passing_bytes
    on_gpu = config.device != "cpu"
    unified = config.host_memory_bytes is None and not on_gpu
    nvme_capacity = None
    if config.nvme:
        folders = store_folders(config.nvme, workload.key)
        nvme_capacity = sum(usable_bytes(folder, drive) for folder, drive in zip(folders, config.nvme, strict=True))
        if workload.training is not None:  # what an earlier run's state takes is there for this run's
            state = store_folders(config.nvme, workload.training.key)
            nvme_capacity += sum((f / "state.bin").stat().st_size for f in state if (f / "state.bin").exists())
    return StreamingProblem(
        fingerprint=_fingerprint(workload),
        layers=tuple(_size(d) for d in drafts if d.is_layer),
        edges=tuple(_size(d, most_rows=config.batch_size * config.seq_len) for d in drafts if not d.is_layer),
        trainable_bytes=trainable_bytes,
        layer_input_bytes=input_bytes,
        activation_bytes=activation_bytes,
        passing_bytes=passing_bytes,
        allocator_slack_bytes=allocator_slack_bytes(
            trainable_bytes,
            activation_bytes,
            placed=places_transients(workload, activation_bytes, workload.placed_bytes),
        ),
        loss_head=loss_head_size(model, batch_size=config.batch_size, seq_len=config.seq_len),
        device_capacity_bytes=_device_bytes(model, config),
        host_capacity_bytes=config.host_memory_bytes or (free_memory_bytes() if on_gpu else None),
        nvme_capacity_bytes=nvme_capacity,
        unified=unified,
        training=None if workload.training is None else training_sizes(workload),
        stages_pieces=not workload.has_streams,
        chunked=chunked_size(model, drafts, batch_size=config.batch_size, seq_len=config.seq_len),
        num_micro_batches=config.accumulation_steps,
    )


def _device_bytes(model: nn.Module, config: EngineConfig) -> int:
    """What may lie in DEVICE memory, the model included, where it is there already."""
    if config.device == "cpu":
        return config.device_memory_bytes or free_memory_bytes()
    device = torch.device(config.device)
    tensors = itertools.chain(model.parameters(), model.buffers())
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    return capacity_bytes(device, config.device_memory_bytes, sum(held.values()))


def gradients_under_way_bytes(workload: Workload) -> int:
    """Memory for gradients of all parameters on their way to where they wait: those of the block that needs most."""
    of_layers = [draft.spec.compute_bytes for draft in workload.drafts if draft.trains]
    stored = {id(entry.parameter) for draft in workload.drafts for entry in draft.parameters}
    # Of a head, which is summed in fp32 besides, its own, where it is tied that of the embedding, and both together.
    of_others = [
        p.numel() * (3 * p.element_size() + 4)
        for p in workload.model.parameters()
        if p.requires_grad and id(p) not in stored
    ]
    of_the_block_before = max(of_layers, default=0) if workload.has_streams else 0
    return max(of_layers + of_others) + of_the_block_before


def places_transients(workload: Workload, num_bytes: int, least_bytes: int) -> bool:
    """Whether `num_bytes` of activations are an arena, with results of at least `least_bytes` in it: on the CPU, where
    layers are frozen and run whole, and results of that size are what a layer's time goes to.
    """
    frozen = workload.training is None or workload.training.adapters
    on_cpu = workload.config.device == "cpu" and not workload.has_streams
    return on_cpu and frozen and 0 < PLACED_RESULTS * least_bytes <= num_bytes


def allocator_slack_bytes(trainable_bytes: int, activation_bytes: int, *, placed: bool = False) -> int:
    """Freed memory that the C library may hold back, where a budget has room. placed: activations are in an arena."""
    beside = SLACK_BESIDE_ACTIVATIONS_BYTES + (0 if placed else SLACK_PER_ACTIVATION_BYTE * activation_bytes)
    return min(max(ALLOCATOR_SLACK_BYTES, beside), 2 * (trainable_bytes + activation_bytes))


def is_looked_up(draft: BlockDraft) -> bool:
    """Whether all that is ever done with the block is looking up rows of its one tensor, which is frozen."""
    return _uses(draft) == (True, 0)


def is_multiplied(draft: BlockDraft) -> bool:
    """Whether all that is ever done with the block is multiplying with its one tensor, which is frozen."""
    return _uses(draft) == (False, 1)


def is_tied(draft: BlockDraft) -> bool:
    """Whether rows of the block's one tensor, which is frozen, are looked up, it is multiplied with, and no more."""
    return _uses(draft) == (True, 1)


def _uses(draft: BlockDraft) -> tuple[bool, int] | None:
    """Whether rows of the block's one tensor are looked up, and how many linears multiply with it; None where it is
    used otherwise, or trains.
    """
    linears = [module for module in draft.modules if not isinstance(module, nn.Embedding)]
    plain = all(type(module) is nn.Linear and module.bias is None for module in linears)
    if len(draft.spec.tensors) != 1 or draft.is_layer or draft.trains or not plain:
        return None
    return len(linears) < len(draft.modules), len(linears)


def rows_size(draft: BlockDraft, *, most_rows: int) -> RowsSize:
    """A block that `is_looked_up`, `is_multiplied` or `is_tied`, for batches of at most so many tokens."""
    tensor = draft.spec.tensors[0]
    num_rows = tensor.shape[0]
    return RowsSize(num_rows=num_rows, row_bytes=tensor.stored_bytes // num_rows, most_rows=most_rows)


def _size(draft: BlockDraft, *, most_rows: int = 0) -> BlockSize:
    """most_rows: that the largest batch may look up in an embedding."""
    by_module: dict[str, int] = {}
    for tensor in draft.spec.tensors:
        if tensor.is_quantized:
            module = tensor.name.rpartition(".")[0]
            by_module[module] = by_module.get(module, 0) + align_up(tensor.compute_bytes, IO_ALIGNMENT_BYTES)
    return BlockSize(
        name=draft.name,
        stored_bytes=draft.spec.stored_bytes,
        largest_module_bytes=max(by_module.values(), default=0),
        decoded_bytes=sum(by_module.values()),
        streams=True,
        rows=rows_size(draft, most_rows=most_rows) if is_looked_up(draft) or is_tied(draft) else None,
        product=rows_size(draft, most_rows=most_rows) if is_multiplied(draft) or is_tied(draft) else None,
    )


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
    if options.activations is not None:
        plan = replace(plan, activations={d.name: options.activations for d in drafts if d.is_layer})
    if options.state is not None:
        plan = replace(plan, state=options.state)
    if isinstance(options.packed_products, dict):
        plan = replace(plan, packed_products=options.packed_products)
    if options.device_share is not None and plan.state is not None and sizes is not None:
        state = plan.state.stepped_on_device(sizes, options.device_share, slots=DEVICE_SLOTS)
        items = {**plan.peak_bytes.get("device", {}), "optimizer state stepped there": state.device_bytes(sizes)}
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
        size = _size(tiled, most_rows=num_tokens)
        plan = replace(plan, head_tiles=head_tiles_of(size, rest, plan.head_chunk_tokens, head_tile_rows))
    if looked_up:
        sizes = tuple(_size(d, most_rows=num_tokens) for d in looked_up)
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
    """The plan with the blocks of its rings cut so, which run whole and are recomputed. Classes say nothing else."""
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
    return replace(plan, rings=rings, classes=classes, activations=None)


def _fingerprint(workload: Workload) -> str:
    """What a plan is made for: the blocks' layout, the shape of the batch, and what trains."""
    config, training = workload.config, workload.training
    parts: list[object] = [[d.spec.to_json() for d in workload.drafts], config.batch_size, config.seq_len, config.bits]
    if training is not None:
        parts += [training.rule.name, [draft.trains for draft in workload.drafts], config.accumulation_steps > 1]
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_sources(
    model: nn.Module, checkpoint: Checkpoint | None, config: EngineConfig
) -> tuple[list[BlockDraft], Sources, dict[str, TensorSource]]:
    """Blocks, where their values come from, and where those of the rest of the model do."""
    if checkpoint is None:
        drafts = find_blocks(model, bits=config.bits)
        on_meta = [s.name for d in drafts for s in d.parameters if s.parameter.is_meta]
        if on_meta:
            raise ConfigError(
                f"model: {len(on_meta)} parameters are on the meta device (first: {on_meta[0]}); give checkpoint= a "
                f"safetensors file or folder, or a model that has its weights"
            )
        return drafts, sources_in_memory(drafts), {}
    mapping = map_checkpoint(model, checkpoint)
    drafts = find_blocks(model, bits=config.bits, prequantized=frozenset(mapping.prequantized))
    # What trains and has its values already (adapters written by hand, say) needs none from the checkpoint.
    ready = {name for name, p in model.named_parameters() if p.requires_grad and not p.is_meta}
    missing = [name for name in mapping.missing if name not in ready]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has nothing for {len(missing)} tensors of the model, first: {', '.join(missing[:5])}"
        )
    sources = Sources(
        streams=mapping.sources,
        prequantized=mapping.prequantized,
        fingerprint=checkpoint.fingerprint(),
        describe=str(checkpoint.path),
    )
    return drafts, sources, dict(mapping.sources)
