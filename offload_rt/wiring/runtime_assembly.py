"""Makes the parts of a runtime that a checked plan asks for, one after the other, and puts them into the model last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from offload_rt.checkpoint.materialise import materialise_rest
from offload_rt.closing import all_close
from offload_rt.layers.access import Access
from offload_rt.layers.discover import Coverage
from offload_rt.layers.executor import RingExecutor
from offload_rt.layers.surroundings import LayerCounters
from offload_rt.layers.turns import Turns
from offload_rt.memory.heap import HeapGuard
from offload_rt.memory.transients import Transients
from offload_rt.optimizer.adapters import AdapterTraining
from offload_rt.optimizer.in_memory import AdapterSteps, MemoryTraining
from offload_rt.optimizer.interface import Training
from offload_rt.optimizer.log_commit import open_log
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.plans.cuts import cuts_of, products_of
from offload_rt.quantized.decoder import Decoder
from offload_rt.storage.store import Store
from offload_rt.tiering.moving import Move, Mover
from offload_rt.tiering.resting import Resting
from offload_rt.tiering.rows import RowReader, RowSource
from offload_rt.tiering.tiers import Tiers
from offload_rt.tokenwise.layer import Tokenwise
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.device_cuda import CudaDevice
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.streams import COMPUTE
from offload_rt.wiring.activation_assembly import ActivationsAssembly
from offload_rt.wiring.model_assembly import ModelAssembly
from offload_rt.wiring.ring_assembly import lock_ring
from offload_rt.wiring.runtime import MadeOf, Runtime
from offload_rt.wiring.state_assembly import StateAssembly
from offload_rt.wiring.store_assembly import Progress, build_store
from offload_rt.wiring.weights_assembly import WeightsAssembly
from planners.plans.plan import DecodeScope, Plan, Tier
from planners.rule.attempts import WHAT_TRAINS


class RuntimeAssembly:
    """Makes the parts one after the other. What was opened is closed again if a later part cannot be made."""

    def __init__(
        self,
        made_of: MadeOf,
        plan: Plan,
        progress: Progress | None,
        before: Runtime | None = None,
        moves: Sequence[Move] = (),
        more_bytes: int = 0,
    ) -> None:
        """`before` is the runtime that this one follows: the model has its values then, but for what streams, and
        `moves` are what of its frozen weights is elsewhere in this one. `more_bytes`: as `Change` has it.
        """
        self.moves = moves
        self.more_bytes = more_bytes
        self.made_of = made_of
        self.base = made_of.base
        self.workload = workload = made_of.workload
        self.problem = problem = made_of.problem
        self.plan = plan
        self.options = options = made_of.options
        self.progress = progress
        self.before = before
        on_cpu = workload.config.device == "cpu"
        if before is not None:
            self.device = before.device
            if self.device is not None:
                self.device.pass_through(None)  # its memory was given back
        else:
            self.device = (
                options.device if on_cpu else CudaDevice(workload.config.device, ring_bytes=workload.ring_bytes)
            )
        self.recorder = None
        if options.record:
            self.recorder = Recorder() if self.device is None else Recorder(compute=COMPUTE)
        self.links = Links(
            recorder=self.recorder, device=self.device, delay_seconds=options.delay_seconds, throttle=made_of.throttle,
            meter=None if before is None else before.links.meter,
            counters=None if before is None else before.links.counters,
            times=made_of.times_of(self.device) if before is None else before.links.times,
        )  # fmt: skip
        host_bytes = problem.host_capacity_bytes
        self.tiers = Tiers(
            problem.device_capacity_bytes, None if host_bytes is None else host_bytes + workload.ring_bytes,
            problem.nvme_capacity_bytes,
            unified=problem.unified, poison=options.poison, device=self.device,
        )  # fmt: skip
        self.store: Store | None = None
        self.store_was_cached = False
        self.activations = ActivationsAssembly(workload, problem, plan, self.tiers, self.links, self.device)
        self.executors: list[RingExecutor] = []
        self.resting: Resting = {}
        self.rows: RowReader | None = None
        self.row_sources: dict[str, RowSource] = {}
        self.tiles: list[tuple[int, int]] = []
        """Rows of the tiles of the head, which the last of `executors` streams."""
        self.heap: HeapGuard | None = None
        self.turns = Turns() if self.device is None else Turns(self.device.on_compute)
        self.tiered: TieredTraining | None = None
        self.additions = {} if before is None else before.additions
        self.runtime: Runtime | None = None
        self.state: StateAssembly | None = None
        if workload.training is not None:
            self.state = StateAssembly(
                workload, plan, self.tiers, self.links, options, goes_on=before is not None,
                left={} if before is None else before.state_left(),
            )  # fmt: skip

    def __enter__(self) -> RuntimeAssembly:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            return
        training = self.state if self.tiered is None else self.tiered
        parts = [training, self.links, self.heap]
        closings = [part.close for part in parts if part is not None]
        hooks, weights = [], []
        if self.runtime is not None:  # part of it is in the model, which goes on with another, or is a user's again
            hooks, weights = [self.runtime.detach], [self.runtime.let_go]
        try:
            all_close(*hooks, *(each.drain for each in self.executors), *closings, self._close_files, *weights)
        finally:
            if self.before is not None:  # whoever goes back takes as much, and the error still sees this
                self.tiers.give_back(keep=self.before.only_copies())

    def _close_files(self) -> None:
        if not self.links.is_stuck:
            all_close(*(part.close for part in (self.activations.scratch, self.store) if part is not None))

    def run(self, covered: Coverage, optimizer: torch.optim.Optimizer | None) -> Runtime:
        if self.workload.config.nvme and self.workload.frozen:
            self._open_store()
        device = self.tiers.account(Tier.DEVICE)
        device.reserve(WHAT_TRAINS, self.problem.trainable_bytes)
        if self.before is not None and self.moves:
            self._move(self.before)
        decoder = self._decoder()
        transients = self.activations.transients()
        device.reserve("activations", self.more_bytes)
        device.reserve("freed, held back by the allocator", self.activations.slack_bytes)
        if self.state is not None:
            self.state.open()
        weights = WeightsAssembly(
            self.workload, self.plan, self.tiers, self.links, self.store, self.state, self.recorder,
            device_is_asynchronous=self.device is not None, left=self._left(),
        )  # fmt: skip
        self.resting = weights.resting
        accesses = weights.resident()
        for ring in self.plan.rings:
            executor, streamed = weights.ring(ring)
            self.executors.append(executor)
            accesses.update(streamed)
        if self.plan.lookups is not None:
            self.rows, self.row_sources = weights.lookups(self.plan.lookups)
        if self.plan.head_tiles is not None:
            executor, self.tiles = weights.head_tiles(self.plan.head_tiles)
            self.executors.append(executor)
        accesses.update(weights.bring_what_is_in_pieces())
        places = self.activations.places()
        runtime = self._attach(decoder, accesses, places, transients, covered, optimizer)
        if self.device is not None:
            lock_ring(self.device, self.tiers, self.workload.ring_bytes)
        return runtime

    def _move(self, before: Runtime) -> None:
        """Moves weights of `before`, which knows how far it came. Nothing else of either plan is booked meanwhile."""
        state = list(before.state_left().values())
        seen = [each.region() for each in before.shown]
        mover = Mover(self.workload, before.resting, state, self.tiers, self.links, self.device, seen)
        for move in self.moves:
            mover.move(move)
            if before.moved[-1:] == [move.back]:
                before.moved.pop()
            else:
                before.moved.append(move)
        mover.finish()

    def _left(self) -> Resting | None:
        """The memory with frozen weights that the runtime before hands over; None where they are brought."""
        if self.before is None or self.store is not None:
            return None
        return self.before.resting

    def _open_store(self) -> None:
        """Finds the store, or builds it."""
        workload = self.workload
        self.store = Store(workload.config.nvme, workload.key, self.links)
        self.store_was_cached = self.store.complete
        if not self.store_was_cached:
            build_store(self.store, workload, self.progress)
        self.tiers.account(Tier.NVME).reserve("weights", self.store.stored_bytes)

    def _decoder(self) -> Decoder:
        """Room for two modules: one in use, one that autograd still holds; or for a layer besides."""
        num_bytes = 2 * max((layer.largest_module_bytes for layer in self.problem.layers), default=0)
        if self.plan.decode_scope is DecodeScope.LAYER:
            num_bytes += max((layer.decoded_bytes for layer in self.problem.layers), default=0)
        return Decoder(self.tiers.arena(Tier.DEVICE, "decoded weights", num_bytes), self._tensor_device)

    @property
    def _tensor_device(self) -> torch.device:
        """Where torch computes."""
        return torch.device("cpu") if self.device is None else self.device.device

    def _attach(
        self,
        decoder: Decoder,
        accesses: dict[str, Access],
        places: Places,
        transients: Transients,
        covered: Coverage,
        optimizer: torch.optim.Optimizer | None,
    ) -> Runtime:
        """Takes the weights out of the model and puts the hooks in. Nothing before this changed the model."""
        heap = self.heap = self._heap()
        workload = self.workload
        if self.before is None:
            materialise_rest(workload.model, workload.rest, workload.stored_ids())
        tokenwise = Tokenwise(replace(places, between_chunks=heap.check)) if self.plan.activations else None
        runtime = self.runtime = Runtime(
            plan=self.plan, tiers=self.tiers, links=self.links, decoder=decoder, blocks=[], accesses=accesses,
            executors=self.executors, layers=[], streamed=[], rows=self.rows, loss_head=None, heap=heap,
            layer_counters=LayerCounters(), contiguous_head=None, tokenwise=tokenwise, coverage=covered,
            store=self.store, store_was_cached=self.store_was_cached, scratch=self.activations.scratch,
            recorder=self.recorder, turns=self.turns,
            training=self._training(optimizer, make_room=heap.check), device=self.device, transients=transients,
            made_of=self.made_of, resting=self.resting, cuts=cuts_of(self.plan, workload), packed=[],
            products=products_of(self.plan, workload, self.options), additions=self.additions,
        )  # fmt: skip
        if self.before is not None:
            runtime.go_on_counting(self.before)
            runtime.shown = self.before.shown
        ModelAssembly(runtime, places, self._tensor_device, row_sources=self.row_sources, tiles=self.tiles).put_in()
        if self.before is not None:
            heap.trim()  # of what weights on their way have left; of a first runtime they are there still
        return runtime

    def _training(self, optimizer: torch.optim.Optimizer | None, *, make_room: Callable[[], None]) -> Training:
        """What trains, with the state that it begins with. Parameters that stay in memory have their values."""
        config = self.workload.config
        before = None if self.before is None else self.before.training
        opens = partial(open_log, drives=[drive.path for drive in config.nvme], links=self.links)
        if isinstance(before, MemoryTraining):
            before.open_log = opens
        if before is not None and not isinstance(before, TieredTraining):
            return before
        trainable = {name: p for name, p in self.workload.model.named_parameters() if p.requires_grad}
        if self.before is not None and isinstance(self.before.training, AdapterTraining):
            trainable = dict(self.before.training.trainable)  # what is switched off now requires no gradient
        steps = AdapterSteps(trainable, config.max_grad_norm)
        if self.state is None or optimizer is None:
            folder = None if self.store is None else self.store.folders[0] / "commit"
            return MemoryTraining(
                steps, optimizer, commit_every=config.commit_every, commit_folder=folder, open_log=opens
            )
        self.state.begin()
        training: TieredTraining
        if self.problem.training is not None and self.problem.training.adapters:
            training = self.state.finish_adapters(optimizer, steps)
        else:
            training = self.state.finish(optimizer, partial(_drain, self.executors), self.turns, make_room=make_room)
        self.tiered = training
        if before is not None:
            training.go_on_from(before)
        return training

    def _heap(self) -> HeapGuard:
        """Guards what the plan leaves to the C library: all of memory on the CPU device, of HOST on a GPU."""
        tiers = (Tier.DEVICE, Tier.HOST) if self.workload.config.device == "cpu" else (Tier.HOST,)
        accounts = {account.tier: account for account in map(self.tiers.account, tiers)}.values()
        device = self.tiers.account(Tier.DEVICE).holdings if Tier.DEVICE in tiers else {}
        kept = device.get("kept activations", 0)  # without any, inputs are small beside what the plan grants
        if self.device is None:  # what is swapped is copied at once, and leaves holes in place of a window
            kept += device.get("swapped activations on their way", 0)
        return HeapGuard(
            self.base, planned_bytes=sum(account.used_bytes for account in accounts),
            arena_bytes=sum(account.arena_bytes for account in accounts),
            slack_bytes=self.activations.slack_bytes,
            wanted_bytes=self.activations.wanted_slack_bytes if Tier.DEVICE in tiers else 0,
            lasting_bytes=device.get(WHAT_TRAINS, 0),
            kept_bytes=kept + device.get("layer inputs", 0) if kept else 0,
        )  # fmt: skip


def _drain(executors: list[RingExecutor]) -> None:
    """Nobody reads weights ahead when this returns.

    No method of the assembly: that knows the runtime before, and whoever keeps this would keep all there ever were.
    """
    for executor in executors:
        executor.drain()
