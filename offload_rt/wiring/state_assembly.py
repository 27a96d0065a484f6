"""Makes the parts of full fine-tuning: arenas, the commit log, and the state that training begins with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from offload_rt.checkpoint.ingest import fill_slot
from offload_rt.config import NvmePath
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.layers.discover import BlockDraft
from offload_rt.layers.turns import Turns
from offload_rt.memory.arena import Arena, Slot, SlotPool
from offload_rt.optimizer.adapters import AdapterTraining, ParameterGradients
from offload_rt.optimizer.arrivals import ARRIVING_SLOTS, Arrivals
from offload_rt.optimizer.by_name import LAYOUT, check_layout, layout_json, read_layout_json
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.in_memory import AdapterSteps
from offload_rt.optimizer.job import GradientSource
from offload_rt.optimizer.landing import LANDING_SLOTS, Landing
from offload_rt.optimizer.log_commit import OpenLog, note_places, open_log
from offload_rt.optimizer.on_device import DeviceUpdates, PiecesOnDevice, device_rule
from offload_rt.optimizer.paged import PagedUpdates, rule_on_device
from offload_rt.optimizer.parted_weights import PartedRoom, PartedWeights
from offload_rt.optimizer.state import (
    STATE_PREFIX,
    WEIGHTS_PREFIX,
    LogWeights,
    Part,
    StateHome,
    begin_state,
    log_extents,
)
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.optimizer.tiered_training import TieredParts, TieredTraining
from offload_rt.optimizer.training import FullTraining
from offload_rt.plans.workload_sizes import training_sizes
from offload_rt.storage.commit_layout import PAYLOAD_BYTES, MutableExtent, make_log, read_layout
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.drives import drive_profile, drive_weights
from offload_rt.storage.durable import write_atomically
from offload_rt.storage.scratch import Scratch
from offload_rt.storage.store import store_folders
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.tiers import NvmeResidence, Residence, Tiers
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import TrainingDraft, Workload
from planners.plans.plan import Plan, StatePlacement, Tier
from planners.rule.attempts import SAVING, STEPPED_THERE

AnyTraining = TypeVar("AnyTraining", bound=TieredTraining)

PARAMETER_BYTES = 1 << 10
"""Room in a commit for what is kept of a parameter besides tensors. NAdam, which keeps most, takes 612 bytes."""


class StateAssembly:
    """One engine's training state in the making. `close` undoes what was made, if a later part cannot be."""

    def __init__(
        self, workload: Workload, plan: Plan, tiers: Tiers, links: Links, options: RuntimeOptions, *,
        goes_on: bool = False, left: Mapping[str, Slot] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """`goes_on`: the state is what the log has committed; whoever asked for this brings it to memory. What is in
        `left`, by piece, is in these slots already, which the runtime before has handed over.
        """
        if workload.training is None or plan.state is None:
            raise ConfigError("plan: no layer trains")
        self._workload = workload
        self._draft: TrainingDraft = workload.training
        self._placement: StatePlacement = plan.state
        self._plan = plan
        self._tiers = tiers
        self._links = links
        self._options = options
        self._sizes = training_sizes(workload)
        self._drafts = {draft.name: draft for draft in workload.drafts if draft.trains}
        self._scratch: Scratch | None = None
        self._arrivals: Arrivals | None = None
        self._on_device: PiecesOnDevice | None = None
        self.goes_on = goes_on
        self._left = left
        self.home = StateHome(log=None, links=links)
        self.folders: list[Path] = []

    def open(self) -> None:
        """Reserves memory, and finds the log or makes it."""
        sizes, placement = self._sizes, self._placement
        self.home.on_device = frozenset(
            piece.name
            for block in self._draft.blocks
            for piece in block.pieces[len(block.pieces) - placement.on_device.get(block.name, 0) :]
        )
        copied = bool(self.home.on_device)
        in_memory = [p for b in self._draft.blocks for p in b.pieces[: placement.in_memory.get(b.name, 0)]]
        for name, there in (("optimizer state", False), ("optimizer state, copied to DEVICE", True)):
            pieces = [piece for piece in in_memory if (piece.name in self.home.on_device) == there]
            if pieces and self._left:
                self.home.pieces |= {piece.name: self._left[piece.name] for piece in pieces}
                self._tiers.take_over(Tier.HOST, name, [self._left[piece.name] for piece in pieces], copied=there)
            elif pieces:
                arena = self._arena(name, sum(piece.num_bytes for piece in pieces), copied=there)
                self.home.pieces |= {piece.name: arena.acquire(piece.num_bytes, piece.name) for piece in pieces}
        self._state_pool = self._pool(
            "optimizer state on its way", placement.state_slots, sizes.piece_bytes, copied=copied
        )
        self._weights_pool = self._pool(
            "new weights on their way", placement.weight_slots, sizes.largest_weight_bytes, copied=copied
        )
        if copied:
            self._on_device = self._updates_on_device(
                self._tiers.arena(Tier.DEVICE, STEPPED_THERE, placement.device_bytes(sizes), poisoned=False)
            )
        if sizes.landing_bytes:
            landing = self._arena("new weights on their way to DEVICE", sizes.landing_bytes)
            self.home.landing = Landing(landing, sizes.landing_bytes // LANDING_SLOTS, self._links)
        waiting = sizes.gradient_bytes
        if placement.gradients is Tier.NVME:
            waiting = placement.gradient_slots * sizes.largest_gradient_bytes
            self._tiers.account(Tier.NVME).reserve("gradients", sizes.gradient_bytes)
            self._scratch = Scratch(self._workload.config.nvme[0].path, sizes.gradient_bytes, self._links)
        self._gradient_arena = self._arena("gradients", waiting)
        if self._links.device is not None:
            staging = self._arena("gradients arriving", sizes.arriving_bytes) if sizes.arriving_bytes else None
            self._arrivals = Arrivals(self._links, staging, sizes.arriving_bytes // ARRIVING_SLOTS)
        if self._workload.config.nvme:
            self._open_log()
        host = self._tiers.account(Tier.HOST)
        between_steps = host.holdings.get("activations", 0) if self._tiers.unified else 0
        host.reserve(SAVING, max(0, self._sizes.saving_bytes - between_steps))

    def _updates_on_device(self, arena: Arena) -> PiecesOnDevice:
        rule, slot_bytes, links = self._draft.rule, self._sizes.stepping_bytes, self._links
        name = self._workload.config.device
        if not self._draft.adapters:
            return DeviceUpdates(device_rule(rule, name), arena, slot_bytes, links)
        if links.device is None:
            raise ConfigError("plan: adapters are stepped on the device, but DEVICE is RAM here")
        return PagedUpdates(
            rule_on_device(rule, name), ParameterGradients(links), links.device.device, arena, slot_bytes, links
        )

    def residence(self, draft: BlockDraft, staging: Arena | None, begin_bytes: int = 0) -> Residence:
        """Where the weights of a block of a ring on NVME rest, from `begin_bytes` on."""
        if self.home.log is None:
            raise ConfigError(f"plan: weights of {draft.name} rest on NVME, but nvme= gives no folder")
        source = LogWeights(self.home.log, begin_bytes)
        return NvmeResidence(source, draft.name, draft.spec.stored_bytes - begin_bytes, self._links, staging)

    def weights_rest_in_parts(self, name: str, parts: PartedWeights) -> None:
        """Says where a block's weights rest, in several tiers. Those in memory have their values."""
        self.home.parted[name] = parts

    def weights_rest_in(self, name: str, slot: Slot, before_change: Callable[[], None] | None = None) -> None:
        """Says that a block's weights rest in `slot`, where they are stepped in place, after `before_change`."""
        self.home.weights[name] = slot
        if before_change is not None:
            self.home.before_change[name] = before_change

    def begin(self) -> None:
        """Writes the state that training begins with. All parameters that stay in memory have their values.

        A log that has gone on from where it began is left as it is. One that has not may have begun with other values
        of what stays in memory, which do not name it.
        """
        if self.goes_on:
            return
        log = self.home.log
        fresh = log is None or not log.committed.step
        writes: deque[Transfer] = deque()
        for block in self._draft.blocks:
            rests = self.home.weights.get(block.name)
            collects, parts = self.home.collects_weights(block), self.home.parted.get(block.name)
            if not fresh and (collects or self.home.part(block, Part.IN_LOG)):
                continue
            whole: Slot | None = None
            room: Slot | PartedRoom | None = rests
            if collects:
                whole = self._room(self._weights_pool, writes)
                room = whole = whole.part(0, self._drafts[block.name].spec.stored_bytes)
                fill_slot(self._drafts[block.name], self._workload.sources, whole)
            elif parts is not None:
                room = parts.room(None)
            for piece in block.pieces:
                slot = self.home.pieces.get(piece.name)
                if slot is None:
                    slot = self._room(self._state_pool, writes).part(0, piece.num_bytes)
                begin_state(slot, piece, block, room)
                if log is not None and piece.name not in self.home.pieces:  # the others are written by the commit
                    writes.append(self.home.write_back(piece, slot))
                del slot
            if whole is not None:
                if parts is not None:
                    streamed = whole.part(parts.split.device_bytes, parts.split.streamed_bytes)
                    room = PartedRoom(None, streamed, parts.split.device_bytes)
                    del streamed
                if room is not None:
                    writes.append(self.home.write_weights(block, room))
            del rests, room, whole
        for write in writes:
            self._links.wait(write)

    def finish_adapters(self, made: torch.optim.Optimizer, steps: AdapterSteps) -> AdapterTraining:
        """The updates of adapters whose state this is, begun; a first commit is there, unless the log goes on."""
        gradients = ParameterGradients(self._links)
        return self._begun(lambda parts: AdapterTraining(parts, steps), made, gradients, threaded=False)

    @property
    def _commit_every(self) -> int | None:
        """As declared; where state rests on NVMe, every step is committed unless fewer were asked for."""
        every = self._workload.config.commit_every
        if every is None and self.home.log is not None and not self._placement.is_all_in_memory(self._sizes):
            return 1
        return every

    def finish(
        self,
        made: torch.optim.Optimizer,
        before_weights_change: Callable[[], None],
        turns: Turns,
        *,
        make_room: Callable[[], None],
    ) -> FullTraining:
        """The training, begun: its first commit is there, unless the log goes on from an earlier run."""
        config = self._workload.config
        gradients = Gradients(
            self._draft.blocks, self._gradient_arena, self._scratch, self._links,
            accumulates=config.accumulation_steps > 1, arrivals=self._arrivals,
            device_slots=self._plan.buffers.gradient_slots,
        )  # fmt: skip
        return self._begun(
            lambda parts: FullTraining(
                parts, gradients, mode=self._plan.update_mode, accumulation_steps=config.accumulation_steps,
                max_grad_norm=config.max_grad_norm, before_weights_change=before_weights_change, make_room=make_room,
                more_to_come=lambda: turns.active and not turns.is_last,
            ),
            made, gradients, threaded=not (self._options.serial_updates or self._options.record),
        )  # fmt: skip

    def _begun(
        self,
        make: Callable[[TieredParts], AnyTraining],
        made: torch.optim.Optimizer,
        gradients: GradientSource,
        *,
        threaded: bool,
    ) -> AnyTraining:
        """What `make` makes, with its first commit, unless the log goes on from an earlier run."""
        progress = Progress()
        training: list[AnyTraining] = []
        stepper = Stepper(
            self._draft.rule, self.home, gradients, lambda name: training[0].groups.of(name), progress, self._links,
            state_pool=self._state_pool, weights_pool=self._weights_pool, on_device=self._on_device, threaded=threaded,
        )  # fmt: skip
        parts = TieredParts(
            blocks=self._draft.blocks, rule=self._draft.rule, home=self.home, stepper=stepper, progress=progress,
            made=made, commit_every=self._commit_every, commit_folder=self.folders[0] if self.folders else None,
            open_log=self._open_other_log, on_close=self.close,
        )  # fmt: skip
        training.append(make(parts))
        log = self.home.log
        if log is not None and not log.committed.step and not self.goes_on:
            training[0].commits.commit()
        return training[0]

    def close(self) -> None:
        if self.home.log is not None:
            self.home.log.close()
        if self._scratch is not None:
            self._scratch.close()

    def _open_log(self) -> None:
        drives = self._workload.config.nvme
        self.folders = store_folders(drives, self._draft.key)
        shares = drive_weights([drive_profile(drive.path, self._links.io) for drive in drives])
        extents = log_extents(self._draft.blocks, shares)
        total = sum(2 * extent.length_bytes for extent in extents)
        buffer = self._arena("commit log", self._sizes.log_bytes, copied=False)
        self._tiers.account(Tier.NVME).reserve("masters, moments and weights that train, twice", total)
        if read_layout(self.folders) is None:
            make_log(
                [
                    NvmePath(path=folder, capacity_bytes=drive.capacity_bytes)
                    for folder, drive in zip(self.folders, drives, strict=True)
                ],
                extents,
                self._links,
                payload_bytes=PAYLOAD_BYTES
                + PARAMETER_BYTES * sum(len(block.parameters) for block in self._draft.blocks),
                written_first={extent.name for extent in extents if self._writes_first(extent.name)},
                zeros=self._unused_room(),
                buffer=buffer,
            )
        self.home.log = CommitLog(self.folders, self._links, buffer=buffer)
        records = sum(self.home.log.layout.file_bytes()) - total
        self._tiers.account(Tier.NVME).reserve("commit records", records)
        if (self.folders[0] / LAYOUT).exists():
            self._check_log(self.home.log, extents)
        else:
            write_atomically(self.folders[0] / LAYOUT, layout_json(self._draft.blocks, self._draft.rule.name))
        note_places(self.home.log.folders)

    def _check_log(self, log: CommitLog, extents: Sequence[MutableExtent]) -> None:
        """Raises `CheckpointError` where a log that was found is not laid as this version of offload_rt does."""
        folder = self.folders[0]
        check_layout(folder, self._draft.blocks, read_layout_json(folder))
        there = {(name, log.length_bytes(name)) for name in log.names}
        odd = there ^ {(extent.name, extent.length_bytes) for extent in extents}
        if odd:
            raise CheckpointError(
                f"{folder}: holds other extents than this run, first: {min(odd)[0]} ({len(odd)} differ); remove it "
                f"with `offload-rt clean --state`"
            )

    @property
    def _open_other_log(self) -> OpenLog:
        return partial(open_log, drives=[drive.path for drive in self._workload.config.nvme], links=self._links)

    def _writes_first(self, extent: str) -> bool:
        """Whether the first commit has it: all state, and weights that stream from the log."""
        if extent.startswith(STATE_PREFIX):
            return True
        name = extent.removeprefix(WEIGHTS_PREFIX)
        split = self._plan.weights_of(name)
        streams = any(ring.rest is Tier.NVME and name in ring.blocks for ring in self._plan.rings)
        return streams and (split is None or split.nvme_bytes == split.total_bytes)

    def _arena(self, name: str, num_bytes: int, *, copied: bool = True) -> Arena:
        return self._tiers.arena(Tier.HOST, name, align_up(num_bytes, IO_ALIGNMENT_BYTES), copied=copied)

    def _pool(self, name: str, num_slots: int, slot_bytes: int, *, copied: bool) -> SlotPool:
        return SlotPool(self._arena(name, num_slots * slot_bytes, copied=copied), slot_bytes)

    def _unused_room(self) -> Slot:
        """Reserved memory in which there is nothing yet: of the state on its way, or else of what rests in memory."""
        if self._placement.state_slots:
            return self._state_pool.acquire("zeros")
        return max(self.home.pieces.values(), key=lambda slot: slot.num_bytes)

    def _room(self, pool: SlotPool, writes: deque[Transfer]) -> Slot:
        while (slot := pool.try_acquire("first state")) is None and writes:
            self._links.wait(writes.popleft())
        return slot if slot is not None else pool.acquire("first state")
