"""Puts a runtime into its model: what answers for modules whose weights are not there, behind hooks.

It is the last part of an assembly, and the only one that changes the model. Where it fails in the middle, the runtime
knows what is in, and its `detach` takes that out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.materialise import check_nothing_on_meta, make_absent, move_rest
from offload_rt.errors import ConfigError
from offload_rt.guards.additions import Additions
from offload_rt.guards.frozen_weights import FrozenWeights
from offload_rt.layers.access import Access, LookupAccess, ResidentAccess
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.layers.block import Binding, Block
from offload_rt.layers.discover import BlockDraft
from offload_rt.layers.surroundings import Surroundings
from offload_rt.optimizer.training import FullTraining
from offload_rt.plans.plan_options import policy_of
from offload_rt.quantized.packed_linear import packed_linears
from offload_rt.tiering.rows import RowSource
from offload_rt.tokenwise.layer import TokenwiseLayer
from offload_rt.tokenwise.tiles import Places
from offload_rt.vocabulary.backbone import find_causal_model
from offload_rt.vocabulary.edge import StreamedModule, keep_head_input_contiguous
from offload_rt.vocabulary.lookup import LookupModule
from offload_rt.vocabulary.loss_head import LossHead
from offload_rt.vocabulary.tiled_linear import TiledLinear
from offload_rt.wiring.runtime import Runtime
from planners.plans.plan import DecodeScope


class ModelAssembly:
    """Of one runtime, whose `blocks`, `layers`, `streamed`, `packed` and what belongs to the head it fills."""

    def __init__(
        self,
        runtime: Runtime,
        places: Places,
        tensor_device: torch.device,
        *,
        row_sources: Mapping[str, RowSource],
        tiles: list[tuple[int, int]],
    ) -> None:
        """`row_sources` are by block, of those that are looked up; `tiles` are rows of the head, which the last of the
        runtime's executors streams.
        """
        self._runtime, self._places, self._tensor_device = runtime, places, tensor_device
        self._workload, self._plan = runtime.made_of.workload, runtime.plan
        self._row_sources, self._tiles = row_sources, tiles

    def put_in(self) -> None:
        """Takes the weights out of the model and puts the hooks in. Parameters that no block stores have their values.

        Raises `CheckpointError` where something of the model has none.
        """
        runtime, model = self._runtime, self._workload.model
        for draft in self._workload.drafts:
            self._add(draft)
        check_nothing_on_meta(model, self._workload.sources.describe)
        if runtime.device is not None:
            move_rest(model, self._workload.stored_ids(), self._tensor_device)
        for layer in runtime.layers:
            layer.block.attach()
            layer.attach()
            runtime.packed += packed_linears(layer.block, runtime.products)
        for linear in runtime.packed:
            linear.attach()
        for module in runtime.streamed:
            module.attach()
        runtime.contiguous_head = keep_head_input_contiguous(model)
        runtime.loss_head = self._loss_head()
        if isinstance(runtime.training, FullTraining):
            runtime.training.weights_are_in_place()
        trains = {draft.name for draft in self._workload.drafts if draft.trains}
        runtime.frozen = FrozenWeights([block for block in runtime.blocks if block.name not in trains])

    def _add(self, draft: BlockDraft) -> None:
        """Makes the block of `draft`, takes its weights out of the model, and makes what answers for its modules."""
        runtime = self._runtime
        bindings = tuple(
            Binding(spec, entry.parameter, entry.owners)
            for spec, entry in zip(draft.spec.tensors, draft.parameters, strict=True)
        )
        for binding in bindings:
            make_absent(binding.parameter, self._tensor_device)
        block = Block(draft.name, draft.modules, draft.spec, bindings, runtime.decoder)
        runtime.blocks.append(block)
        access = runtime.accesses[draft.name]
        if isinstance(access, ResidentAccess):
            block.open(access.slot)
        if draft.is_layer:
            runtime.layers.append(self._layer(draft, block, access))
        elif isinstance(access, LookupAccess):
            runtime.streamed.extend(self._in_pieces(module, block) for module in draft.modules)
        elif not isinstance(access, ResidentAccess):
            runtime.streamed.extend(StreamedModule(module, block, access) for module in draft.modules)

    def _layer(self, draft: BlockDraft, block: Block, access: Access) -> RecomputedLayer:
        runtime = self._runtime
        if draft.name not in runtime.additions:
            runtime.additions[draft.name] = Additions(draft.modules[0])
        deliver = None
        if draft.trains and isinstance(runtime.training, FullTraining):
            deliver = runtime.training.taker(draft.name)

        given = (draft.modules[0], block, access, self._around)
        policy, additions = policy_of(self._plan, draft), runtime.additions[draft.name]
        if policy is None or runtime.tokenwise is None:
            return RecomputedLayer(*given, deliver=deliver, additions=additions)
        tokenwise = runtime.tokenwise
        return TokenwiseLayer(*given, policy=policy, tokenwise=tokenwise, deliver=deliver, additions=additions)

    @cached_property
    def _around(self) -> Surroundings:
        """Of all layers."""
        runtime, places = self._runtime, self._places

        def between() -> None:
            runtime.heap.check()
            runtime.turns.pass_on()

        return Surroundings(
            stash=places.layer_inputs,
            hold_decoded=self._plan.decode_scope is DecodeScope.LAYER,
            leave_out_product=runtime.made_of.options.leave_out_products,
            counters=runtime.layer_counters,
            transients=runtime.transients,
            between=between,
            latest=places.latest,
            start_from=places.start_from,
            together=lambda: runtime.turns.active,
        )

    def _in_pieces(self, module: nn.Module, block: Block) -> LookupModule | TiledLinear:
        """What answers for `module`, of a block that is read by rows or tiles."""
        rows = self._runtime.rows
        if isinstance(module, nn.Embedding) and rows is not None:
            return LookupModule(module, block, self._row_sources[block.name], rows, self._ahead_of_lookups())
        return TiledLinear(module, block, self._runtime.executors[-1], self._tiles)

    def _ahead_of_lookups(self) -> Callable[[], None]:
        """What a lookup, which begins a forward pass, starts: the fetch of the first block that is needed whole."""
        executors = [executor for executor in self._runtime.executors if executor.ring.name in ("edges", "tiles")]
        return executors[0].foresee if executors else lambda: None

    def _loss_head(self) -> LossHead | None:
        """Puts the loss into tiles, if the plan says so."""
        runtime, chunk_tokens = self._runtime, self._plan.head_chunk_tokens
        if chunk_tokens is None:
            return None
        causal = find_causal_model(self._workload.model)
        if causal is None:
            raise ConfigError("plan: takes the loss in tiles, but the model has no loss that can be")
        output: Any = getattr(causal, "get_output_embeddings", lambda: None)()
        within = [] if output is None else list(output.modules())
        streamed = [module for module in runtime.streamed if module.module in within]
        held = [module.held for module in streamed if isinstance(module, StreamedModule)]
        tiled = next((module for module in streamed if isinstance(module, TiledLinear)), None)
        head = LossHead(
            causal, chunk_tokens, *held[:1], linear=tiled, between=runtime.heap.check, transients=runtime.transients
        )
        head.counters = runtime.counted.get("loss_head", head.counters)
        head.attach()
        return head
