"""One steady step of a plan as operations on resources, ready to be simulated.

Rings are walked along the same `schedule.Step`s that the executor runs: a FETCH is issued when the computation before
it is done, as the executor issues it, and goes through the drive (what rests on NVME), staging and the link.

    SSD read ──► HOST slot ──► link ──► DEVICE slot ──► compute, chunk by chunk ──► link ──► SSD write
                                                           │ last backward chunk
                                                           ▼
                              gradients to HOST, state from NVME, update, state and weights back

Operations name what they wait for as `(operation, lag)`; lag 1 is the same operation one step earlier, so that a step
is built once and repeated.

[Note: order of credits]
Whatever is bounded and not held by a dependency is a pool: gradients in HOST, buckets of state in HOST, state in
DEVICE. They are always acquired in that order, and whoever holds one waits for no earlier one: no circle can close.
The exception keeps another order. Where every block is updated during its own step's backward, the state of a block is
read while its backward computes, before its gradients hold their credit. All pools then serve blocks in the order of
backward, so that the first block that is not done always has what it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from planners.cost import (
    EDGE_SLOTS,
    ClassCost,
    class_costs,
    knobs_of,
    num_chunks,
    ring_walks,
    state_bytes,
)
from planners.placement import ClassPlan, Tier, Update, UpdateMode, UpdatePlace
from planners.plan import Plan
from planners.problem import BlockClass, Problem
from planners.schedule import StepKind

MAX_SIMULATED_CHUNKS = 4
"""Chunks beyond are simulated in groups: their time is one operation, their memory is that of one chunk."""


class Resource(IntEnum):
    """What does one thing at a time."""

    COMPUTE = 0
    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    SSD_READ = 3
    SSD_WRITE = 4
    CPU = 5
    DEVICE_UPDATE = 6
    """Optimizer steps on the device: a stream of high priority, whose kernels run between those of COMPUTE."""
    NONE = 7
    """Takes no time: a point where several things have happened."""


RESOURCES = tuple(r for r in Resource if r is not Resource.NONE)
DEVICE, HOST = 0, 1
"""Index of a tier in memory changes."""
PHASES = ("forward", "backward", "update")


@dataclass
class Timeline:
    """Operations of one step, as parallel lists."""

    resource: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    key: list[float] = field(default_factory=list)
    """Among the ready ones of a resource, the least runs first."""
    deps: list[list[tuple[int, int]]] = field(default_factory=list)
    at_start: list[tuple[int, float] | None] = field(default_factory=list)
    """Tier and bytes that its start takes."""
    at_finish: list[list[tuple[int, float]]] = field(default_factory=list)
    """Tiers and bytes that its end gives back (negative) or takes."""
    acquire: list[tuple[int, float] | None] = field(default_factory=list)
    """Pool and amount that its start takes."""
    release: list[tuple[int, float] | None] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    label: list[tuple[str, int, int]] = field(default_factory=list)
    """What it does, to which block (its position), which chunk or bucket."""
    pools: list[float] = field(default_factory=list)
    span: float = 0.0
    """What a step adds to the keys of the one before."""
    end: int = 0
    """The operation that ends the step."""

    def __len__(self) -> int:
        return len(self.resource)


GRADIENTS, STATES, DEVICE_STATES = 0, 1, 2


def build_timeline(problem: Problem, plan: Plan) -> Timeline:
    """The steady step of `plan`. KeyError or ValueError if the plan is not for this problem."""
    return _Builder(problem, plan).build()


class _Builder:
    """Lays out a step, position by position."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan
        self.workload, self.hardware = problem.workload, problem.hardware
        self.knobs = knobs_of(plan)
        self.placed: list[ClassPlan] = [plan.entry(entry.name) for entry in self.workload.classes]
        self.costs: tuple[ClassCost, ...] = class_costs(problem, self.knobs.cuts, self.knobs.decode_scope)
        self.real_chunks = num_chunks(problem, self.knobs.cuts)
        self.chunks = min(self.real_chunks, MAX_SIMULATED_CHUNKS)
        self.num_blocks = self.workload.num_blocks
        self.timeline = Timeline(span=2.0 * self.num_blocks + 4)
        self.barrier = plan.update_mode is not UpdateMode.DEFERRED
        hardware = self.hardware
        self.rates = [
            1.0,
            1e30 if hardware.unified else hardware.links.host_to_device_bytes_per_second,
            1e30 if hardware.unified else hardware.links.device_to_host_bytes_per_second,
            hardware.read_bytes_per_second,
            hardware.write_bytes_per_second,
        ]
        self.host = DEVICE if hardware.unified else HOST
        self.late: list[tuple[int, str]] = []
        """Operations that wait for something of the step before, known only when the step is complete."""
        self.computes: list[int] = []
        self.swaps_out: list[int] = []
        self.saves: list[int] = []
        self.swaps_in_use: list[int] = []
        self.staged: dict[str, list[int]] = {}
        """By ring: the operations that empty HOST staging."""
        self.gradients_gone: list[int] = []
        self.updates: list[int] = []
        self.updated: dict[int, int] = {}
        self.retained: list[tuple[int, float]] = []

    def op(
        self,
        resource: int,
        amount: float,
        key: float,
        deps: list[tuple[int, int]],
        phase: int,
        label: tuple[str, int, int],
        *,
        at_start: tuple[int, float] | None = None,
        at_finish: tuple[tuple[int, float], ...] = (),
        acquire: tuple[int, float] | None = None,
        release: tuple[int, float] | None = None,
    ) -> int:
        """Adds an operation: `amount` is bytes on links and drives, seconds elsewhere."""
        t = self.timeline
        moves = Resource.HOST_TO_DEVICE <= resource <= Resource.SSD_WRITE
        t.resource.append(resource)
        t.seconds.append(amount / self.rates[resource] if moves and amount else amount)
        t.key.append(key)
        t.deps.append(deps)
        t.at_start.append(at_start)
        t.at_finish.append(list(at_finish))
        t.acquire.append(acquire)
        t.release.append(release)
        t.phase.append(phase)
        t.label.append(label)
        return len(t.resource) - 1

    def build(self) -> Timeline:
        workload, n = self.workload, self.num_blocks
        blocks = sorted((p, c) for c, entry in enumerate(workload.classes) for p in entry.positions)
        self.class_at = [c for _, c in blocks]
        rings = ring_walks(self.problem, self.knobs.slots)
        position_of = {
            (ring.name, i): workload.classes[c].positions[k] for ring in rings for i, (c, k) in enumerate(ring.members)
        }
        self.walks = {ring.name: iter(ring.steps) for ring in rings}
        self.ring_of = {position_of[ring.name, i]: ring.name for ring in rings for i in range(len(ring.members))}
        self.position_of = position_of
        self.last_in_ring: dict[str, int] = {}
        self.arrived: dict[int, int] = {}
        self.swapped: dict[tuple[int, int], int] = {}
        self._pools()
        for position in range(n):
            self._forward(position)
        for position in reversed(range(n)):
            self._backward(position)
        self._finish()
        return self.timeline

    def _pools(self) -> None:
        """[Note: order of credits]"""
        workload, buffers = self.workload, self.knobs.buffers
        largest = max(workload.gradient_bytes_per_param * e.trainable_params for e in workload.classes)
        held = sum(
            e.count * workload.gradient_bytes_per_param * u.params
            for e, p in zip(workload.classes, self.placed, strict=True)
            for u in p.updates
            if u.deferred and u.place is UpdatePlace.CPU
        )
        retains = self.plan.update_mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE)
        self.timeline.pools = [
            float("inf") if retains else float(buffers.host_gradient_slots * largest + held) + 1.0,
            float(buffers.state_slots),
            2.0,
        ]

    def _fetches(self, position: int, phase: int) -> None:
        """Walks the ring of `position` up to its computation; lays out the fetches that come before it."""
        ring = self.ring_of.get(position)
        if ring is None:
            return
        for step in self.walks[ring]:
            where = self.position_of[ring, step.block]
            if step.kind is StepKind.COMPUTE:
                if where == position:
                    return
                continue
            if step.kind is StepKind.FETCH:
                self._fetch(ring, where, phase)

    def _fetch(self, ring: str, position: int, phase: int) -> None:
        c = self.class_at[position]
        weights = self.placed[c].weights
        if not weights.streamed_bytes:
            return
        # The schedule fetches for the next visit of the block that is not behind us.
        use = position if phase == 0 and position not in self.arrived else 2 * self.num_blocks - 1 - position
        deps: list[tuple[int, int]] = []
        late: list[str] = []
        if ring in self.last_in_ring:
            deps.append((self.last_in_ring[ring], 0))
        else:
            late.append(f"last in {ring}")
        if self.workload.mutable and position not in self.arrived:
            late.append("barrier" if self.barrier else f"update {position}")
        read = None
        if weights.nvme_bytes:
            waits: list[tuple[int, int]] = []
            slots = self.knobs.buffers.host_slots if ring == "layers" else EDGE_SLOTS
            staged = self.staged.setdefault(ring, [])
            if len(staged) >= slots:
                waits.append((staged[-slots], 0))
            read = self.op(Resource.SSD_READ, weights.nvme_bytes, use - 0.5, waits, phase, ("read", position, 0))
            self.late.extend((read, what) for what in late if not what.startswith("last"))
            if len(staged) < slots:
                self.late.append((read, f"staged {len(staged) - slots} {ring}"))
        move = self.op(
            Resource.HOST_TO_DEVICE if not self.hardware.unified else Resource.NONE,
            0.0 if self.hardware.unified else weights.streamed_bytes,
            use - 0.4,
            deps + ([] if read is None else [(read, 0)]),
            phase,
            ("fetch", position, 0),
        )
        self.late.extend((move, what) for what in late)
        if read is not None:
            self.staged[ring].append(move)
        self.arrived[position] = move

    def _amounts(self, position: int) -> tuple[float, float, float, float]:
        """Bytes of the block's saved tensors that are kept, swapped to HOST, to NVME, and made again."""
        c = self.class_at[position]
        kept = host = nvme = again = 0.0
        for saved, split in zip(self.workload.classes[c].saved, self.placed[c].tokens, strict=True):
            each = saved.bytes_per_token * self.workload.batch_size
            kept += each * split.device_tokens
            host += each * split.host_tokens
            nvme += each * split.nvme_tokens
            again += each * split.recompute_tokens
        return kept, host, nvme, again

    def _share(self, chunk: int) -> tuple[float, float]:
        """A chunk's share of the token-wise work, and of causal attention: later chunks look back further."""
        n = self.chunks
        one_sequence = self.workload.batch_size == 1
        return 1 / n, (2 * chunk + 1) / n**2 if one_sequence else 1 / n

    def _input_swapped(self, position: int) -> float:
        """Bytes of the block's input that are not kept in DEVICE memory."""
        c = self.class_at[position]
        for saved, split in zip(self.workload.classes[c].saved, self.placed[c].tokens, strict=True):
            if saved.name == "input":
                moved = split.host_tokens + split.nvme_tokens
                return saved.bytes_per_token * self.workload.batch_size * moved
        return 0.0

    def _previous(self) -> list[tuple[int, int]]:
        return [(self.computes[-1], 0)] if self.computes else []

    def _forward(self, position: int) -> None:
        self._fetches(position, 0)
        c, n, real = self.class_at[position], self.chunks, self.real_chunks
        cost = self.costs[c]
        kept, host, nvme, again = self._amounts(position)
        moved = host + nvme
        stream = self._input_swapped(position) if self.knobs.boundary is Tier.HOST else 0.0
        spill = cost.spill_bytes[0]
        plain = cost.forward_seconds - cost.forward_attention_seconds
        for k in range(n):
            linear, attention = self._share(k)
            key = position + k / n
            deps = self._previous()
            first = not self.computes
            if position in self.arrived:
                deps.append((self.arrived[position], 0))
            if moved and len(self.swaps_out) >= self.knobs.buffers.swap_slots:
                deps.append((self.swaps_out[-self.knobs.buffers.swap_slots], 0))
            if stream + spill:
                waits = [(self.computes[-2], 0)] if len(self.computes) > 1 else []
                if (position - 1, k) in self.swapped:
                    waits.append((self.swapped[position - 1, k], 0))
                deps.append((self._link_in(position, k, (stream + spill) / n, key - 0.3, waits, 0), 0))
            compute = self.op(
                Resource.COMPUTE, plain * linear + cost.forward_attention_seconds * attention, key, deps, 0,
                ("forward", position, k), at_start=(DEVICE, kept / n + (moved + again) / real),
                at_finish=((DEVICE, -again / real),),
            )  # fmt: skip
            if first:
                self.late.append((compute, "barrier" if self.barrier else "end"))
            if not self.barrier and self.workload.pinned and self.workload.classes[c].trainable_params and k == 0:
                self.late.append((compute, f"update {position}"))
            if self.workload.mutable and not self.barrier and position not in self.arrived and k == 0:
                self.late.append((compute, f"update {position}"))
            self.computes.append(compute)
            if moved:
                self._swap_out(position, k, host, nvme, spill, compute, key)
            elif spill:
                self._link_out(position, k, spill / n, key, [(compute, 0)], 0)
        self._computed(position)

    def _swap_out(
        self, position: int, k: int, host: float, nvme: float, spill: float, compute: int, key: float
    ) -> None:
        n, real, slots = self.chunks, self.real_chunks, self.knobs.buffers.swap_slots
        waits = [(compute, 0)]
        if nvme and len(self.saves) >= 2 * slots:  # HOST staging on the way to the drive
            waits.append((self.saves[-2 * slots], 0))
        out = self._link_out(
            position, k, (host + nvme + spill) / n, key, waits, 0, at_start=(self.host, (host + nvme) / n),
            at_finish=((DEVICE, -(host + nvme) / real),),
        )  # fmt: skip
        self.swaps_out.append(out)
        if nvme:
            write = self.op(
                Resource.SSD_WRITE, nvme / n, key, [(out, 0)], 0, ("save", position, k),
                at_finish=((self.host, -nvme / n),),
            )  # fmt: skip
            self.saves.append(write)
            self.swapped[position, k] = write
        else:
            self.swapped[position, k] = out

    def _link_in(
        self, position: int, k: int, num_bytes: float, key: float, deps: list[tuple[int, int]], phase: int,
        *, at_start: tuple[int, float] | None = None, at_finish: tuple[tuple[int, float], ...] = (),
    ) -> int:  # fmt: skip
        resource = Resource.NONE if self.hardware.unified else Resource.HOST_TO_DEVICE
        amount = 0.0 if self.hardware.unified else num_bytes
        return self.op(
            resource, amount, key, deps, phase, ("load", position, k), at_start=at_start, at_finish=at_finish
        )

    def _link_out(
        self, position: int, k: int, num_bytes: float, key: float, deps: list[tuple[int, int]], phase: int,
        *, at_start: tuple[int, float] | None = None, at_finish: tuple[tuple[int, float], ...] = (),
    ) -> int:  # fmt: skip
        resource = Resource.NONE if self.hardware.unified else Resource.DEVICE_TO_HOST
        amount = 0.0 if self.hardware.unified else num_bytes
        return self.op(
            resource, amount, key, deps, phase, ("swap", position, k), at_start=at_start, at_finish=at_finish
        )

    def _computed(self, position: int) -> None:
        ring = self.ring_of.get(position)
        if ring is not None:
            self.last_in_ring[ring] = self.computes[-1]

    def _backward(self, position: int) -> None:
        c, n, real = self.class_at[position], self.chunks, self.real_chunks
        entry, placed, cost = self.workload.classes[c], self.placed[c], self.costs[c]
        if not entry.visits_backward and not entry.trainable_params:
            return
        if entry.visits_backward:
            self._fetches(position, 1)
        turn = 2 * self.num_blocks - 1 - position
        kept, host, nvme, again = self._amounts(position)
        moved = host + nvme
        plain = cost.backward_seconds - cost.backward_attention_seconds
        attended = cost.backward_attention_seconds
        for saved, split, seconds in zip(entry.saved, placed.tokens, cost.recompute_seconds, strict=True):
            redone = seconds * split.recompute_tokens / self.workload.seq_len
            if saved.is_attention:
                attended += redone
            else:
                plain += redone
        through_host = self.workload.boundary_bytes if self.knobs.boundary is Tier.HOST and entry.is_layer else 0
        extra = cost.spill_bytes[1] + through_host
        first, before = True, self.computes[-1]
        for k in reversed(range(n)):
            linear, attention = self._share(k)
            key = turn + (n - 1 - k) / n
            deps = self._previous()
            if position in self.arrived:
                deps.append((self.arrived[position], 0))
            trains = entry.trainable_params and not self.workload.pinned
            if first and trains and len(self.gradients_gone) >= self.knobs.buffers.gradient_slots:
                deps.append((self.gradients_gone[-self.knobs.buffers.gradient_slots], 0))
            if moved or extra:
                deps.append((self._swap_in(position, k, host, nvme, extra, key), 0))
            compute = self.op(
                Resource.COMPUTE, plain * linear + attended * attention, key, deps, 1, ("backward", position, k),
                at_start=(DEVICE, again / real), at_finish=((DEVICE, -kept / n - (moved + again) / real),),
            )  # fmt: skip
            self.computes.append(compute)
            if moved:
                self.swaps_in_use.append(compute)
            if extra:
                self._link_out(position, k, extra / n, key, [(compute, 0)], 1)
            first = False
        if entry.visits_backward:
            self._computed(position)
        if entry.trainable_params:
            self._update(position, self.computes[-1], before, float(turn))

    def _swap_in(self, position: int, k: int, host: float, nvme: float, extra: float, key: float) -> int:
        n, real, slots = self.chunks, self.real_chunks, self.knobs.buffers.swap_slots
        moved = host + nvme
        deps: list[tuple[int, int]] = []
        if moved:
            if len(self.swaps_in_use) >= slots:
                deps.append((self.swaps_in_use[-slots], 0))
            deps.append((self.swapped[position, k], 0))
            if nvme:
                waits = [(self.swapped[position, k], 0)]
                if len(self.swaps_in_use) >= 2 * slots:
                    waits.append((self.swaps_in_use[-2 * slots], 0))
                read = self.op(
                    Resource.SSD_READ, nvme / n, key - 0.45, waits, 1, ("load", position, k),
                    at_start=(self.host, nvme / n),
                )  # fmt: skip
                deps.append((read, 0))
        else:
            deps += [(self.computes[-2], 0)]
        return self._link_in(
            position, k, (moved + extra) / n, key - 0.35, deps, 1, at_start=(DEVICE, moved / real),
            at_finish=((self.host, -moved / n),),
        )  # fmt: skip

    def _update(self, position: int, computed: int, before: int, key: float) -> None:
        """Gradients out, state in, step, everything back. `before` is the computation before this backward."""
        c = self.class_at[position]
        entry, placed, workload = self.workload.classes[c], self.placed[c], self.workload
        mode = self.plan.update_mode
        each = workload.gradient_bytes_per_param
        on_cpu = sum(u.params for u in placed.updates if u.place is UpdatePlace.CPU)
        gradient = None
        if on_cpu:
            gradient = self._link_out(
                position, 0, each * on_cpu, key, [(computed, 0)], 1, at_start=(self.host, each * on_cpu)
            )
            self.timeline.acquire[gradient] = (GRADIENTS, each * on_cpu)
        waits: list[tuple[int, int]] = []
        if mode is UpdateMode.AFTER or (mode is UpdateMode.DEFERRED and workload.clips):
            waits = [(-1, 0)]  # the end of backward, when the norm is known; see _finish
        parts: list[int] = []
        on_device: list[int] = []
        writes: list[int] = []
        for which, update in enumerate(placed.updates):
            if not update.params:
                continue
            if update.place is UpdatePlace.DEVICE and (mode is not UpdateMode.BACKWARD) and not workload.pinned:
                held = each * update.params
                if mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE) or update.deferred:
                    self.timeline.at_finish[computed].append((DEVICE, held))
                    self.retained.append((DEVICE, held))
            pieces = self.knobs.buffers.buckets_per_block
            for bucket in range(which * pieces, (which + 1) * pieces):
                done, wrote = self._bucket(position, update, bucket, gradient, computed, before, waits, key)
                parts.append(done)
                if update.place is UpdatePlace.DEVICE and not update.deferred:
                    on_device.append(done)
                if wrote is not None:
                    writes.append(wrote)
        self._write_back(position, entry, placed, parts, writes, key)
        holders = [gradient] if gradient is not None else []
        if mode in (UpdateMode.BACKWARD, UpdateMode.DEFERRED):
            holders += on_device
        if holders:
            self.gradients_gone.append(self._join(holders, key, ("gradient gone", position, 0)))

    def _bucket(
        self, position: int, update: Update, bucket: int, gradient: int | None, computed: int, before: int,
        waits: list[tuple[int, int]], key: float,
    ) -> tuple[int, int | None]:  # fmt: skip
        """One bucket of a block's update; what makes the new weights, and the write of its state."""
        workload, hardware, device = self.workload, self.hardware, self.hardware.device
        params = update.params / self.knobs.buffers.buckets_per_block
        state = workload.state_bytes_per_param * params
        each = workload.gradient_bytes_per_param * params
        phase = 0 if update.deferred else (2 if waits else 1)
        if update.deferred:
            key = self.timeline.span + position  # its deadline: the next forward
        key += 0.2 + bucket * 1e-4
        label = ("update", position, bucket)
        staged = update.tier is Tier.NVME and state > 0
        holder = gradient if update.place is UpdatePlace.CPU and gradient is not None else computed
        source: list[tuple[int, int]] = [(holder, 0), *waits]
        if staged:
            # See [Note: order of credits]: where updates keep the order of backward, state may come before gradients.
            ahead = not waits and self.barrier
            read = self.op(
                Resource.SSD_READ, state, key, [(before, 0)] if ahead else list(source), phase,
                ("read state", position, bucket), at_start=(self.host, state), acquire=(STATES, 1.0),
            )  # fmt: skip
            source = [(read, 0), *source]
        speculative = self.plan.update_mode is UpdateMode.SPECULATIVE
        if update.place is UpdatePlace.CPU:
            freed: tuple[tuple[int, float], ...] = () if speculative else ((self.host, -each),)
            if speculative:
                self.retained.append((self.host, each))
            done = self.op(
                Resource.CPU, params / hardware.host.adamw_params_per_second, key, source, phase, label,
                at_finish=freed, release=(GRADIENTS, each),
            )  # fmt: skip
        else:
            moves = update.tier is not Tier.DEVICE and not hardware.unified and state > 0
            if moves:
                source.append((self._state_in(position, bucket, state, source, key, phase), 0))
            done = self.op(
                Resource.DEVICE_UPDATE, params / device.adamw_params_per_second, key - 0.3, source, phase, label
            )
            if moves:
                done = self._link_out(position, bucket, state, key, [(done, 0)], phase)
                self.timeline.release[done] = (DEVICE_STATES, 1.0)
        if not staged:
            return done, None
        write = self.op(
            Resource.SSD_WRITE, state, key, [(done, 0)], phase, ("write state", position, bucket),
            at_finish=((self.host, -state),), release=(STATES, 1.0),
        )  # fmt: skip
        return done, write

    def _state_in(
        self, position: int, bucket: int, state: float, source: list[tuple[int, int]], key: float, phase: int
    ) -> int:
        moved = self._link_in(position, bucket, state, key - 0.1, list(source), phase)
        self.timeline.acquire[moved] = (DEVICE_STATES, 1.0)
        return moved

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
                ready.append(self._link_in(position, 0, resident - new, key, list(after), phase))
            elif new > resident:
                ready.append(self._link_out(position, 0, new - resident, key, list(after), phase))
        back = float(placed.weights.nvme_bytes) if workload.mutable else 0.0
        back += commit_bytes(self.problem, entry, placed)
        if back:
            # State in DEVICE memory reaches the drive through HOST.
            sources = [(op, 0) for op in ready]
            through = committed_from_device(self.problem, entry, placed)
            if through and not self.hardware.unified:
                sources = [(self._link_out(position, 1, through, key, sources, phase), 0)]
            writes = [
                *writes,
                self.op(Resource.SSD_WRITE, back, key + 0.3, sources, phase, ("write back", position, 0)),
            ]
        self.updated[position] = self._join(ready + writes, key, ("updated", position, 0))
        self.updates.append(self.updated[position])

    def _join(self, ops: list[int], key: float, label: tuple[str, int, int]) -> int:
        return self.op(Resource.NONE, 0.0, key, [(op, 0) for op in ops], 1, label)

    def _finish(self) -> None:
        """Ends the step and resolves what waits for the step before."""
        t = self.timeline
        last = self.computes[-1]
        end = last
        if self.barrier:
            end = self._join([*self.updates, last], t.span - 1, ("step", 0, 0))
        retained: dict[int, float] = {}
        for tier, held in self.retained:
            retained[tier] = retained.get(tier, 0.0) + held
        if not self.barrier and retained:
            end = self._join([*self.updates, last], t.span - 1, ("step", 0, 0))
        t.at_finish[end].extend((tier, -held) for tier, held in retained.items())
        t.end = end if self.barrier else last
        for op, what in self.late:
            kind, _, which = what.partition(" ")
            if kind == "barrier":
                t.deps[op].append((t.end, 1))
            elif kind == "end":
                t.deps[op].append((last, 1))
            elif kind == "last":
                t.deps[op].append((self.last_in_ring[which.removeprefix("in ")], 1))
            elif kind == "update":
                if int(which) in self.updated:
                    t.deps[op].append((self.updated[int(which)], 1))
            else:
                back, _, ring = which.partition(" ")
                if -int(back) <= len(self.staged[ring]):
                    t.deps[op].append((self.staged[ring][int(back)], 1))
        for deps in t.deps:
            for index, (op, lag) in enumerate(deps):
                if op == -1:
                    deps[index] = (last, lag)


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
