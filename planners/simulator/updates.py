"""The updates of a step: gradients out, state in, the optimizer's step, state and weights back.

[Note: order of credits]
Whatever is bounded and not held by a dependency is a pool: gradients in HOST, buckets of state in HOST, state in
DEVICE. They are always acquired in that order, and whoever holds one waits for no earlier one: no circle can close.
The exception keeps another order. Where every block is updated during its own step's backward, the state of a block is
read while its backward computes, before its gradients hold their credit. All pools then serve blocks in the order of
backward, so that the first block that is not done always has what it waits for.

[Note: room for new weights]
Weights that train and rest on NVMe are collected in a slot of HOST memory, which a block has from its first update
until its weights are written. So that no block waits for the slot of one behind it, blocks are stepped, and their state
is read, one after the other there, as the runtime does it everywhere: in the order of backward, first those that are
stepped behind it, then what waits for the norm.

    one slot    step 5 5 5 |               | step 4 4 4 |
                           | write weights |            | write weights
"""

from __future__ import annotations

import itertools

from planners.plans.placement import ClassPlan, Tier, Update, UpdateMode, UpdatePlace
from planners.problems.problem import BlockClass, Problem
from planners.simulator.optimizer_state import (
    MAX_BUCKETS,
    gradients_stay,
    passing_gradient_bytes,
    state_bytes,
    steps_after,
    steps_in_parts,
    update_bytes,
)
from planners.simulator.timeline import DEVICE, Operations, Resource

GRADIENTS, STATES, DEVICE_STATES, NEW_WEIGHTS = 0, 1, 2, 3
ARRIVING_BLOCKS = 2
"""Whose gradients HOST has room for before they are added up: one's arrive while another's are added."""


class Updates:
    """Lays out the update of one block after the other, in the order of backward."""

    def __init__(self, step: Operations) -> None:
        self.step = step
        self.problem, self.plan = step.problem, step.plan
        self.workload, self.hardware, self.knobs = step.workload, step.hardware, step.knobs
        self.timeline, self.barrier, self.host = step.timeline, step.barrier, step.host
        self.gradients_gone: list[int] = []
        """For each block with gradients: the operation after which their slot in DEVICE is free."""
        self.added_up: list[int] = []
        """What the processor does with gradients that are summed, in the order of their arrival."""
        self.done: list[int] = []
        self.done_at: dict[int, int] = {}
        """By position: the operation after which the block is updated, and all of it is where it rests."""
        self.retained: list[tuple[int, float]] = []
        """Tiers and bytes of gradients that stay until the step ends."""
        self.all_stay = gradients_stay(step.problem, step.plan)
        self.one_by_one = any(self._collects(placed) for placed in step.placed)
        """Whether blocks are stepped one after the other; see [Note: room for new weights]."""
        self.stepped: dict[bool, int] = {}
        """By whether they wait for the norm: the operation after which the blocks so far are stepped."""
        self.may_wait: int | None = None
        """What all that waits for the norm is behind: see `all_are_added`."""
        self.last_read: int | None = None
        """Of state, where blocks are stepped one after the other."""
        self.timeline.pools = self._pools()

    def _pools(self) -> list[float]:
        """[Note: order of credits]"""
        buffers = self.knobs.buffers
        passing = passing_gradient_bytes(self.problem, self.plan)
        return [
            float(buffers.host_gradient_slots * passing) + 1.0,
            float(buffers.state_slots * (self.workload.state_piece_bytes or 1)),
            2.0 if self.workload.device_steps is None else float(self.workload.device_steps.num_slots),
            float(max(1, buffers.weight_slots)),
        ]

    def _buckets(self, entry: BlockClass, begin: int, update: Update, num_bytes: int) -> list[tuple[float, ...]]:
        """The parts in which the state of an update moves, `begin` parameters into the block's: parameters, bytes, and
        what they take of the pool of state.

        With `Workload.state_piece_bytes` the pool is counted in bytes, a slot for each piece, however small; without in
        buckets.
        """
        piece, buffers = self.workload.state_piece_bytes, self.knobs.buffers
        cuts = [cut for cut in entry.state_cuts if begin <= cut[0] <= begin + update.params]
        if piece is None or not cuts:
            count = buffers.buckets_per_block if piece is None else self._num_groups(-(-num_bytes // piece))
            each = num_bytes / count
            return [(update.params / count, each, 1.0 if piece is None else each)] * count
        pieces = len(cuts) - 1
        count = self._num_groups(pieces)
        ends = [index * pieces // count for index in range(count + 1)]
        return [
            (cuts[end][0] - cuts[first][0], cuts[end][1] - cuts[first][1], float((end - first) * piece))
            for first, end in itertools.pairwise(ends)
        ]

    def _num_groups(self, pieces: int) -> int:
        """In how many groups pieces are simulated: of a quarter of the slots at most, so that one is read and one
        written while a third one is stepped. One where there are none: state may take no bytes.
        """
        return min(max(1, pieces), max(MAX_BUCKETS, -(-4 * pieces // self.knobs.buffers.state_slots)))

    def add_up(self, position: int, computed: int, key: float, *, first: bool) -> None:
        """Gradients of a micro-batch that is not the last one, to where they wait: as the first, or added to others."""
        placed, workload = self.step.placed[self.step.class_at[position]], self.workload
        in_host = sum(u.params for u in placed.updates if workload.in_host(u.tier, u.place))
        in_device = sum(u.params for u in placed.updates) - in_host
        each = workload.waiting_gradient_bytes_per_param
        if in_device and first:
            self.timeline.at_finish[computed].append((DEVICE, each * in_device))
        if not in_host:
            return
        gone = self.step.link_out(
            position, 0, workload.gradient_bytes_per_param * in_host, key, self._may_arrive(computed), 1,
            at_start=(self.host, each * in_host) if first else None,
        )  # fmt: skip
        self.gradients_gone.append(gone)
        self._take(position, in_host, gone, key)

    def _take(self, position: int, params: int, gone: int, key: float) -> None:
        """What gradients before a step's last ones cost the processor that takes them."""
        if seconds := self.workload.summing_seconds_per_param * params:
            self.added_up.append(self.step.op(Resource.CPU, seconds, key, [(gone, 0)], 1, ("add up", position, 0)))

    def _may_arrive(self, computed: int) -> list[tuple[int, int]]:
        """What gradients wait for that leave the device: a processor that is behind holds them up there."""
        deps = [(computed, 0)]
        if len(self.added_up) >= ARRIVING_BLOCKS:
            deps.append((self.added_up[-ARRIVING_BLOCKS], 0))
        return deps

    def add(self, position: int, computed: int, before: int, key: float) -> None:
        """Gradients out, state in, step, everything back. `before` is the computation before this backward."""
        c = self.step.class_at[position]
        entry, placed, workload = self.workload.classes[c], self.step.placed[c], self.workload
        mode = self.plan.update_mode
        each, together = workload.gradient_bytes_per_param, workload.together if workload.sums_gradients else 1
        has_room = workload.sums_gradients and workload.passes > 1  # with those of other micro-batches
        in_host = [u for u in placed.updates if workload.in_host(u.tier, u.place)]
        gradient = None
        if params := sum(u.params for u in in_host):
            stay = sum(u.params for u in in_host if self._stays(u))
            waiting = 0 if has_room else workload.waiting_gradient_bytes_per_param * stay
            gradient = self.step.link_out(
                position, 0, together * each * params, key, self._may_arrive(computed), 1,
                at_start=(self.host, waiting),
            )  # fmt: skip
            if stay < params:
                self.timeline.acquire[gradient] = (GRADIENTS, each * (params - stay))
            self._take(position, (together - 1) * params, gradient, key)
        parts: list[int] = []
        ahead: list[int] = []
        on_device: list[int] = []
        writes: list[int] = []
        begin = first = 0
        late: list[int] = []
        for update, num_bytes in zip(placed.updates, update_bytes(self.problem, placed), strict=True):
            if not update.params:
                continue
            waits: list[tuple[int, int]] = []
            if steps_after(self.problem, mode, update.tier) or (mode is UpdateMode.DEFERRED and workload.clips):
                waits = [(-1, 0)]  # the end of backward, when the norm is known; see _finish
                if self.one_by_one and self.may_wait is None:
                    self.may_wait = self.stepped[True] = self.step.join([], key, ("all stepped", position, 0))
            if update not in in_host and self._stays(update) and not workload.pinned:
                waiting = workload.waiting_gradient_bytes_per_param * update.params
                if not has_room:
                    self.timeline.at_finish[computed].append((DEVICE, waiting))
                self.retained.append((DEVICE, waiting))
            for bucket, share in enumerate(self._buckets(entry, begin, update, num_bytes), first):
                alike = late if waits else ahead
                if self._collects(placed) and not alike:
                    self._take_room(position, computed if gradient is None else gradient, waits, key)
                done, wrote = self._bucket(position, update, share, bucket, gradient, computed, before, waits, key)
                parts.append(done)
                alike.append(done)
                if update not in in_host and not update.deferred:
                    on_device.append(done)
                if wrote is not None:
                    writes.append(wrote)
            begin, first = begin + update.params, bucket + 1
        for waited, alike in ((False, ahead), (True, late)):
            if self.one_by_one and alike:
                self.stepped[waited] = self.step.join(alike, key, ("stepped", position, int(waited)))
        if workload.mutable and placed.weights.nvme_bytes and steps_in_parts(self.problem, mode, placed):
            source = computed if gradient is None else gradient
            parts.append(self._write_first_part(position, placed, source, ahead, key))
        self._write_back(position, entry, placed, parts, writes, key)
        holders = [gradient] if gradient is not None else []
        if not self.all_stay:
            holders += on_device
        if holders:
            self.gradients_gone.append(self.step.join(holders, key, ("gradient gone", position, 0)))

    def all_are_added(self) -> None:
        """What waits for the norm is stepped behind all that does not; see [Note: room for new weights]."""
        if self.may_wait is not None and False in self.stepped:
            self.timeline.deps[self.may_wait].append((self.stepped[False], 0))

    def _collects(self, placed: ClassPlan) -> bool:
        """Whether new weights of a block go through a slot; see [Note: room for new weights]."""
        return self.workload.mutable and self.barrier and placed.weights.nvme_bytes > 0

    def _stays(self, update: Update) -> bool:
        """Whether its gradients wait for all others, in a place of their own, and pass through no ring."""
        return update.deferred or self.all_stay

    def _take_room(self, position: int, source: int, waits: list[tuple[int, int]], key: float) -> None:
        """A slot for a block's new weights, which its updates are behind; see [Note: room for new weights]."""
        deps = [(source, 0), *waits]
        if (stepped := self.stepped.get(bool(waits))) is not None:
            deps.append((stepped, 0))
        label = ("room", position, int(bool(waits)))
        room = self.step.op(Resource.CPU, 0.0, key, deps, 2 if waits else 1, label, acquire=(NEW_WEIGHTS, 1.0))
        self.stepped[bool(waits)] = room

    def _bucket(
        self, position: int, update: Update, share: tuple[float, ...], bucket: int, gradient: int | None,
        computed: int, before: int, waits: list[tuple[int, int]], key: float,
    ) -> tuple[int, int | None]:  # fmt: skip
        """One bucket of a block's update, `share` as `_buckets` has it; what makes the new weights, and the write of
        its state.
        """
        workload, hardware, device = self.workload, self.hardware, self.hardware.device
        params, state, credit = share
        each = workload.waiting_gradient_bytes_per_param * params
        phase = 0 if update.deferred else (2 if waits else 1)
        if update.deferred:
            key = self.timeline.span + position  # its deadline: the next forward
        key += 0.2 + bucket * 1e-4
        label = ("update", position, bucket)
        staged = update.tier is Tier.NVME and state > 0
        in_host = workload.in_host(update.tier, update.place)
        holder = gradient if in_host and gradient is not None else computed
        source: list[tuple[int, int]] = [(holder, 0), *waits]
        if staged:
            # See [Note: order of credits]: where updates keep the order of backward, state may come before gradients.
            ahead = not waits and self.barrier
            behind = [] if self.last_read is None else [(self.last_read, 0)]
            read = self.step.op(
                Resource.SSD_READ, state, key, [*([(before, 0)] if ahead else source), *behind], phase,
                ("read state", position, bucket), acquire=(STATES, credit),
            )  # fmt: skip
            self.last_read = read if self.one_by_one else None
            source = [(read, 0), *source]
        if (stepped := self.stepped.get(bool(waits))) is not None:
            source.append((stepped, 0))
        speculative = self.plan.update_mode is UpdateMode.SPECULATIVE
        at_finish: tuple[tuple[int, float], ...] = ()
        release: tuple[int, float] | None = None
        if in_host and not self._stays(update):
            release = (GRADIENTS, each)
        elif in_host and speculative:
            self.retained.append((self.host, each))
        elif in_host:
            at_finish = ((self.host, -each),)
        if update.place is UpdatePlace.CPU:
            done = self.step.op(
                Resource.CPU, params / hardware.host.adamw_params_per_second, key, source, phase, label,
                at_finish=at_finish, release=release,
            )  # fmt: skip
        else:
            moves = update.tier is not Tier.DEVICE and not hardware.unified and state > 0
            if workload.device_steps is not None and workload.device_steps.cpu_seconds_per_param:
                beside = workload.device_steps.cpu_seconds_per_param * params
                arrive = ("arrive", position, bucket)
                source.append((self.step.op(Resource.CPU, beside, key, list(source), phase, arrive), 0))
            if moves:
                back = each if in_host else 0.0
                source.append((self._state_in(position, bucket, state + back, source, key, phase), 0))
            done = self.step.op(
                Resource.DEVICE_UPDATE, params / device.adamw_params_per_second, key - 0.3, source, phase, label,
                at_finish=at_finish, release=release,
            )  # fmt: skip
            if moves:
                done = self.step.link_out(position, bucket, state, key, [(done, 0)], phase)
                self.timeline.release[done] = (DEVICE_STATES, 1.0)
        if not staged:
            return done, None
        write = self.step.op(
            Resource.SSD_WRITE, state, key, [(done, 0)], phase, ("write state", position, bucket),
            release=(STATES, credit),
        )  # fmt: skip
        return done, write

    def _state_in(
        self, position: int, bucket: int, state: float, source: list[tuple[int, int]], key: float, phase: int
    ) -> int:
        moved = self.step.link_in(position, bucket, state, key - 0.1, list(source), phase)
        self.timeline.acquire[moved] = (DEVICE_STATES, 1.0)
        return moved

    def _write_first_part(self, position: int, placed: ClassPlan, source: int, ahead: list[int], key: float) -> int:
        """New weights on the drive of what was stepped before the norm was known. Each part is rounded into weights
        that are there: they are read for it. Returns the read for the second part.
        """
        size = float(placed.weights.nvme_bytes)
        label = ("read weights", position, 0)
        first = self.step.op(Resource.SSD_READ, size, key + 0.2, [(source, 0)], 1, label)
        deps = [(first, 0), *((part, 0) for part in ahead)]
        label = ("write back", position, 1)
        room = (NEW_WEIGHTS, 1.0) if self._collects(placed) else None
        written = self.step.op(Resource.SSD_WRITE, size, key + 0.3, deps, 1, label, release=room)
        return self.step.op(
            Resource.SSD_READ, size, key + 0.3, [(written, 0), (-1, 0)], 2, ("read weights", position, 1)
        )

    def _write_back(
        self, position: int, entry: BlockClass, placed: ClassPlan, parts: list[int], writes: list[int], key: float
    ) -> None:
        """New weights to where they rest, the commit's share, and the point where the block is updated."""
        workload = self.workload
        deferred = any(u.deferred and u.params for u in placed.updates)
        if deferred:
            key = self.timeline.span + position
        phase = 0 if deferred else (2 if self.plan.update_mode is UpdateMode.AFTER else 1)
        after = [(part, 0) for part in parts]
        on_device = sum(u.params for u in placed.updates if u.place is UpdatePlace.DEVICE)
        new = float(workload.weight_bytes_per_param * on_device)
        resident = float(
            workload.weight_bytes_per_param * entry.trainable_params if workload.pinned else placed.weights.device_bytes
        )
        ready = list(parts)
        if not self.hardware.unified:
            if resident > new:
                ready.append(self.step.link_in(position, 0, resident - new, key, list(after), phase))
            elif new > resident:
                ready.append(self.step.link_out(position, 0, new - resident, key, list(after), phase))
        back = float(placed.weights.nvme_bytes) if workload.mutable else 0.0
        back += commit_bytes(self.problem, entry, placed)
        if back:
            # State in DEVICE memory reaches the drive through HOST.
            sources = [(op, 0) for op in ready]
            through = committed_from_device(self.problem, entry, placed)
            if through and not self.hardware.unified:
                sources = [(self.step.link_out(position, 1, through, key, sources, phase), 0)]
            label, room = ("write back", position, 0), (NEW_WEIGHTS, 1.0) if self._collects(placed) else None
            writes = [
                *writes, self.step.op(Resource.SSD_WRITE, back, key + 0.3, sources, phase, label, release=room),
            ]  # fmt: skip
        self.done_at[position] = self.step.join(ready + writes, key, ("updated", position, 0))
        self.done.append(self.done_at[position])


def commit_bytes(problem: Problem, entry: BlockClass, placed: ClassPlan) -> float:
    """What a durable commit writes of one block besides what rests on NVME anyway, spread over the steps."""
    workload = problem.workload
    if not workload.commit_every or not problem.hardware.drives:
        return 0.0
    off_drive = state_bytes(problem, placed, Tier.HOST) + state_bytes(problem, placed, Tier.DEVICE)
    adapters = workload.weight_bytes_per_param * entry.trainable_params if workload.pinned else 0
    return (off_drive + adapters) / workload.commit_every


def committed_from_device(problem: Problem, entry: BlockClass, placed: ClassPlan) -> float:
    """The part of `commit_bytes` that comes from DEVICE memory."""
    workload = problem.workload
    if not workload.commit_every or not problem.hardware.drives:
        return 0.0
    adapters = workload.weight_bytes_per_param * entry.trainable_params if workload.pinned else 0
    return (state_bytes(problem, placed, Tier.DEVICE) + adapters) / workload.commit_every
