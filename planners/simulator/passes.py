"""Forward and backward of a plan's steady step as operations on resources, ready to be simulated.

Rings are walked along the same `schedule.Step`s that the executor runs: a FETCH is issued when the computation before
it is done, as the executor issues it, and goes through the drive (what rests on NVME), staging and the link.

    SSD read ──► HOST slot ──► link ──► DEVICE slot ──► compute, chunk by chunk ──► link ──► SSD write
                                                           │ last backward chunk
                                                           ▼
                              gradients to HOST, state from NVME, update, state and weights back        (`updates`)
"""

from __future__ import annotations

from planners.plans.placement import Tier
from planners.plans.plan import Plan
from planners.plans.schedule import StepKind
from planners.problems.cost import EDGE_SLOTS, ClassCost, class_costs, ring_walks, tiles_again_seconds
from planners.problems.problem import Problem
from planners.simulator.chunk_work import ChunkWork
from planners.simulator.timeline import DEVICE, Operations, Resource, Timeline
from planners.simulator.updates import Updates


def build_timeline(problem: Problem, plan: Plan) -> Timeline:
    """The steady step of `plan`. KeyError or ValueError if the plan is not for this problem."""
    return _Passes(problem, plan).build()


class _Passes(Operations):
    """Lays out a step, position by position."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self.costs: tuple[ClassCost, ...] = class_costs(problem, self.knobs.cuts, self.knobs.decode_scope)
        self.chunks = ChunkWork(problem, self.knobs.cuts, self.placed, self.costs)
        self.updates = Updates(self)
        self.late: list[tuple[int, str]] = []
        """Operations that wait for something of the step before, known only when the step is complete."""
        self.computes: list[int] = []
        self.swaps_out: list[int] = []
        self.saves: list[int] = []
        self.swaps_in_use: list[int] = []
        self.came_back: dict[Tier, int] = {}
        """By where it waited: the last operation that brings something back. Backward says the order, not the drive."""
        self.staged: dict[str, list[int]] = {}
        """By ring: the operations that empty HOST staging."""

    def build(self) -> Timeline:
        workload, n = self.workload, self.num_blocks
        rings = ring_walks(self.problem, self.knobs.slots)
        position_of = {
            (ring.name, i): workload.classes[c].positions[k] for ring in rings for i, (c, k) in enumerate(ring.members)
        }
        later = self.num_passes - 1
        self.walks = {ring.name: iter((*ring.steps, *ring.later_steps * later)) for ring in rings}
        self.ring_of = {position_of[ring.name, i]: ring.name for ring in rings for i in range(len(ring.members))}
        self.position_of = position_of
        self.last_in_ring: dict[str, int] = {}
        self.arrived: dict[int, int] = {}
        self.swapped: dict[tuple[int, int], int] = {}
        ends = []
        for number in range(self.num_passes):
            self.number = number
            for position in range(n):
                self._forward(position)
            for position in reversed(range(n)):
                self._backward(position)
            ends.append(self.computes[-1])
        self._finish()
        if workload.passes > self.num_passes:
            self.timeline.middle = ends[0], ends[1]
        return self.timeline

    @property
    def _begin(self) -> float:
        """The key at which the pass begins."""
        return 2.0 * self.num_blocks * self.number

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
                self._fetch(ring, where, phase, before=position)

    def _fetch(self, ring: str, position: int, phase: int, *, before: int) -> None:
        """Of the block at `position`, before the visit of another in a phase."""
        c = self.class_at[position]
        weights = self.placed[c].weights
        if not weights.streamed_bytes:
            return
        # The schedule fetches for the next visit of the block that is not behind us.
        is_next = phase == 0 and position >= before
        use = self._begin + (position if is_next else 2 * self.num_blocks - 1 - position)
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
            if not self.problem.capabilities.reads_ahead:
                waits += deps
            read = self.op(Resource.SSD_READ, weights.nvme_bytes, use - 0.5, waits, phase, ("read", position, 0))
            ahead = self.problem.capabilities.reads_ahead
            self.late.extend((read, what) for what in late if not (ahead and what.startswith("last")))
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

    def _input_swapped(self, position: int) -> float:
        """Bytes of the block's input that are not kept in DEVICE memory."""
        c = self.class_at[position]
        for saved, split in zip(self.workload.classes[c].saved, self.placed[c].tokens, strict=True):
            if saved.name == "input":
                moved = split.host_tokens + split.nvme_tokens
                return saved.bytes_per_token * self.workload.pass_rows * moved
        return 0.0

    def _previous(self) -> list[tuple[int, int]]:
        return [(self.computes[-1], 0)] if self.computes else []

    def _looked_up(self, position: int, key: float) -> int | None:
        """The rows of an embedding for a whole batch, which nothing can bring before its forward; None for all else.
        Those of a matrix that is the head, too, are wanted first of all.
        """
        found = None
        for c, entry in enumerate(self.workload.classes):
            size, weights = self.workload.looked_up_of(entry), self.placed[c].weights
            own = position == 0 if entry.product is not None else c == self.class_at[position]
            if size is None or not weights.streamed_bytes or not own:
                continue
            read = self._previous() if found is None else [(found, 0)]
            begin = len(self.timeline)
            if weights.nvme_bytes:
                label = ("read rows", position, 0)
                read = [(self.op(Resource.SSD_READ, size.read_bytes, key - 0.4, read, 0, label), 0)]
            found = self.link_in(position, 0, size.looked_up_bytes, key - 0.3, read, 0)
            if not self.computes:
                self.late.append((begin, "barrier" if self.barrier else "end"))
        return found

    def _tiles(self, position: int, phase: int, key: float) -> tuple[int, int] | None:
        """A head's tiles for one pass: what brings the first one, and all others, which come while it computes."""
        entry = self.workload.classes[self.class_at[position]]
        tiles = self.plan.head_tiles
        if tiles is None or tiles.block not in entry.blocks:
            return None
        streamed_bytes = self.plan.entry(entry.name).weights.streamed_bytes
        first_bytes = min(tiles.tile_bytes, streamed_bytes)
        came: list[int] = []
        reads: list[int] = []
        for num_bytes in (first_bytes, streamed_bytes - first_bytes):
            deps = [(came[-1], 0)] if came else self._previous()
            if tiles.rest is Tier.NVME:
                waits = [(reads[-1], 0)] if reads else self._previous()
                label = ("read tiles", position, len(came))
                reads.append(self.op(Resource.SSD_READ, num_bytes, key - 0.4, waits, phase, label))
                deps = [*deps, (reads[-1], 0)]
            came.append(self.link_in(position, len(came), num_bytes, key - 0.3, deps, phase))
        return came[0], came[1]

    def _forward(self, position: int) -> None:
        self._fetches(position, 0)
        c, n = self.class_at[position], self.chunks.num_chunks
        cost = self.costs[c]
        stream = self._input_swapped(position) if self.knobs.boundary is Tier.HOST else 0.0
        spill = cost.spill_bytes[0]
        plain = cost.forward_seconds - cost.forward_attention_seconds
        visit = self._begin + position
        tiles = self._tiles(position, 0, visit)
        for turn, k in enumerate(self.chunks.order()):
            linear, attention = self.chunks.share(k)
            own = self.chunks.of(c, k)
            moved = own.host + own.nvme
            key = visit + turn / n
            deps = self._previous()
            first = not self.computes
            if turn == 0 and (looked_up := self._looked_up(position, key)) is not None:
                deps.append((looked_up, 0))
            if tiles is not None:
                deps.append((tiles[0], 0))
            if position in self.arrived:
                deps.append((self.arrived[position], 0))
            if moved and len(self.swaps_out) >= self.knobs.buffers.swap_slots:
                deps.append((self.swaps_out[-self.knobs.buffers.swap_slots], 0))
            if stream + spill:
                waits = [(self.computes[-2], 0)] if len(self.computes) > 1 else []
                if (position - 1, k) in self.swapped:
                    waits.append((self.swapped[position - 1, k], 0))
                deps.append((self.link_in(position, k, (stream + spill) / n, key - 0.3, waits, 0), 0))
            compute = self.op(
                Resource.COMPUTE,
                plain * linear + own.put_away_seconds + cost.forward_attention_seconds * attention,
                key, deps, 0, ("forward", position, n * self.number + k), at_start=(DEVICE, own.kept),
            )  # fmt: skip
            if first:
                self.late.append((compute, "barrier" if self.barrier else "end"))
            if not self.barrier and turn == self.number == 0:
                pinned = self.workload.pinned and self.workload.classes[c].trainable_params
                if pinned or (self.workload.mutable and position not in self.arrived):
                    self.late.append((compute, f"update {position}"))
            self.computes.append(compute)
            if moved:
                self._swap_out(position, k, own.host, own.nvme, spill, compute, key)
            elif spill:
                self.link_out(position, k, spill / n, key, [(compute, 0)], 0)
        if tiles is not None:
            self.computes.append(self.join([self.computes[-1], tiles[1]], position, ("tiles", position, 0)))
        self._computed(position)

    def _swap_out(
        self, position: int, k: int, host: float, nvme: float, spill: float, compute: int, key: float
    ) -> None:
        n, slots = self.chunks.num_chunks, self.knobs.buffers.swap_slots
        waits = [(compute, 0)]
        if nvme and len(self.saves) >= 2 * slots:  # HOST staging on the way to the drive
            waits.append((self.saves[-2 * slots], 0))
        out = self.link_out(
            position, k, host + nvme + spill / n, key, waits, 0, at_start=(self.host, host),
        )  # fmt: skip
        self.swaps_out.append(out)
        if nvme:
            write = self.op(
                Resource.SSD_WRITE, nvme, key, [(out, 0)], 0, ("save", position, k),
            )  # fmt: skip
            self.saves.append(write)
            self.swapped[position, k] = write
        else:
            self.swapped[position, k] = out

    def _computed(self, position: int) -> None:
        ring = self.ring_of.get(position)
        if ring is not None:
            self.last_in_ring[ring] = self.computes[-1]

    def _backward(self, position: int) -> None:
        c, n = self.class_at[position], self.chunks.num_chunks
        entry, placed, cost = self.workload.classes[c], self.placed[c], self.costs[c]
        if not entry.visits_backward and not entry.trainable_params:
            return
        if entry.visits_backward:
            self._fetches(position, 1)
        visit = self._begin + 2 * self.num_blocks - 1 - position
        attended = cost.backward_attention_seconds
        for saved, split, seconds in zip(entry.saved, placed.tokens, cost.recompute_seconds, strict=True):
            if saved.is_attention:
                attended += seconds * split.recompute_tokens / self.workload.seq_len
        plain = cost.backward_seconds - cost.backward_attention_seconds
        through_host = self.workload.boundary_bytes if self.knobs.boundary is Tier.HOST and entry.is_layer else 0
        extra = cost.spill_bytes[1] + through_host
        tiles = self._tiles(position, 1, visit)
        if tiles is not None:
            plain += tiles_again_seconds(self.problem, entry)
        first, before = True, self.computes[-1]
        for turn, k in enumerate(reversed(self.chunks.order())):
            linear, attention = self.chunks.share(k)
            own = self.chunks.of(c, k)
            moved = own.host + own.nvme
            key = visit + turn / n
            deps = self._previous()
            if position in self.arrived:
                deps.append((self.arrived[position], 0))
            if tiles is not None:
                deps.append((tiles[0], 0))
            trains = entry.trainable_params and not self.workload.pinned
            if first and trains and len(self.updates.gradients_gone) >= self.knobs.buffers.gradient_slots:
                deps.append((self.updates.gradients_gone[-self.knobs.buffers.gradient_slots], 0))
            if moved or extra:
                deps.append((self._swap_in(position, k, own.host, own.nvme, extra, key), 0))
            compute = self.op(
                Resource.COMPUTE, plain * linear + own.again_seconds + attended * attention, key, deps, 1,
                ("backward", position, n * self.number + k), at_finish=((DEVICE, -own.kept),),
            )  # fmt: skip
            self.computes.append(compute)
            if moved:
                self.swaps_in_use.append(compute)
            if extra:
                self.link_out(position, k, extra / n, key, [(compute, 0)], 1)
            first = False
        if tiles is not None:
            self.computes.append(self.join([self.computes[-1], tiles[1]], visit, ("tiles", position, 1)))
        if entry.visits_backward:
            self._computed(position)
        if entry.trainable_params and self.number == self.num_passes - 1:
            self.updates.add(position, self.computes[-1], before, visit)
        elif entry.trainable_params and self.workload.mutable:
            self.updates.add_up(position, self.computes[-1], visit, first=self.number == 0)

    def _swap_in(self, position: int, k: int, host: float, nvme: float, extra: float, key: float) -> int:
        n, slots = self.chunks.num_chunks, self.knobs.buffers.swap_slots
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
                if Tier.NVME in self.came_back:
                    waits.append((self.came_back[Tier.NVME], 0))
                read = self.op(
                    Resource.SSD_READ, nvme, key - 0.45, waits, 1, ("load", position, k),
                )  # fmt: skip
                self.came_back[Tier.NVME] = read
                deps.append((read, 0))
            if host and Tier.HOST in self.came_back:
                deps.append((self.came_back[Tier.HOST], 0))
        else:
            deps += [(self.computes[-2], 0)]
        back = self.link_in(
            position, k, moved + extra / n, key - 0.35, deps, 1, at_finish=((self.host, -host),),
        )  # fmt: skip
        if host:
            self.came_back[Tier.HOST] = back
        return back

    def _finish(self) -> None:
        """Ends the step and resolves what waits for the step before."""
        t = self.timeline
        self.updates.all_are_added()
        last = self.computes[-1]
        end = last
        if self.barrier:
            end = self.join([*self.updates.done, last], t.span - 1, ("step", 0, 0))
        retained: dict[int, float] = {}
        for tier, held in self.updates.retained:
            retained[tier] = retained.get(tier, 0.0) + held
        if not self.barrier and retained:
            end = self.join([*self.updates.done, last], t.span - 1, ("step", 0, 0))
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
                if int(which) in self.updates.done_at:
                    t.deps[op].append((self.updates.done_at[int(which)], 1))
            else:
                back, _, ring = which.partition(" ")
                if -int(back) <= len(self.staged[ring]):
                    t.deps[op].append((self.staged[ring][int(back)], 1))
        for deps in t.deps:
            for index, (op, lag) in enumerate(deps):
                if op == -1:
                    deps[index] = (last, lag)
