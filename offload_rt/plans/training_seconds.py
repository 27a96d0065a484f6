"""What layers that train take, and stepping them: measured, for the question that `planning_training` asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.plans.planning import layer_seconds
from offload_rt.profiling.edge_profile import profile_embedding, profile_head
from offload_rt.profiling.update_profile import delivery_seconds, steps_per_second
from offload_rt.profiling.workbench import Workbench, workbench_of
from offload_rt.wiring.workload import Workload
from planners.problems.measured import MeasuredSeconds
from planners.rule.attempts import head_chunk_tokens
from planners.rule.streaming_problem import StreamingProblem

NOTHING = MeasuredSeconds(forward=0.0, backward=0.0)
"""Of a block that computes nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingSeconds:
    """What was measured. Blocks by name."""

    layers: dict[str, MeasuredSeconds]
    head: MeasuredSeconds
    """With the loss."""
    embeddings: dict[str, MeasuredSeconds]
    steps_per_second: float
    """Parameters."""
    deliveries_per_second: float
    """Parameters whose gradients are put where they wait, by who computes: of each micro-batch."""
    arrivals_per_second: float = math.inf
    """Parameters whose gradients the processor takes from a device: what it steps in a second is less by that already.
    """


def measured_seconds(
    workload: Workload, streaming: StreamingProblem, optimizer: torch.optim.Optimizer
) -> TrainingSeconds:
    """Times one layer of each kind, head and embeddings, on the device that will compute, and the code that steps
    blocks, on the processor. Blocks for seconds.

    What a device computes with does not wait for gradients to be put where they wait: the processor takes them, which
    steps so much less in a second.
    """
    config, training = workload.config, workload.require_training()
    with workbench_of(config) as bench:
        layers = layer_seconds(workload, None, bench)
        head = _head_seconds(workload, streaming, bench)
        embeddings = {
            block.name: profile_embedding(
                vocabulary=table.num_embeddings, hidden_size=table.embedding_dim,
                num_tokens=config.batch_size * config.seq_len, dtype=table.weight.dtype, bench=bench,
            )
            for block in training.blocks
            if (table := _table(workload.model, block)) is not None
        }  # fmt: skip
    streams = [block for block in training.blocks if block.weights is not None]
    largest = max(streams or training.blocks, key=lambda block: block.state_bytes)
    steps = steps_per_second(largest, training.rule, optimizer.param_groups[0], on_nvme=bool(config.nvme))
    deliveries = largest.num_elements / delivery_seconds(largest, config.accumulation_steps)
    arrivals = math.inf
    if workload.has_streams:
        steps, deliveries, arrivals = 1 / (1 / steps + 1 / deliveries), math.inf, deliveries
    return TrainingSeconds(
        layers=layers, head=head, embeddings=embeddings, steps_per_second=steps, deliveries_per_second=deliveries,
        arrivals_per_second=arrivals,
    )  # fmt: skip


def _head_seconds(workload: Workload, streaming: StreamingProblem, bench: Workbench) -> MeasuredSeconds:
    """Of head and loss; nothing where the model has none that the runtime knows."""
    output = getattr(workload.model, "get_output_embeddings", lambda: None)()
    if streaming.loss_head is None or output is None:
        return NOTHING
    weight, tokens = output.weight, streaming.loss_head.num_tokens
    return profile_head(
        hidden_size=weight.shape[1], vocabulary=weight.shape[0], num_tokens=tokens,
        tile_tokens=head_chunk_tokens(streaming) or tokens, dtype=weight.dtype, trains=weight.requires_grad,
        bench=bench,
    )  # fmt: skip


def _table(model: nn.Module, block: TrainedBlock) -> nn.Embedding | None:
    """The embedding whose weights a block outside the layers is."""
    own = {id(trained.parameter) for trained in block.parameters if block.weights is None}
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return next((table for table in tables if id(table.weight) in own), None)
