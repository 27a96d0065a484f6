"""What is to be run: a model's blocks, and where their values and the state of what trains come from.

Reads headers and shapes only; nothing of the model, the drive or memory is changed here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass

import torch
from torch import nn

from offload_rt.checkpoint import Checkpoint, map_checkpoint
from offload_rt.checkpoint.ingest import Sources, sources_in_memory, store_key
from offload_rt.checkpoint.mapping import declared_quantization
from offload_rt.checkpoint.sources import TensorSource
from offload_rt.config import EngineConfig
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.guards.copies import check_has_values
from offload_rt.layers.discover import BlockDraft, find_blocks
from offload_rt.memory.pinning import known_ceiling, ring_bytes
from offload_rt.memory.process_memory import free_memory_bytes
from offload_rt.memory.transients import LEAST_BYTES
from offload_rt.optimizer.pieces import TrainedBlock, TrainedParameter, trained_block
from offload_rt.optimizer.rules import UpdateRule, rule_for
from offload_rt.transfers.device_cuda import cuda_runtime
from offload_rt.wiring.runtime_options import RuntimeOptions

logger = logging.getLogger("offload_rt")


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
    ring_bytes: int = 0
    """Of HOST, beside the plan's: for a locked ring, where it is known that not all can be locked (`pinning`)."""

    @property
    def frozen(self) -> list[BlockDraft]:
        """The blocks that never change."""
        return [draft for draft in self.drafts if not draft.trains]

    @property
    def layers(self) -> list[BlockDraft]:
        return [draft for draft in self.drafts if draft.is_layer]

    def require_training(self) -> TrainingDraft:
        """What trains, with its state. Raises `ConfigError` where `training` is None."""
        if self.training is None:
            raise ConfigError("plan: no layer trains")
        return self.training

    def stored_ids(self) -> set[int]:
        """The ids of parameters that a block stores."""
        return {id(stored.parameter) for draft in self.drafts for stored in draft.parameters}

    def kept_elsewhere(self) -> frozenset[int]:
        """The ids of parameters whose values are a block's, or rounded from a master."""
        kept = self.stored_ids()
        if self.training is not None and not self.training.adapters:
            kept |= {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        return frozenset(kept)

    def draft(self, name: str) -> BlockDraft:
        return next(draft for draft in self.drafts if draft.name == name)


def find_workload(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    config: EngineConfig,
    optimizer: torch.optim.Optimizer | None = None,
    options: RuntimeOptions | None = None,
) -> Workload:
    """Takes `model` apart. Raises `ConfigError`, `CheckpointError` and `UnsupportedModule`."""
    options = RuntimeOptions() if options is None else options
    drafts, sources, rest = _find_sources(model, checkpoint, config)
    training = None
    if any(draft.trains for draft in drafts):
        if optimizer is None:
            raise ConfigError("optimizer: layers train, but there is none")
        training = _find_training(model, drafts, sources, config, optimizer, options)
    else:
        _warn_of_small_steps(model)
    frozen = [draft for draft in drafts if not draft.trains]
    runtime = None if config.device == "cpu" else cuda_runtime()
    ceiling = None if runtime is None else known_ceiling(runtime, torch.device(config.device).index)
    return Workload(
        model=model, config=config, drafts=drafts, sources=sources, rest=rest, key=store_key(frozen, sources),
        training=training, has_streams=config.device != "cpu" or options.device is not None,
        placed_bytes=options.placed_bytes,
        ring_bytes=0 if ceiling is None else ring_bytes(config.host_memory_bytes or free_memory_bytes(), ceiling),
    )  # fmt: skip


def _warn_of_small_steps(model: nn.Module) -> None:
    """Says what is stepped in 16 bits, without masters: torch's own optimizer does so, and rounds small steps away."""
    short = [name for name, p in model.named_parameters() if p.requires_grad and p.element_size() < 4]
    if short:
        logger.warning(
            "%d tensors that train are in 16 bits and have no fp32 masters, as no layer trains as a whole: steps below "
            "1/512 of a weight are lost (in float16 1/4096), as in plain PyTorch (first: %s). Where that matters, have "
            "the model in float32, or adapters alone (peft's autocast_adapter_dtype)", len(short), ", ".join(short[:3]),
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
        check_has_values({s.name: s.parameter for d in drafts for s in d.parameters})
        return drafts, sources_in_memory(drafts), {}
    mapping = map_checkpoint(model, checkpoint)
    drafts = find_blocks(model, bits=config.bits, prequantized=frozenset(mapping.prequantized))
    # What trains and has its values already (adapters written by hand, say) needs none from the checkpoint.
    ready = {name for name, p in model.named_parameters() if p.requires_grad and not p.is_meta}
    missing = [name for name in mapping.missing if name not in ready]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has nothing for {len(missing)} tensors of the model, first: {', '.join(missing[:5])}"
            f"{declared_quantization(checkpoint)}"
        )
    if mapping.unused:  # biases that a model is built without, say: it would be another one
        logger.warning(
            "%s: %d tensors are not used, as the model has none of their name, first: %s",
            checkpoint.path, len(mapping.unused), ", ".join(mapping.unused[:5]),
        )  # fmt: skip
    sources = Sources(
        streams=mapping.sources,
        prequantized=mapping.prequantized,
        fingerprint=checkpoint.fingerprint(),
        describe=str(checkpoint.path),
    )
    return drafts, sources, dict(mapping.sources)
