"""The steady state of a plan space as a linear program: fractions by class, one time for each phase.

For fixed knobs, what a plan leaves open is continuous: which share of every block's weights rests in which tier, which
share of a saved tensor's tokens is kept, swapped or computed again, and which share of the parameters is updated where
and when. A phase takes at least as long as each resource works in it; both directions of a link, and reading and
writing of the drives, share what `duplex` and `drive_mix` leave them, phase by phase. Capacities are rows in GB.

The program sees no pipeline fill: its optimum is a lower bound on what any plan with these knobs can take, and the
simulator ranks. Its duals say what a GB more would buy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from planners.cost import (
    EDGE_SLOTS,
    ClassCost,
    Knobs,
    buckets,
    capacities,
    class_costs,
    fetch_counts,
    fixed_device_bytes,
    fixed_host_bytes,
    num_chunks,
)
from planners.expand import Fractions, UpdateKey
from planners.placement import Tier, UpdateMode, UpdatePlace
from planners.problem import BlockClass, Problem
from planners.program import Program, Solution, Terms
from planners.timeline import MAX_SIMULATED_CHUNKS

GB = 1e9
FORWARD, BACKWARD, UPDATE = 0, 1, 2
RESOURCES = ("compute", "host_to_device", "device_to_host", "ssd_read", "ssd_write", "cpu")
PRICES = {"compute": 1.0, "host_to_device": 1.0, "device_to_host": 1.0, "ssd_read": 2.0, "ssd_write": 4.0}
"""What a second of work costs beside time, in units of `price`: ties go to the plan that moves less."""
PRICE_SUM = sum(PRICES.values())
LOW_PRICE = 1e-4
SHORTAGE_PRICES = {"device": 1e4, "host": 1e3, "nvme": 1e2}
"""Of a missing GB, in units of time: fitting comes before being fast, and what is cheap to buy may be short first."""


@dataclass(frozen=True)
class ClassVariables:
    """Columns of one class."""

    weights: tuple[int, int, int]
    tokens: tuple[tuple[int, int, int, int], ...]
    updates: dict[UpdateKey, int]


@dataclass(frozen=True)
class Freedoms:
    """What the optimiser may use. Each can be switched off, for ablations and for the policies of others."""

    nvme_activations: bool = True
    swaps: bool = True
    """Saved tensors other than layer inputs may be kept and swapped."""
    device_updates: bool = True
    weights: tuple[bool, bool, bool] = (True, True, True)
    """Tiers in which weights may rest."""
    states: tuple[bool, bool, bool] = (True, True, True)


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


class _Builder:
    """Lays out the program for one set of knobs."""

    def __init__(
        self,
        problem: Problem,
        knobs: Knobs,
        freedoms: Freedoms,
        room: dict[str, float],
        unit: float,
        price: float,
        elastic: bool,
    ) -> None:
        self.problem, self.knobs, self.freedoms, self.room = problem, knobs, freedoms, room
        self.unit, self.price, self.elastic = unit, price, elastic
        self.missing: dict[str, int] = {}
        self.workload, self.hardware = problem.workload, problem.hardware
        self.unified = problem.hardware.unified
        self.program = Program()
        after = knobs.update_mode is UpdateMode.AFTER
        self.phases = (FORWARD, BACKWARD, UPDATE) if after else (FORWARD, BACKWARD)
        self.times = [self.program.variable(0.0, 1e6, 1.0) for _ in self.phases]
        self.busy: dict[tuple[int, str], Terms] = {key: [] for key in itertools.product(self.phases, RESOURCES)}
        self.fixed: dict[tuple[int, str], float] = dict.fromkeys(self.busy, 0.0)
        self.held: dict[str, Terms] = {"device": [], "host": [], "nvme": []}
        self.most: dict[tuple[str, str], int] = {}
        self.serial: dict[int, Terms] = {phase: [] for phase in self.phases}
        """What cannot hide behind computation, because there is one buffer for it; seconds over `unit`."""
        self.redone: Terms = []
        links, drives = self.hardware.links, bool(self.hardware.drives)
        self.rate = {
            "compute": 1.0,
            "cpu": 1.0,
            "host_to_device": links.host_to_device_bytes_per_second,
            "device_to_host": links.device_to_host_bytes_per_second,
            "ssd_read": self.hardware.read_bytes_per_second if drives else 1.0,
            "ssd_write": self.hardware.write_bytes_per_second if drives else 1.0,
        }

    def work(self, phase: int, resource: str, variable: int | None, amount: float) -> None:
        """`amount` (bytes, or seconds) times the variable, on a resource in a phase."""
        if self.unified and resource in ("host_to_device", "device_to_host"):
            return
        seconds = amount / self.rate[resource] / self.unit
        if variable is None:
            self.fixed[phase, resource] += seconds
        else:
            self.busy[phase, resource].append((variable, seconds))

    def hold(self, tier: str, variable: int, num_bytes: float) -> None:
        self.held["device" if self.unified and tier == "host" else tier].append((variable, num_bytes / GB))

    def largest(self, tier: str, name: str, terms: Terms, constant: float = 0.0) -> None:
        """A buffer that must hold the largest of several needs, in bytes."""
        tier = "device" if self.unified and tier == "host" else tier
        if (tier, name) not in self.most:
            self.most[tier, name] = self.program.variable(0.0, 1e7)
            self.held[tier].append((self.most[tier, name], 1.0))
        least = [(self.most[tier, name], -1.0), *((v, a / GB) for v, a in terms)]
        self.program.at_most(least, -constant / GB)

    def build(self) -> list[ClassVariables]:
        found = []
        counts = fetch_counts(self.problem, self.knobs.slots)
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
            weights = self._weights(entry, counts[c])
            tokens = self._tokens(entry, costs[c].recompute_seconds)
            updates = self._updates(entry, weights)
            found.append(ClassVariables(weights, tokens, updates))
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
        on_device = params / self.hardware.device.adamw_params_per_second / self.unit
        moved = 0.0 if self.unified else self.workload.state_bytes_per_param * params / self.rate["host_to_device"]
        step += [
            (x, on_device if tier is Tier.DEVICE else max(on_device, moved / self.unit))
            for (tier, place, _), x in columns[first].updates.items()
            if place is UpdatePlace.DEVICE
        ]
        times = [(time, -1.0) for time in self.times]
        self.program.at_most([*times, *self.redone, *streamed, *step], -compute / self.unit)

    def _weights(self, entry: BlockClass, fetches: tuple[int, int]) -> tuple[int, int, int]:
        size, n = float(entry.stored_bytes), entry.count
        allowed = list(self.freedoms.weights)
        allowed[1] &= not self.unified
        allowed[2] &= bool(self.hardware.drives)
        device, host, nvme = (self.program.variable(0.0, float(ok)) for ok in allowed)
        self.program.row([(device, 1.0), (host, 1.0), (nvme, 1.0)], 1.0, 1.0)
        for phase, count in zip((FORWARD, BACKWARD), fetches, strict=True):
            self.work(phase, "host_to_device", host, count * size)
            self.work(phase, "host_to_device", nvme, count * size)
            self.work(phase, "ssd_read", nvme, count * size)
            if entry.is_layer and self.knobs.slots == 1 and not self.unified:
                seconds = count * size / self.rate["host_to_device"] / self.unit
                self.serial[phase] += [(host, seconds), (nvme, seconds)]
        self.hold("device", device, n * size)
        self.hold("host", host, n * size)
        self.hold("nvme", nvme, n * size * (2 if self.workload.mutable else 1))
        kind, slots, staged = ("layers", self.knobs.slots, self.knobs.buffers.host_slots)
        if not entry.is_layer:
            kind, slots, staged = "edges", EDGE_SLOTS, EDGE_SLOTS
        self.largest("device", f"ring of {kind}", [(host, slots * size), (nvme, slots * size)])
        if not self.unified:
            self.largest("host", f"staging of {kind}", [(nvme, staged * size)])
        return device, host, nvme

    def _tokens(self, entry: BlockClass, again: tuple[float, ...]) -> tuple[tuple[int, int, int, int], ...]:
        workload, slots = self.workload, self.knobs.buffers.swap_slots
        real = num_chunks(self.problem, self.knobs.cuts)
        simulated = min(real, MAX_SIMULATED_CHUNKS)
        found = []
        moving: Terms = []
        staged: Terms = []
        for saved, seconds in zip(entry.saved, again, strict=True):
            size = saved.bytes_per_token * workload.tokens
            free = self.freedoms.swaps and self.problem.capabilities.token_policy
            free |= not saved.recomputable
            drive = bool(self.hardware.drives) and free and self.freedoms.nvme_activations
            drive |= bool(self.hardware.drives) and not saved.recomputable
            redo = self.program.variable(0.0, float(saved.recomputable))
            nvme = self.program.variable(0.0, float(drive))
            host = self.program.variable(0.0, float(free and not self.unified))
            kept = self.program.variable(0.0, float(free))
            self.program.row([(redo, 1.0), (nvme, 1.0), (host, 1.0), (kept, 1.0)], 1.0, 1.0)
            n = entry.count
            self.work(BACKWARD, "compute", redo, n * seconds)
            self.redone.append((redo, n * seconds / self.unit))
            for swapped in (nvme, host):
                self.work(FORWARD, "device_to_host", swapped, n * size)
                self.work(BACKWARD, "host_to_device", swapped, n * size)
                if self.knobs.boundary is Tier.HOST and saved.name == "input":
                    self.work(FORWARD, "host_to_device", swapped, n * size)
                moving.append((swapped, (slots + 1) * size / real))
            self.work(FORWARD, "ssd_write", nvme, n * size)
            self.work(BACKWARD, "ssd_read", nvme, n * size)
            staged.append((nvme, 2 * (slots + 1) * size / simulated))
            moving.append((redo, size / real))
            self.hold("device", kept, n * size)
            self.hold("host", host, n * size)
            self.hold("nvme", nvme, n * size)
            found.append((redo, nvme, host, kept))
        if found:
            self.largest("device", "activations in flight", moving)
            self.largest("host", "staging of activations", staged)
        return tuple(found)

    def _updates(self, entry: BlockClass, weights: tuple[int, int, int]) -> dict[UpdateKey, int]:
        params = float(entry.trainable_params)
        if not params:
            return {}
        mode, workload, program, n = self.knobs.update_mode, self.workload, self.program, entry.count
        state, gradient = workload.state_bytes_per_param * params, workload.gradient_bytes_per_param * params
        new = workload.weight_bytes_per_param * params
        copies = 2 if mode is UpdateMode.SPECULATIVE else 1
        found: dict[UpdateKey, int] = {}
        for key in self._update_keys():
            tier, place, deferred = key
            x = found[key] = program.variable(0.0, 1.0)
            phase = UPDATE if mode is UpdateMode.AFTER else (FORWARD if deferred else BACKWARD)
            stays = mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE) or deferred
            if place is UpdatePlace.CPU:
                self.work(phase, "cpu", x, n * params / self.hardware.host.adamw_params_per_second)
                self.work(BACKWARD, "device_to_host", x, n * gradient)
                if entry.is_layer and self.knobs.buffers.gradient_slots == 1 and not workload.pinned:
                    self.serial[BACKWARD].append((x, n * gradient / self.rate["device_to_host"] / self.unit))
                if stays:
                    self.hold("host", x, n * gradient)
                self.largest("host", "gradients", [(x, gradient * self.knobs.buffers.host_gradient_slots)])
            else:
                self.work(phase, "compute", x, n * params / self.hardware.device.adamw_params_per_second)
                if tier is not Tier.DEVICE:
                    self.work(phase, "host_to_device", x, n * state)
                    self.work(phase, "device_to_host", x, n * state)
                if stays and not workload.pinned:
                    self.hold("device", x, n * gradient)
            if tier is Tier.NVME:
                self.work(phase, "ssd_read", x, n * state)
                self.work(phase, "ssd_write", x, n * state)
            committed = bool(workload.commit_every and self.hardware.drives)
            if tier is Tier.NVME or workload.commit_every:
                self.hold("nvme", x, 2 * n * state)
            if tier is not Tier.NVME:
                self.hold(tier.value, x, copies * n * state)
                if committed:
                    self.work(phase, "ssd_write", x, n * state / (workload.commit_every or 1))
                    if tier is Tier.DEVICE:
                        self.work(phase, "device_to_host", x, n * state / (workload.commit_every or 1))
        program.row([(x, 1.0) for x in found.values()], 1.0, 1.0)
        self._staging(entry, found, state)
        self._new_weights(entry, weights, found, new)
        if workload.pinned and workload.commit_every and self.hardware.drives:
            last = self.phases[-1]
            self.work(last, "ssd_write", None, n * new / workload.commit_every)
            self.work(last, "device_to_host", None, n * new / workload.commit_every)
        return found

    def _update_keys(self) -> list[UpdateKey]:
        mode, freedoms = self.knobs.update_mode, self.freedoms
        times = [False] if mode is not UpdateMode.DEFERRED else ([True] if self.workload.clips else [False, True])
        tiers = [t for t, ok in zip(Tier, freedoms.states, strict=True) if ok]
        tiers = [t for t in tiers if not (t is Tier.HOST and self.unified) and (t is not Tier.NVME or self._drives)]
        on_device = freedoms.device_updates and self.problem.capabilities.device_updates
        keys: list[UpdateKey] = []
        for tier, deferred in itertools.product(tiers, times):
            if tier is not Tier.DEVICE and not self.unified:
                keys.append((tier, UpdatePlace.CPU, deferred))
            if self.unified or on_device or (tier is Tier.DEVICE and freedoms.device_updates):
                keys.append((tier, UpdatePlace.DEVICE, deferred))
        return keys

    @property
    def _drives(self) -> bool:
        return bool(self.hardware.drives)

    def _staging(self, entry: BlockClass, found: dict[UpdateKey, int], state: float) -> None:
        pieces = max(map(buckets, self.workload.classes))
        staged = [(x, self.knobs.buffers.state_slots * state / pieces) for k, x in found.items() if k[0] is Tier.NVME]
        self.largest("host", "staging of state", staged)
        moved = [
            (x, 2 * state / pieces)
            for (tier, place, _), x in found.items()
            if place is UpdatePlace.DEVICE and tier is not Tier.DEVICE
        ]
        self.largest("device", "state updated on the device", moved)

    def _new_weights(
        self, entry: BlockClass, weights: tuple[int, int, int], found: dict[UpdateKey, int], new: float
    ) -> None:
        """What is updated on one side of the link and rests on the other; what goes back to the drive."""
        program, n, last = self.program, entry.count, self.phases[-1]
        on_device = [(x, 1.0) for (_, place, _), x in found.items() if place is UpdatePlace.DEVICE]
        down, up = program.variable(0.0, 1.0), program.variable(0.0, 1.0)
        if self.workload.pinned:  # all of it is in DEVICE memory
            program.row([(down, 1.0), *on_device], 1.0, 2.0)
        else:
            program.row([(down, 1.0), (weights[0], -1.0), *on_device], 0.0, 2.0)
            program.row([(up, 1.0), (weights[0], 1.0), *((x, -1.0) for x, _ in on_device)], 0.0, 3.0)
        deferring = self.knobs.update_mode is UpdateMode.DEFERRED
        if not deferring:
            self.work(last, "host_to_device", down, n * new)
            self.work(last, "device_to_host", up, n * new)
            if self.workload.mutable:
                self.work(last, "ssd_write", weights[2], n * float(entry.stored_bytes))
            return
        # Either phase, whichever is better: the simulator decides where it really falls.
        for whole, resource, size in (
            (down, "host_to_device", new), (up, "device_to_host", new), (weights[2], "ssd_write", entry.stored_bytes),
        ):  # fmt: skip
            if resource == "ssd_write" and not self.workload.mutable:
                continue
            early, late = program.variable(0.0, 1.0), program.variable(0.0, 1.0)
            program.row([(early, 1.0), (late, 1.0), (whole, -1.0)], 0.0, 2.0)
            self.work(BACKWARD, resource, early, n * float(size))
            self.work(FORWARD, resource, late, n * float(size))

    def _rows(self) -> None:
        program, hardware = self.program, self.hardware
        for phase, time in zip(self.phases, self.times, strict=True):
            for resource in RESOURCES:
                terms = self.busy[phase, resource]
                program.at_most([(time, -1.0), *terms], -self.fixed[phase, resource])
                for variable, seconds in terms:
                    program.cost[variable] += self.price * PRICES.get(resource, 0.0) * seconds
            if self.serial[phase]:
                again = self.redone if phase == BACKWARD else []
                program.at_most([(time, -1.0), *again, *self.serial[phase]], -self.fixed[phase, "compute"])
            for one, other, share in (
                ("host_to_device", "device_to_host", hardware.links.duplex),
                ("ssd_read", "ssd_write", hardware.drive_mix),
            ):
                both = self.busy[phase, one] + self.busy[phase, other]
                constant = self.fixed[phase, one] + self.fixed[phase, other]
                program.at_most([(time, -1.0 - share), *both], -constant)
        fixed = {
            "device": sum(fixed_device_bytes(self.problem, self.knobs).values()),
            "host": sum(fixed_host_bytes(self.problem, self.knobs).values()),
            "nvme": 0.0,
        }
        workload = self.workload
        if workload.pinned and workload.commit_every:
            fixed["nvme"] = 2.0 * workload.trainable_params * workload.weight_bytes_per_param
        for tier, terms in self.held.items():
            room = self.room[tier] * (1 - 1e-6) - fixed[tier]
            if self.elastic:
                self.missing[tier] = program.variable(0.0, 1e6, SHORTAGE_PRICES[tier])
                terms = [*terms, (self.missing[tier], -1.0)]
            if terms or room < 0:
                program.at_most(terms, room / GB, tier)
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
) -> Steady | None:
    """The best fractions for `knobs`; None if nothing fits. `unit_seconds` scales time, about a step.

    `elastic` lets tiers overflow, as little as possible, and says by how much.

    `room` replaces the capacities, bytes by tier. Raises what `Program.solve` raises.
    """
    space = room or {tier: float(size) for tier, size in capacities(problem).items()}
    builder = _Builder(problem, knobs, freedoms or Freedoms(), space, unit_seconds, price, elastic)
    columns = builder.build()
    solution = builder.program.solve()
    if solution is None:
        return None
    return _read(builder, columns, solution)


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
    duals = {tier: -solution.duals[program.names[tier]] for tier in ("device", "host", "nvme") if tier in program.names}
    return Steady(
        knobs=builder.knobs,
        step_seconds=sum(x[t] for t in builder.times) * unit,
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
