"""The steady state of a plan space as a linear program: fractions by class, one time for each phase.

For fixed knobs, what a plan leaves open is continuous: which share of every block's weights rests in which tier, which
share of a saved tensor's tokens is kept, swapped or computed again, and which share of the parameters is updated where
and when. A phase takes at least as long as each resource works in it; both directions of a link, and reading and
writing of the drives, share what `duplex` and `drive_mix` leave them, phase by phase. Capacities are rows in GB.

The program sees no pipeline fill: its optimum is a lower bound on what any plan with these knobs can take, and the
simulator ranks. Its duals say what a GB more would buy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planners.optimiser.expand import Fractions, UpdateKey
from planners.optimiser.program import Solution, Terms
from planners.optimiser.rows import (
    BACKWARD,
    EARLIER,
    FORWARD,
    GB,
    LOW_PRICE,
    PRICE_SUM,
    PRICES,
    RESOURCES,
    Freedoms,
    Rows,
)
from planners.optimiser.saved_rows import SavedRows
from planners.optimiser.update_rows import UpdateRows
from planners.optimiser.vocabulary_rows import VocabularyRows
from planners.plans.placement import Tier, UpdatePlace
from planners.problems.cost import (
    EDGE_SLOTS,
    ClassCost,
    Knobs,
    class_costs,
    fetch_counts,
)
from planners.problems.problem import BlockClass, Problem
from planners.simulator.optimizer_state import whole_state_bytes
from planners.simulator.static_memory import capacities, fixed_device_bytes, fixed_host_bytes, slab_bytes

SHORTAGE_PRICES = {"device": 1e4, "host": 1e3, "nvme": 1e2}
"""Of a missing GB, in units of time: fitting comes before being fast, and what is cheap to buy may be short first."""

IN_SAVE = "in a save"
"""The row of the tier through which a model is saved: all that stays there, and slabs, see `saving_bytes`."""


@dataclass(frozen=True)
class ClassVariables:
    """Columns of one class."""

    weights: tuple[int, int, int]
    tokens: tuple[tuple[int, int, int, int], ...]
    updates: dict[UpdateKey, int]


@dataclass(frozen=True)
class Steady:
    """A program, solved."""

    knobs: Knobs
    step_seconds: float
    """Of its optimum."""
    bound_seconds: float
    """No plan with these knobs takes less; certified from the duals."""
    fractions: list[Fractions]
    seconds_per_gb: dict[str, float]
    """By tier: what one GB more would save."""
    write_seconds: float
    """That the drives write in a step, at full rate."""
    short_bytes: dict[str, float]
    """By tier: what is missing, where a shortage was allowed at a price (`elastic`)."""


class _Builder(Rows):
    """Lays out the program."""

    @property
    def slabs_tier(self) -> str:
        """Through which a model is saved."""
        return "device" if self.unified else "host"

    def build(self) -> list[ClassVariables]:
        found = []
        updates, saved, self.vocabulary = UpdateRows(self), SavedRows(self), VocabularyRows(self)
        counts, later = (fetch_counts(self.problem, self.knobs.slots, later=later) for later in (False, True))
        costs = class_costs(self.problem, self.knobs.cuts, self.knobs.decode_scope)
        for c, entry in enumerate(self.workload.classes):
            self.work(FORWARD, "compute", None, entry.count * costs[c].forward_seconds)
            self.work(BACKWARD, "compute", None, entry.count * costs[c].backward_seconds)
            for resource in ("host_to_device", "device_to_host"):
                self.work(FORWARD, resource, None, entry.count * costs[c].spill_bytes[0])
                if costs[c].backward_seconds:
                    self.work(BACKWARD, resource, None, entry.count * costs[c].spill_bytes[1])
                if self.knobs.boundary is Tier.HOST and entry.is_layer:
                    self.work(BACKWARD, resource, None, entry.count * self.workload.boundary_bytes)
            weights = self._weights(entry, counts[c], later[c])
            tokens = saved.add(entry, costs[c])
            found.append(ClassVariables(weights, tokens, updates.add(entry, weights)))
        self._rows()
        self._turn(found, costs)
        return found

    def _turn(self, columns: list[ClassVariables], costs: tuple[ClassCost, ...]) -> None:
        """The block whose backward is last is the one whose forward is first: its update hides behind nothing.

        Between the last backward and the next forward stand its gradients' way to HOST and its update (or the write of
        its new state), whatever the mode; and, if it streams, its fetch.
        """
        first = min(range(len(columns)), key=lambda c: min(self.workload.classes[c].positions))
        entry = self.workload.classes[first]
        if not entry.trainable_params or self.workload.pinned:
            return
        compute = sum(
            e.count * (cost.forward_seconds + cost.backward_seconds)
            for e, cost in zip(self.workload.classes, costs, strict=True)
        )
        params = float(entry.trainable_params)
        out = self.workload.gradient_bytes_per_param * params / self.rate["device_to_host"] / self.unit
        fetch = 0.0 if self.unified else entry.stored_bytes / self.rate["host_to_device"] / self.unit
        streamed = [(v, fetch) for v in columns[first].weights[1:]]
        step = [
            (x, out + params / self.hardware.host.adamw_params_per_second / self.unit)
            for (_, place, _), x in columns[first].updates.items()
            if place is UpdatePlace.CPU
        ]
        through_host = 0.0 if self.workload.device_steps is None else out
        on_device = params / self.hardware.device.adamw_params_per_second / self.unit
        moved = 0.0 if self.unified else whole_state_bytes(self.problem, entry) / self.rate["host_to_device"]
        step += [
            (x, on_device if tier is Tier.DEVICE else through_host + max(on_device, moved / self.unit))
            for (tier, place, _), x in columns[first].updates.items()
            if place is UpdatePlace.DEVICE
        ]
        times, passes = [(time, -1.0) for time in self.times.values()], self.workload.passes
        redone = [(variable, passes * seconds) for variable, seconds in self.redone]
        self.program.at_most([*times, *redone, *streamed, *step], -passes * compute / self.unit)

    def _weights(
        self, entry: BlockClass, fetches: tuple[int, int], later_fetches: tuple[int, int]
    ) -> tuple[int, int, int]:
        """Columns of the shares in DEVICE, HOST and on NVMe; fetches of the first pass and of a later one."""
        size, n = float(entry.stored_bytes), entry.count
        allowed = list(self.freedoms.weights)
        allowed[1] &= not self.unified
        allowed[2] &= bool(self.hardware.drives)
        changes = self.workload.mutable and bool(entry.trainable_params)
        if entry.weights_stay:
            allowed = [True, False, False]
        elif changes and self.knobs.weights is not None:
            allowed = [ok and tier is self.knobs.weights for tier, ok in zip(Tier, allowed, strict=True)]
        if (size_of_rows := self.workload.rows_of(entry)) is not None:
            return self.vocabulary.add(entry, size_of_rows, allowed)
        if self.workload.tiles_of(entry) is not None:
            return self.vocabulary.add_tiles(entry, allowed)
        device, host, nvme = (self.program.variable(float(ok)) for ok in allowed)
        self.program.row([(device, 1.0), (host, 1.0), (nvme, 1.0)], 1.0, 1.0)
        self._cut(entry, device)
        for phase, count in self._counts(fetches, later_fetches):
            self.work_once(phase, "host_to_device", host, count * size)
            self.work_once(phase, "host_to_device", nvme, count * size)
            self.work_once(phase, "ssd_read", nvme, count * size)
            if entry.is_layer and self.knobs.slots == 1 and not self.unified:
                seconds = count * size / self.rate["host_to_device"] / self.unit
                for chain in ("gradients", "state"):
                    self.wait_once(phase, chain, [(host, seconds), (nvme, seconds)])
        self.hold("device", device, n * size)
        self.hold("host", host, n * size)
        if not changes or self.workload.log_bytes is None:
            self.hold("nvme", nvme, n * size * (2 if changes else 1))
        if changes and self.problem.capabilities.whole_weights:
            self.largest("host", "new weights", [(nvme, self.knobs.buffers.weight_slots * size)])
        kind, slots, staged = ("layers", self.knobs.slots, self.knobs.buffers.host_slots)
        if not entry.is_layer:
            kind, slots, staged = "edges", EDGE_SLOTS, EDGE_SLOTS
        self.largest("device", f"ring of {kind}", [(host, slots * size), (nvme, slots * size)])
        if not self.unified:
            self.largest("host", f"staging of {kind}", [(nvme, staged * size)])
        return device, host, nvme

    def _counts(self, fetches: tuple[int, int], later: tuple[int, int]) -> list[tuple[int, int]]:
        """Phases, and how many fetches each makes."""
        if not self.earlier:
            return list(zip((FORWARD, BACKWARD), fetches, strict=True))
        earlier = [(EARLIER[p], fetches[p] + (self.earlier - 1) * later[p]) for p in (FORWARD, BACKWARD)]
        return [*earlier, *zip((FORWARD, BACKWARD), later, strict=True)]

    def _cut(self, entry: BlockClass, device: int) -> None:
        """What stays of a block in DEVICE memory ends at one of its cuts, where these are; relaxed, anywhere."""
        if not entry.weight_cuts or not entry.streamed_bytes:
            return
        chosen = [(self.program.whole_number(1), cut / entry.stored_bytes) for cut in entry.weight_cuts]
        self.program.row([(cut, 1.0) for cut, _ in chosen], 1.0, 1.0)
        self.program.row([*chosen, (device, -1.0)], 0.0, 0.0)

    def _rows(self) -> None:
        program, hardware = self.program, self.hardware
        for phase, time in self.times.items():
            for resource in RESOURCES:
                terms = self.busy[phase, resource]
                program.at_most([(time, -1.0), *terms], -self.fixed[phase, resource])
                for variable, seconds in terms:
                    program.cost[variable] += self.price * PRICES.get(resource, 0.0) * seconds
            for one, other, share in (
                ("host_to_device", "device_to_host", hardware.links.duplex),
                ("ssd_read", "ssd_write", hardware.drive_mix),
            ):
                both = self.busy[phase, one] + self.busy[phase, other]
                constant = self.fixed[phase, one] + self.fixed[phase, other]
                program.at_most([(time, -1.0 - share), *both], -constant)
        for (phase, _), terms in self.serial.items():
            times = {BACKWARD: 1, EARLIER[BACKWARD]: self.earlier}.get(phase, 0)
            again = [(variable, times * seconds) for variable, seconds in self.redone]
            program.at_most([(self.times[phase], -1.0), *again, *terms], -self.fixed[phase, "compute"])
        fixed = {
            "device": sum(fixed_device_bytes(self.problem, self.knobs).values()),
            "host": sum(fixed_host_bytes(self.problem, self.knobs).values()),
            "nvme": float(self.workload.log_bytes or 0),
        }
        workload = self.workload
        if workload.pinned and workload.commit_every:
            fixed["nvme"] = 2.0 * workload.trainable_params * workload.weight_bytes_per_param
        slabs = slab_bytes(self.problem)
        for tier, terms in self.held.items():
            room = self.room[tier] * (1 - 1e-6) - fixed[tier]
            short: Terms = []
            if self.elastic:
                self.missing[tier] = program.variable(1e6, cost=SHORTAGE_PRICES[tier])
                short = [(self.missing[tier], -1.0)]
            if terms or short or room < 0:
                program.at_most([*terms, *short], room / GB, tier)
            if slabs and tier == self.slabs_tier:
                program.at_most([*self.held_in_save[tier], *short], (room - slabs) / GB, IN_SAVE)
        if self.problem.max_written_bytes is not None:
            written = [t for phase in self.phases for t in self.busy[phase, "ssd_write"]]
            constant = sum(self.fixed[phase, "ssd_write"] for phase in self.phases)
            limit = 0.999 * self.problem.max_written_bytes / self.rate["ssd_write"] / self.unit
            program.at_most(written, limit - constant, "writes")


def solve_steady(
    problem: Problem,
    knobs: Knobs,
    *,
    unit_seconds: float,
    price: float = LOW_PRICE,
    freedoms: Freedoms | None = None,
    room: dict[str, float] | None = None,
    elastic: bool = False,
    in_whole_numbers: bool = False,
    relaxed: Steady | None = None,
) -> Steady | None:
    """The best fractions for `knobs`; None if nothing fits. `unit_seconds` scales time, about a step.

    `elastic` lets tiers overflow, as little as possible, and says by how much. `in_whole_numbers` rounds what has to be
    whole (chunks that are treated so, embeddings by rows); bound and duals are those of the relaxation: of `relaxed`,
    what this gave before without rounding for the same arguments, or solved here.

    `room` replaces the capacities, bytes by tier. Raises what `Program.solve` raises.
    """
    space = room or {tier: float(size) for tier, size in capacities(problem).items()}
    builder = _Builder(problem, knobs, freedoms or Freedoms(), space, unit_seconds, price, elastic)
    columns = builder.build()
    if relaxed is None:
        solution = builder.program.solve()
        if solution is None:
            return None
        relaxed = _read(builder, columns, solution)
    if not (in_whole_numbers and builder.program.whole):
        return relaxed
    solution = builder.program.solve(in_whole_numbers=True)
    if solution is None:
        return None
    rounded = _read(builder, columns, solution)
    return replace(rounded, bound_seconds=relaxed.bound_seconds, seconds_per_gb=relaxed.seconds_per_gb)


def _read(builder: _Builder, columns: list[ClassVariables], solution: Solution) -> Steady:
    x, program, unit = solution.values, builder.program, builder.unit
    fractions = [
        Fractions(
            weights=(x[c.weights[0]], x[c.weights[1]], x[c.weights[2]]),
            tokens=tuple((x[t[0]], x[t[1]], x[t[2]], x[t[3]]) for t in c.tokens),
            updates={key: x[column] for key, column in c.updates.items()},
        )
        for c in columns
    ]
    # Busy seconds are at most the time of their phase, so prices are at most price * PRICE_SUM of it.
    bound = program.certified_bound(solution.duals) / (1 + builder.price * PRICE_SUM)
    tiers = ("device", "host", "nvme")
    duals: dict[str, float] = {t: -solution.duals[program.names[t]] for t in tiers if t in program.names}
    if IN_SAVE in program.names:  # a GB more is more in a step, and while a model is saved
        tier = builder.slabs_tier
        duals[tier] = duals.get(tier, 0.0) - solution.duals[program.names[IN_SAVE]]
    return Steady(
        knobs=builder.knobs,
        step_seconds=sum(x[t] for t in builder.times.values()) * unit,
        bound_seconds=bound * unit,
        fractions=fractions,
        seconds_per_gb={tier: dual * unit for tier, dual in duals.items()},
        write_seconds=unit
        * sum(
            builder.fixed[phase, "ssd_write"] + sum(x[v] * s for v, s in builder.busy[phase, "ssd_write"])
            for phase in builder.phases
        ),
        short_bytes={tier: x[v] * GB for tier, v in builder.missing.items() if x[v] * GB > 1},
    )
