"""The assembled parts of one engine: how calls go through them together, and how they are taken apart again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from offload_rt.closing import all_close
from offload_rt.guards.additions import Additions
from offload_rt.guards.frozen_weights import FrozenWeights
from offload_rt.layers.access import Access, GoneAccess, ResidentAccess
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.layers.block import Block, Shown
from offload_rt.layers.discover import Coverage
from offload_rt.layers.executor import ExecutorCounters, RingExecutor
from offload_rt.layers.surroundings import LayerCounters
from offload_rt.layers.turns import Turns
from offload_rt.memory.arena import Slot
from offload_rt.memory.heap import Base, HeapGuard
from offload_rt.memory.transients import Transients
from offload_rt.optimizer.interface import Training
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.plans.asked import Asked
from offload_rt.plans.plan_choice import Choice
from offload_rt.plans.plan_options import with_options
from offload_rt.quantized.decoder import Decoder
from offload_rt.quantized.nf4_products import Products
from offload_rt.quantized.packed_linear import PackedLinear
from offload_rt.storage.scratch import Scratch
from offload_rt.storage.store import Store
from offload_rt.tiering.moving import Move
from offload_rt.tiering.resting import Resting
from offload_rt.tiering.rows import RowReader
from offload_rt.tiering.tiers import Tiers
from offload_rt.tokenwise.layer import Tokenwise
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.device_times import DeviceTimes
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.throttle import Throttle
from offload_rt.vocabulary.edge import StreamedModule
from offload_rt.vocabulary.lookup import LookupModule
from offload_rt.vocabulary.loss_head import LossHead
from offload_rt.vocabulary.tiled_linear import TiledLinear
from offload_rt.wiring.runtime_options import RuntimeOptions, TensorDevice
from offload_rt.wiring.workload import Workload
from planners.plans.plan import Plan
from planners.rule.streaming_problem import Cuts, StreamingProblem

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """What a runtime was assembled from, to make another one for the same model."""

    workload: Workload
    problem: StreamingProblem
    options: RuntimeOptions
    base: Base
    throttle: Throttle | None
    plan_again: Callable[[StreamingProblem], Plan] | None
    """The fixed rule, for other sizes; None where the plan is another's, or the runtime cannot change over."""
    asked: Asked | None = None
    """What the optimiser was asked, where the plan is its own."""
    choice: Choice | None = None
    """Of plan="auto"; None where the plan was given."""

    def as_fixed(self, plan: Plan) -> Plan:
        """`plan` with what the options override: whoever makes it again knows nothing of them."""
        return with_options(plan, self.workload, self.options, self.problem.training)

    def times_of(self, device: TensorDevice | None) -> DeviceTimes | None:
        """Of a device with streams, new ones; None where there is none."""
        if device is None:
            return None
        calls = len(self.workload.layers) * self.workload.config.accumulation_steps
        duplex = 1.0 if self.asked is None else self.asked.question.hardware.links.duplex
        return DeviceTimes(device, num_layers=calls, duplex=duplex)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a runtime is to change over to."""

    problem: StreamingProblem
    plan: Plan
    asked: Asked | None = None
    """The questions that the plan answers one of; None where it is the rule's for `problem`."""
    more_bytes: int = 0
    """Of DEVICE, what tensors were found to take more than the plan says."""


@dataclass(kw_only=True)
class Runtime:
    """The assembled parts of one engine, and how to take them apart again."""

    plan: Plan
    tiers: Tiers
    links: Links
    decoder: Decoder
    blocks: list[Block]
    accesses: dict[str, Access]
    """By the block's name."""
    executors: list[RingExecutor]
    layers: list[RecomputedLayer]
    additions: dict[str, Additions]
    """By the block of each layer, what it got since the engine was made. Runtimes hand this on."""
    products: Products
    packed: list[PackedLinear]
    """Linears whose weights are not always decoded."""
    streamed: list[StreamedModule | LookupModule | TiledLinear]
    rows: RowReader | None
    """What lookups get their rows by."""
    loss_head: LossHead | None
    heap: HeapGuard
    transients: Transients
    contiguous_head: RemovableHandle | None
    layer_counters: LayerCounters
    tokenwise: Tokenwise | None
    """What the layers that run by chunks of tokens share; None if none does."""
    coverage: Coverage
    store: Store | None
    store_was_cached: bool
    scratch: Scratch | None
    recorder: Recorder | None
    turns: Turns
    """Of the micro-batches of a `train_batch`, where the plan takes them layer by layer."""
    training: Training
    device: TensorDevice | None
    """DEVICE, where its work is asynchronous; None where it is RAM."""
    made_of: MadeOf
    resting: Resting
    """Memory with the only copy of frozen weights, which whoever follows takes over; empty where there is a store."""
    moved: list[Move] = field(default_factory=list)
    """What of `resting` is not where `plan` has it: made for another plan, which then did not follow."""
    frozen: FrozenWeights = field(default_factory=FrozenWeights)
    """Says what somebody has written into weights that do not train."""
    shown: list[Shown] = field(default_factory=list)
    """Weights in DEVICE that it has let go of, or a runtime before it, and that somebody may still see."""
    cuts: Cuts
    """Of `plan`."""
    ring_counters: dict[str, ExecutorCounters] = field(default_factory=dict)
    """By ring, of the executors that there were: before this runtime, and its own once it has let go of them."""
    counted: dict[str, Any] = field(default_factory=dict)
    """Counters of what it has let go of, and the runtimes before it, by field."""
    _closed: bool = field(default=False)

    def counters(self) -> list[Any]:
        """Dataclasses of what was counted since the start, those of memory left out."""
        found: list[Any] = [self.links.counters, self.layer_counters, self.decoder.counters]
        found += [executor.counters for executor in self.executors]
        if self.loss_head is not None:
            found.append(self.loss_head.counters)
        if self.rows is not None:
            found.append(self.rows.counters)
        found += [self.transients.counters, self.products.counters]
        if self.tokenwise is not None:
            found += [self.tokenwise.counters, self.tokenwise]
        return found

    def state_left(self) -> Mapping[str, Slot]:
        """Memory with the only copy of state in tiers, by piece, which whoever follows takes over; none with a log."""
        return self.training.only_copies if isinstance(self.training, TieredTraining) else {}

    def only_copies(self) -> list[Slot]:
        """Of everything that whoever follows takes over."""
        return [*self.resting.values(), *self.state_left().values()]

    def seen_elsewhere(self) -> list[Shown]:
        """Weights of `shown` that somebody still sees: who keeps a state_dict. Their memory is not given back, but is
        theirs.
        """
        if any(each.is_seen for each in self.shown):
            gc.collect()
        self.shown = [each for each in self.shown if each.is_seen]
        return self.shown

    def counters_of_rings(self) -> dict[str, ExecutorCounters]:
        """By its name, of each ring that there was since the start."""
        return self.ring_counters | {executor.ring.name: executor.counters for executor in self.executors}

    def go_on_counting(self, before: Runtime) -> None:
        """Counts on from where `before`, which this runtime follows, has left off."""
        self.layer_counters = before.layer_counters
        self.decoder.counters = before.decoder.counters
        self.products.counters = before.products.counters
        self.turns.num_passed_on = before.turns.num_passed_on
        self.heap.counters = before.heap.counters
        self.counted = before.counted
        self.ring_counters = dict(before.ring_counters)
        for executor in self.executors:
            executor.counters = self.ring_counters.get(executor.ring.name, executor.counters)
        for name, part in self._parts_with_counters():
            part.counters = self.counted.get(name, part.counters)

    def _parts_with_counters(self) -> list[tuple[str, Any]]:
        """Those that `let_go` forgets, by field."""
        parts = ((name, getattr(self, name)) for name in ("rows", "loss_head", "transients", "tokenwise"))
        return [(name, part) for name, part in parts if part is not None]

    def on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments where it computes. Waits for none but those in locked memory: the pageable has been read
        when this returns, the locked is its owner's to change then. Raises as `check_stream` of the device.
        """
        if self.device is None:
            return args, kwargs
        self.device.check_stream()
        device = self.device.device

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=not tensor.is_pinned())

        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, moved, (args, kwargs))
        return found

    @property
    def is_in_flight(self) -> bool:
        """Whether a forward pass has been whose backward pass may still come: it needs the blocks as they are."""
        return any(layer.is_in_flight for layer in self.layers)

    def run_together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Runs calls of the model, or their backward passes, layer by layer; returns their results. Blocks."""
        shared = [executor for executor in self.executors if executor.ring.name != "tiles"]  # a call takes all of these
        for executor in shared:
            executor.num_calls = len(calls)
        try:
            return self.turns.run(calls)
        finally:
            for executor in shared:
                executor.num_calls = 1

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Takes the hooks out, waits for what is under way, closes files. The weights stay absent."""
        if self._closed:
            return
        self._closed = True
        drains = [executor.drain for executor in self.executors]
        # A commit that is due may fail.
        all_close(
            self.detach, *drains, self.training.close, self.turns.close, self.links.close, self.heap.close,
            self._close_files,
        )  # fmt: skip

    def give_back(self, *, resident: bool = False) -> None:
        """Gives the memory of its arenas back, after `close`, when nobody follows. What somebody still sees of a layer
        stays his; a graph that is still around can go back no more. Counters stay.

        resident: weights that never leave DEVICE go, too, of a runtime that nobody has called; else they stay the
        model's.
        """
        if self.links.is_stuck:
            return
        seen = self.used_elsewhere()
        if self.device is not None:  # whose kernels may be behind; copies are over
            self.device.compute.record().wait()
        stays: list[Slot] = []
        if resident:
            self.let_go()
        else:
            self._refuse_from_now_on("the engine was closed; weights that it needs are not in memory any more")
            stays = [access.slot for access in self.accesses.values() if isinstance(access, ResidentAccess)]
        self.tiers.give_back(keep=stays, seen=seen)

    def used_elsewhere(self) -> list[Any]:
        """Regions of memory that layers compute with, where somebody else has kept something of it: a hook, say."""
        arenas = [executor.arena for executor in self.executors] + [self.decoder.arena, self.transients.arena]
        return [arena.region for arena in arenas if arena is not None and arena.held_bytes()]

    def _refuse_from_now_on(self, why: str) -> None:
        """Graphs that are still around hold no memory, and cannot go back any more."""
        gone = GoneAccess(why)
        for layer in self.layers:
            layer.let_go(gone)
        for module in self.streamed:
            module.let_go(gone)
        if self.tokenwise is not None:
            self.tokenwise.places = Places()

    def _close_files(self) -> None:
        if not self.links.is_stuck:
            all_close(*(part.close for part in (self.scratch, self.store) if part is not None))

    def detach(self) -> None:
        """Takes the hooks out, those that are in."""
        for layer in self.layers:
            layer.detach()
        for module in self.streamed:
            module.detach()
        for linear in self.packed:
            linear.detach()
        if self.loss_head is not None:
            self.loss_head.detach()
        if self.contiguous_head is not None:
            self.contiguous_head.remove()
        for block in self.blocks:
            block.detach()

    def let_go(self) -> None:
        """Gives the memory of its arenas back, after `close`, to whoever follows. Counters and `resting` stay."""
        self.ring_counters = self.counters_of_rings()
        for name, part in self._parts_with_counters():
            self.counted.setdefault(name, part.counters)
        self._refuse_from_now_on("a change of plans; call the model again")
        for block in self.blocks:
            self.shown += block.shown_for_good()
            while block.is_open:
                block.close()
        for parts in (self.layers, self.streamed, self.packed, self.blocks, self.executors):
            parts.clear()
        self.accesses.clear()
        self.decoder.let_go()
        self.transients, self.tokenwise, self.loss_head, self.rows = Transients(), None, None, None
