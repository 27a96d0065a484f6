"""Wires a model to the runtime: from drafts and sources to blocks that stream under a plan.

Everything is checked before anything is changed: sources, coverage, plan, budgets and the store come first; only then
do parameters leave the model's memory and hooks go in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from offload_rt.autograd import (
    Access,
    LayerCounters,
    RecomputedLayer,
    ResidentAccess,
    RingAccess,
    StreamedModule,
)
from offload_rt.block import Binding, Block
from offload_rt.checkpoint import Checkpoint, map_checkpoint, open_checkpoint
from offload_rt.checkpoint.ingest import Sources, block_pieces, fill_slot, sources_in_memory, store_key
from offload_rt.checkpoint.materialise import check_nothing_on_meta, make_absent, materialise_rest
from offload_rt.checkpoint.sources import TensorSource
from offload_rt.config import EngineConfig
from offload_rt.decoder import Decoder
from offload_rt.discover import BlockDraft, Coverage, check_coverage, coverage, find_blocks
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.executor import RingExecutor
from offload_rt.profile import estimate_activation_bytes, free_memory_bytes, layer_input_bytes
from offload_rt.recording import Recorder
from offload_rt.scratch import Scratch
from offload_rt.stash import HostStash, NvmeStash, Stash
from offload_rt.store import Store, store_folders, usable_bytes
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiers import HostResidence, NvmeResidence, Residence, Tiers
from offload_rt.transfer import Links
from planners.plan import DecodeScope, Plan, Tier
from planners.streaming import BlockSize, StreamingProblem, plan_streaming

OPTIMIZER_BYTES_PER_ELEMENT = 8
"""AdamW's two fp32 moments, which is the most that the usual optimizers keep for an adapter."""


@dataclass(kw_only=True)
class Runtime:
    """The assembled parts of one engine, and how to take them apart again."""

    plan: Plan
    tiers: Tiers
    links: Links
    decoder: Decoder
    blocks: list[Block]
    executors: list[RingExecutor]
    layers: list[RecomputedLayer]
    streamed: list[StreamedModule]
    layer_counters: LayerCounters
    coverage: Coverage
    store: Store | None
    store_was_cached: bool
    scratch: Scratch | None
    recorder: Recorder | None
    _closed: bool = field(default=False)

    def close(self) -> None:
        """Takes the hooks out, waits for what is under way, closes files. The weights stay absent."""
        if self._closed:
            return
        self._closed = True
        for layer in self.layers:
            layer.detach()
        for module in self.streamed:
            module.detach()
        for block in self.blocks:
            block.detach()
        for executor in self.executors:
            executor.drain()
        self.links.close()
        if self.scratch is not None:
            self.scratch.close()
        if self.store is not None:
            self.store.close()


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Switches that tests and the stress mode turn; none changes a number that training gives."""

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
    layer_inputs: Tier | None = None
    """Where layer inputs wait, in place of the plan's choice."""
    decode_scope: DecodeScope | None = None


def assemble(
    model: nn.Module,
    checkpoint: Path | None,
    config: EngineConfig,
    plan: Plan | None,
    options: RuntimeOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Runtime:
    """Builds the runtime around `model`. `progress` is called with a phase, bytes done and bytes in all."""
    with contextlib.ExitStack() as while_assembling:
        opened = None if checkpoint is None else while_assembling.enter_context(open_checkpoint(checkpoint))
        return _assemble(model, opened, config, plan, options, progress)


def _assemble(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    config: EngineConfig,
    plan: Plan | None,
    options: RuntimeOptions,
    progress: Callable[[str, int, int], None] | None,
) -> Runtime:
    drafts, sources, rest = _find_sources(model, checkpoint, config)
    covered = check_coverage(drafts) if config.bits == 4 else coverage(drafts)
    key = store_key(drafts, sources)
    problem = _problem(model, drafts, config, key)
    chosen = plan if plan is not None else plan_streaming(problem)
    if chosen.fingerprint != problem.fingerprint:
        raise ConfigError(
            f"plan: made for workload {chosen.fingerprint}, this one is {problem.fingerprint} (model, batch_size, "
            f"seq_len or bits differ)"
        )
    placed = {*chosen.resident, *(name for ring in chosen.rings for name in ring.blocks)}
    if placed != {draft.name for draft in drafts}:
        odd = sorted(placed ^ {draft.name for draft in drafts})
        raise ConfigError(f"plan: its blocks are not this model's, first odd one: {odd[0]} ({len(odd)} differ)")
    chosen = _with_options(chosen, drafts, options)
    unified = problem.unified
    tiers = Tiers(
        problem.device_capacity_bytes, problem.host_capacity_bytes, problem.nvme_capacity_bytes,
        unified=unified, poison=options.poison,
    )  # fmt: skip
    recorder = Recorder() if options.record else None
    links = Links(recorder=recorder, delay_seconds=options.delay_seconds)
    store: Store | None = None
    was_cached = False
    try:
        if config.nvme:
            store = Store(config.nvme, key, links)
            was_cached = store.complete
            if not was_cached:
                _build_store(store, drafts, sources, progress)
            tiers.account(Tier.NVME).reserve("weights", store.stored_bytes)
        return _bind(
            model, drafts, sources, rest, config, chosen, options, tiers, links, store, recorder, covered, was_cached,
            problem, progress,
        )  # fmt: skip
    except BaseException:
        links.close()
        if store is not None:
            store.close()
        raise


def workload_fingerprint(drafts: list[BlockDraft], config: EngineConfig) -> str:
    """What a plan is made for: the blocks' layout and the shape of the batch."""
    text = json.dumps([[d.spec.to_json() for d in drafts], config.batch_size, config.seq_len, config.bits])
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


def _problem(model: nn.Module, drafts: list[BlockDraft], config: EngineConfig, key: str) -> StreamingProblem:
    trainable = [p for p in model.parameters() if p.requires_grad]
    stored = {id(s.parameter) for d in drafts for s in d.parameters}
    leftovers = sum(
        p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad and id(p) not in stored
    )
    unified = config.host_memory_bytes is None
    nvme_capacity = None
    if config.nvme:
        folders = store_folders(config.nvme, key)
        nvme_capacity = sum(usable_bytes(folder, drive) for folder, drive in zip(folders, config.nvme, strict=True))
    return StreamingProblem(
        fingerprint=workload_fingerprint(drafts, config),
        layers=tuple(_size(d) for d in drafts if d.is_layer),
        edges=tuple(_size(d) for d in drafts if not d.is_layer),
        trainable_bytes=leftovers
        + sum(p.numel() * (2 * p.element_size() + OPTIMIZER_BYTES_PER_ELEMENT) for p in trainable),
        layer_input_bytes=layer_input_bytes(drafts, batch_size=config.batch_size, seq_len=config.seq_len),
        activation_bytes=estimate_activation_bytes(model, drafts, batch_size=config.batch_size, seq_len=config.seq_len),
        device_capacity_bytes=config.device_memory_bytes or free_memory_bytes(),
        host_capacity_bytes=config.host_memory_bytes,
        nvme_capacity_bytes=nvme_capacity,
        unified=unified,
    )


def _size(draft: BlockDraft) -> BlockSize:
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
    )


def _with_options(plan: Plan, drafts: list[BlockDraft], options: RuntimeOptions) -> Plan:
    """The plan with what the options override."""
    from dataclasses import replace

    from planners.plan import Ring

    if options.layer_inputs is not None:
        plan = replace(plan, layer_inputs=options.layer_inputs)
    if options.decode_scope is not None:
        plan = replace(plan, decode_scope=options.decode_scope)
    if options.num_slots is not None:
        rings = tuple(
            replace(ring, num_slots=min(options.num_slots, len(ring.blocks))) if ring.name == "layers" else ring
            for ring in plan.rings
        )
        plan = replace(plan, rings=rings)
    edges = [d for d in drafts if not d.is_layer and d.name in plan.resident]
    if options.stream_edges and edges and plan.rings:
        ring = Ring(
            name="edges",
            blocks=tuple(d.name for d in edges),
            num_slots=1,
            slot_bytes=max(d.spec.stored_bytes for d in edges),
            rest=plan.rings[0].rest,
        )
        resident = tuple(name for name in plan.resident if name not in ring.blocks)
        plan = replace(plan, resident=resident, rings=(*plan.rings, ring))
    return plan


def _build_store(
    store: Store, drafts: list[BlockDraft], sources: Sources, progress: Callable[[str, int, int], None] | None
) -> None:
    total = sum(d.spec.compute_bytes for d in drafts)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("encoding", done, total)

    builder = store.build([d.spec for d in drafts])
    try:
        for draft in drafts:
            builder.write(draft.spec, block_pieces(draft, sources, progress=advance))
        builder.finish()
    finally:
        builder.close()


def _bind(
    model: nn.Module,
    drafts: list[BlockDraft],
    sources: Sources,
    rest: dict[str, TensorSource],
    config: EngineConfig,
    plan: Plan,
    options: RuntimeOptions,
    tiers: Tiers,
    links: Links,
    store: Store | None,
    recorder: Recorder | None,
    covered: Coverage,
    was_cached: bool,
    problem: StreamingProblem,
    progress: Callable[[str, int, int], None] | None,
) -> Runtime:
    by_name = {draft.name: draft for draft in drafts}
    sizes = {block.name: block for block in problem.layers + problem.edges}
    layer_sizes = [sizes[d.name] for d in drafts if d.is_layer]
    largest = max((s.largest_module_bytes for s in layer_sizes), default=0)
    hold = plan.decode_scope is DecodeScope.LAYER
    scratch_bytes = 2 * largest + (max((s.decoded_bytes for s in layer_sizes), default=0) if hold else 0)
    decoder = Decoder(tiers.arena(Tier.DEVICE, "decoded weights", scratch_bytes))
    tiers.account(Tier.DEVICE).reserve("adapters, gradients, optimizer", problem.trainable_bytes)
    tiers.account(Tier.DEVICE).reserve("activations (estimate)", problem.activation_bytes)

    accesses: dict[str, Access] = {}
    executors = []
    if plan.resident:
        total = sum(align_up(by_name[name].spec.stored_bytes, IO_ALIGNMENT_BYTES) for name in plan.resident)
        arena = tiers.arena(Tier.DEVICE, "resident blocks", total)
        for name in plan.resident:
            slot = arena.acquire(by_name[name].spec.stored_bytes, name)
            if store is not None:
                NvmeResidence(store, name, slot.num_bytes, links, None).fetch(slot).wait()
            else:
                fill_slot(by_name[name], sources, slot)
            accesses[name] = ResidentAccess(slot)
    trainable_layers = [
        index for index, d in enumerate(d for d in drafts if d.is_layer)
        if any(p.requires_grad for module in d.modules for p in module.parameters())
    ]  # fmt: skip
    for ring in plan.rings:
        arena = tiers.arena(Tier.DEVICE, f"ring of {ring.name}", ring.device_bytes)
        residences: list[Residence] = []
        staging = None
        if ring.rest is Tier.NVME and not tiers.unified:
            staging = tiers.arena(Tier.HOST, f"staging for {ring.name}", ring.device_bytes)
        host_arena = None
        if ring.rest is Tier.HOST:
            total = sum(align_up(by_name[name].spec.stored_bytes, IO_ALIGNMENT_BYTES) for name in ring.blocks)
            host_arena = tiers.arena(Tier.HOST, "weights", total)
        for name in ring.blocks:
            num_bytes = by_name[name].spec.stored_bytes
            if host_arena is not None:
                slot = host_arena.acquire(num_bytes, name)
                fill_slot(by_name[name], sources, slot)
                residences.append(HostResidence(slot, links))
            elif store is not None:
                residences.append(NvmeResidence(store, name, num_bytes, links, staging))
            else:
                raise ConfigError(f"plan: ring {ring.name!r} rests on NVME, but nvme= gives no folder")
        if ring.name == "layers":
            # Layers below the first one that trains are not visited in backward.
            first = min(trainable_layers, default=0)
            backward = frozenset(range(first, len(ring.blocks)))
        else:
            backward = frozenset(
                index for index, name in enumerate(ring.blocks)
                if any(isinstance(module, nn.Linear) for module in by_name[name].modules)
            )  # fmt: skip
        executor = RingExecutor(ring, residences, arena, backward=backward, recorder=recorder)
        executors.append(executor)
        for index, name in enumerate(ring.blocks):
            accesses[name] = RingAccess(executor, index)

    stash, scratch = _stash(plan, drafts, config, tiers, links, problem)

    # From here on the model changes.
    stored = {id(s.parameter) for d in drafts for s in d.parameters}
    materialise_rest(model, rest, stored)
    blocks, layers, streamed = [], [], []
    counters = LayerCounters()
    for draft in drafts:
        bindings = tuple(
            Binding(spec, s.parameter, s.owners) for spec, s in zip(draft.spec.tensors, draft.parameters, strict=True)
        )
        block = Block(draft.name, draft.modules, draft.spec, bindings, decoder)
        for binding in bindings:
            make_absent(binding.parameter)
        access = accesses[draft.name]
        blocks.append(block)
        if isinstance(access, ResidentAccess):
            block.open(access.acquire_forever())
        if draft.is_layer:
            block.attach()
            layer = RecomputedLayer(draft.modules[0], block, access, stash=stash, hold_decoded=hold, counters=counters)
            layer.attach()
            layers.append(layer)
        elif not isinstance(access, ResidentAccess):
            for module in draft.modules:
                wrapped = StreamedModule(module, block, access)
                wrapped.attach()
                streamed.append(wrapped)
    check_nothing_on_meta(model, sources.describe)
    return Runtime(
        plan=plan, tiers=tiers, links=links, decoder=decoder, blocks=blocks, executors=executors, layers=layers,
        streamed=streamed, layer_counters=counters, coverage=covered, store=store, store_was_cached=was_cached,
        scratch=scratch, recorder=recorder,
    )  # fmt: skip


def _stash(
    plan: Plan,
    drafts: list[BlockDraft],
    config: EngineConfig,
    tiers: Tiers,
    links: Links,
    problem: StreamingProblem,
) -> tuple[Stash | None, Scratch | None]:
    num_layers = sum(d.is_layer for d in drafts)
    each = align_up(problem.layer_input_bytes, IO_ALIGNMENT_BYTES)
    if plan.layer_inputs is not Tier.DEVICE and not (plan.layer_inputs is Tier.HOST and tiers.unified):
        tiers.account(Tier.DEVICE).reserve("layer input in use", each)
    if plan.layer_inputs is Tier.HOST and not tiers.unified:
        return HostStash(tiers.arena(Tier.HOST, "layer inputs", each * num_layers), links), None
    if plan.layer_inputs is Tier.NVME:
        if not config.nvme:
            raise ConfigError("plan: layer inputs wait on NVME, but nvme= gives no folder")
        staging = tiers.arena(Tier.HOST, "staging for layer inputs", 4 * each)
        tiers.account(Tier.NVME).reserve("layer inputs", 2 * each * num_layers)
        scratch = Scratch(config.nvme[0].path, 2 * each * num_layers, links)
        return NvmeStash(scratch, staging, links), scratch
    tiers.account(Tier.DEVICE).reserve("layer inputs", each * num_layers)
    return None, None
