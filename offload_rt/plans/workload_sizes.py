"""The question that the planner is asked about a workload: sizes of its blocks and of what trains, and what
this machine has for them within the budgets. Reads shapes, free memory and free space; changes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence

import torch
from torch import nn

from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError
from offload_rt.layers.discover import BlockDraft
from offload_rt.memory.cuda_memory import beside_plan_bytes, capacity_bytes, thread_bytes
from offload_rt.memory.process_memory import free_memory_bytes
from offload_rt.optimizer.arrivals import ARRIVING_SLOTS, largest_arrival_bytes
from offload_rt.optimizer.landing import LANDING_SLOTS, largest_range_bytes
from offload_rt.optimizer.on_device import stepping_bytes
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.profiling.profile import (
    attention_bytes,
    chunked_size,
    estimate_activation_bytes,
    layer_input_bytes,
    loss_head_size,
)
from offload_rt.storage.commit_layout import LOG_BUFFER_BYTES
from offload_rt.storage.store import store_folders, usable_bytes
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.wiring.workload import Workload
from planners.plans.training_state import TrainedSize, TrainingSizes
from planners.plans.vocabulary import RowsSize
from planners.rule.streaming_problem import BlockSize, StreamingProblem

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
    on_gpu = config.device != "cpu"
    batch_size, seq_len = config.batch_size, config.seq_len
    activation_bytes = estimate_activation_bytes(
        model, drafts, batch_size=batch_size, seq_len=seq_len, on_cpu=not on_gpu
    )
    input_bytes = layer_input_bytes(drafts, batch_size=config.batch_size, seq_len=config.seq_len)
    passing_bytes = input_bytes if workload.has_streams else 0
    activation_bytes += passing_bytes
    unified = config.host_memory_bytes is None and not on_gpu
    nvme_capacity = None
    if config.nvme:
        folders = store_folders(config.nvme, workload.key)
        nvme_capacity = sum(usable_bytes(folder, drive) for folder, drive in zip(folders, config.nvme, strict=True))
        if workload.training is not None:  # what an earlier run's state takes is there for this run's
            state = store_folders(config.nvme, workload.training.key)
            nvme_capacity += sum((f / "state.bin").stat().st_size for f in state if (f / "state.bin").exists())
    # Before the capacity is taken: one thread's is there then, and no more the plan's.
    of_a_thread = thread_bytes(torch.device(config.device)) if config.accumulation_steps > 1 else 0
    device_capacity, beside_plan = _device_bytes(model, config)
    return StreamingProblem(
        fingerprint=_fingerprint(workload),
        layers=tuple(block_size(d) for d in drafts if d.is_layer),
        edges=tuple(block_size(d, most_rows=config.batch_size * config.seq_len) for d in drafts if not d.is_layer),
        trainable_bytes=trainable_bytes,
        layer_input_bytes=input_bytes,
        activation_bytes=activation_bytes,
        passing_bytes=passing_bytes,
        attention_bytes=attention_bytes(model, drafts, batch_size=batch_size, seq_len=seq_len, on_cpu=not on_gpu),
        allocator_slack_bytes=allocator_slack_bytes(
            trainable_bytes,
            activation_bytes,
            placed=places_transients(workload, activation_bytes, workload.placed_bytes),
        ),
        loss_head=loss_head_size(model, batch_size=config.batch_size, seq_len=config.seq_len),
        device_capacity_bytes=device_capacity,
        beside_plan_bytes=beside_plan,
        host_capacity_bytes=_host_bytes(workload),
        nvme_capacity_bytes=nvme_capacity,
        unified=unified,
        training=None if workload.training is None else training_sizes(workload),
        stages_pieces=not workload.has_streams,
        fills=on_gpu or config.device_memory_bytes is not None,
        chunked=chunked_size(model, drafts, batch_size=batch_size, seq_len=seq_len, on_cpu=not on_gpu),
        num_micro_batches=config.accumulation_steps,
        thread_bytes=of_a_thread,
    )


def _device_bytes(model: nn.Module, config: EngineConfig) -> tuple[int, int]:
    """What may lie in DEVICE memory, the model included, where it is there already; what a budget has room for beside
    that.
    """
    if config.device == "cpu":
        return config.device_memory_bytes or free_memory_bytes(), 0
    device = torch.device(config.device)
    tensors = itertools.chain(model.parameters(), model.buffers())
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    model_bytes = sum(held.values())
    capacity = capacity_bytes(device, config.device_memory_bytes, model_bytes)
    return capacity, beside_plan_bytes(device, model_bytes)


def _host_bytes(workload: Workload) -> int | None:
    """What the plan may have of HOST memory; None where that is not bounded beside DEVICE."""
    config = workload.config
    if config.device == "cpu":
        return config.host_memory_bytes
    return max(0, (config.host_memory_bytes or free_memory_bytes()) - workload.ring_bytes)


def largest_saved_bytes(workload: Workload, num_tokens: int) -> int:
    """One tensor that a layer saves of so many tokens of each sequence, at most: the widest it has, in fp32."""
    widest = max((size for draft in workload.layers for t in draft.spec.tensors for size in t.shape[-2:]), default=1)
    return align_up(4 * workload.config.batch_size * num_tokens * widest, IO_ALIGNMENT_BYTES)


def gradients_under_way_bytes(workload: Workload) -> int:
    """Memory for gradients of all parameters on their way to where they wait: those of the block that needs most."""
    of_layers = [draft.spec.compute_bytes for draft in workload.drafts if draft.trains]
    stored = workload.stored_ids()
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


def block_size(draft: BlockDraft, *, most_rows: int = 0) -> BlockSize:
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


def _fingerprint(workload: Workload) -> str:
    """What a plan is made for: the blocks' layout, the shape of the batch, and what trains."""
    config, training = workload.config, workload.training
    parts: list[object] = [[d.spec.to_json() for d in workload.drafts], config.batch_size, config.seq_len, config.bits]
    if training is not None:
        parts += [training.rule.name, [draft.trains for draft in workload.drafts], config.accumulation_steps > 1]
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
